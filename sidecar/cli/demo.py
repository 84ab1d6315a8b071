"""The whole story in one command: embedded identity, issuer and tools, the real sidecar, and a small agent. Nothing else need
be installed, and all sockets are real. Shows each credential's life, and the proof of its death."""

import asyncio
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import typer
import uvloop

from sidecar.cli import environment
from sidecar.cli.foreign_uid import foreign_uid_refused
from sidecar.cli.proof import Proof
from sidecar.cli.stage import AGENT_ID, Stage
from sidecar.client.summary import residual, seconds
from sidecar.client.trust import write_bundle
from sidecar.control import convert
from sidecar.demo.tools import DemoTool, masked
from sidecar.model.workflow import CloseReason
from sidecar.telemetry.logging import configure
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from sidecar.wire.spanlock.v1 import workflows_pb2_grpc

_TRACE = "0af7651916cd43dd8448eb211c80319c"
_SECONDS = 60.0
"""For the whole story, which takes three: a step that never happens must fail it, not hold it up."""
_FACTS = (
    "ok",
    "close_to_dropped_ms",
    "close_to_revoked_ms",
    "replay_status",
    "introspection_before",
    "introspection_active",
)


@dataclass
class Story:
    """What happened, told as it happens: lines for people, or one JSON object a line."""

    as_json: bool
    clock: Any
    started: float = 0.0
    ok: bool = True
    facts: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_FACTS))

    def tell(self, step: str, text: str, good: bool = True, **facts: Any) -> None:
        """One step. A step that is not good makes the whole demo fail."""
        self.ok = self.ok and good
        at = (self.clock.monotonic() - self.started) * 1000
        if self.as_json:
            print(json.dumps({"step": step, "ms": round(at, 1), "ok": good, "text": text, **facts}), flush=True)
        else:
            print(f"{at:8.1f} ms  {'ok  ' if good else 'FAIL'}  {step:<10} {text}", flush=True)


def command(
    crash: bool = typer.Option(False, "--crash", help="Kills the agent with -9 in mid-call."),
    attack: bool = typer.Option(False, "--attack", help="A wrong Host, a stolen handle, a foreign uid: all refused."),
    keep: bool = typer.Option(False, "--keep", help="Leaves it running and prints lines to paste."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object a line; the last has the measurements."),
) -> None:
    configure("error", "console")
    ended: list[int] = []
    try:
        status = uvloop.run(_demo(crash, attack, keep, as_json, ended))
    except asyncio.CancelledError:
        status = 128 + ended[0]
    raise typer.Exit(status)


def _end_tidily(ended: list[int]) -> None:
    """A signal to end leaves nothing behind: the stage's files hold secrets. One that is ignored (nohup) stays so."""
    task = asyncio.current_task()
    if task is None:
        return

    def end(number: int) -> None:
        ended.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, end, int(number))


async def _demo(crash: bool, attack: bool, keep: bool, as_json: bool, ended: list[int]) -> int:
    _end_tidily(ended)
    async with Stage() as stage:
        clock = stage.app.clock
        story = Story(as_json, clock, clock.monotonic())
        try:
            async with asyncio.timeout(_SECONDS):
                await _acts(stage, story, crash, attack)
        except (grpc.RpcError, OSError, LookupError, ValueError) as error:
            story.tell("broken off", f"the story did not come to its end: {type(error).__name__}", False)
        story.facts["ok"] = story.ok
        if as_json:
            if keep:
                story.tell("keep", "it runs on; SIGINT or SIGTERM ends it", **_kept(stage))
            print(json.dumps(story.facts), flush=True)
        else:
            print(f"\n{'All of it happened.' if story.ok else 'Something did NOT happen; see FAIL above.'}", flush=True)
            if keep:
                _show_kept(stage)
        if keep:
            await asyncio.Event().wait()
        return 0 if story.ok else 1


async def _acts(stage: Stage, story: Story, crash: bool, attack: bool) -> None:
    ready = await stage.app.svids.wait_ready(10)
    story.tell("identity", f"SVID for {AGENT_ID} fetched from the Workload API", ready)
    async with Proof(stage) as proof:
        await _main_story(stage, story, proof)
        if crash:
            await _crash(stage, story, proof)
        if attack:
            await _attacks(stage, story)


@asynccontextmanager
async def _held(stage: Stage, trace_id: str = "") -> AsyncIterator[tuple[pb.OpenResponse, Any]]:
    """A workflow held open as an agent's client does it; ends with the channel."""
    async with grpc.aio.insecure_channel(f"unix:{stage.agent_socket}") as channel:
        stream = workflows_pb2_grpc.WorkflowsStub(channel).Hold()  # type: ignore[no-untyped-call]
        await stream.write(pb.HoldRequest(open=pb.OpenRequest(name="demo", trace_id=trace_id, listener=True)))
        yield (await stream.read()).opened, stream


async def _main_story(stage: Stage, story: Story, proof: Proof) -> None:
    async with _held(stage, _TRACE) as (opened, stream):
        story.tell("workflow", f"{opened.workflow.id} opened; its own listener is {opened.proxy_url}")
        answers = await _agent(stage, opened, story)
        tools = (stage.search, stage.reports)
        stolen = [(tool, tool.authorized[-1].removeprefix("Bearer ")) for tool in tools if tool.authorized]
        _side_by_side(story, answers, [token for _, token in stolen])
        before = [await proof.active(tool, token) for tool, token in stolen] == [True, True]
        story.tell("proof", f"both tokens introspected at the issuer before the close: active: {_word(before)}", before)
        story.facts["introspection_before"] = before
        await stream.write(pb.HoldRequest(close=True))
        report = (await stream.read()).closed
    _tell_end(story, report, "closed", 2)
    await _prove(story, proof, stolen, report)


async def _agent(stage: Stage, opened: pb.OpenResponse, story: Story) -> list[dict[str, Any]]:
    """Runs the agent program through the workflow's listener: no code of ours in it."""
    urls = [f"https://{tool.host}:{tool.port}/v1/items" for tool in (stage.search, stage.reports)]
    process, directory = await _spawn(stage, opened, urls)
    out, _ = await process.communicate()
    directory.cleanup()
    answers = [json.loads(line) for line in out.decode().splitlines()]
    good = process.returncode == 0 and [a["status"] for a in answers] == [200, 200]
    story.tell("calls", "decided by policy, credentials exchanged, injected; both tools answered 200", good)
    return answers


async def _spawn(
    stage: Stage, opened: pb.OpenResponse, arguments: list[str]
) -> tuple[asyncio.subprocess.Process, tempfile.TemporaryDirectory[str]]:
    directory = tempfile.TemporaryDirectory(prefix="spanlock-demo-agent-")
    bundle = write_bundle(Path(directory.name), opened.ca_pem)
    variables = environment.build(os.environ, opened.proxy_url, bundle, f"00-{_TRACE}-b7ad6b7169203331-01", "")
    variables["DEMO_STREAM"] = f"https://{stage.search.host}:{stage.search.port}/stream"
    program = Path(__file__).parents[1] / "demo" / "agent.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(program), *arguments, env=variables, stdout=asyncio.subprocess.PIPE
    )
    return process, directory


def _side_by_side(story: Story, answers: list[dict[str, Any]], tokens: list[str]) -> None:
    if len(answers) != 2 or len(tokens) != 2:
        story.tell("injected", "one of the tools saw no credential", False)
    for answer, token in zip(answers, tokens, strict=False):
        sent = answer.get("sent", {})
        clean = not any("auth" in name.lower() for name in sent)
        seen = answer["got"].get("saw", "")
        story.tell(
            "injected",
            f"agent sent no credential | {answer['got'].get('tool')} saw {seen}",
            clean and seen == masked(token),
        )


def _word(value: object) -> str:
    """As JSON has it; `no answer` for None."""
    return "no answer" if value is None else json.dumps(value)


async def _crash(stage: Stage, story: Story, proof: Proof) -> None:
    """The holder of a workflow is killed with -9 in mid-stream: nobody says goodbye, and it dies all the same."""
    stream = f"https://{stage.search.host}:{stage.search.port}/stream"
    variables = {**os.environ, "SPANLOCK_SOCKET": str(stage.agent_socket), "DEMO_STREAM": stream}
    program = Path(__file__).parents[1] / "demo" / "agent.py"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "exec", "--", sys.executable, str(program), "--forever",
        env=variables, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    first = await process.stdout.readline() if process.stdout is not None else b""
    (workflow,) = [w for w in stage.app.registry.remembered("demo") if w.is_open]
    token = stage.search.authorized[-1].removeprefix("Bearer ")
    story.tell("crash", f"{workflow.id}: the agent streams; its process is killed with -9 now", bool(first))
    process.kill()
    await process.wait()
    while workflow.is_open:
        await stage.app.clock.sleep(0.001)
    report = convert.close_report(await stage.app.registry.close(workflow, CloseReason.CLOSED))
    _tell_end(story, report, "holder_gone", 1)
    after = await proof.active(stage.search, token)
    story.tell("proof", f"the crashed agent's token introspected at the issuer: active: {_word(after)}", after is False)
    while stage.search.streams:
        await stage.app.clock.sleep(0.001)
    story.tell("cut", "the stream that carried it is cut at the tool")


def _tell_end(story: Story, report: pb.CloseResponse, reason: str, credentials: int) -> None:
    dropped = report.dropped_after.ToNanoseconds() / 1e6
    revoked = report.revoked_after.ToNanoseconds() / 1e6
    story.facts |= {"close_to_dropped_ms": dropped, "close_to_revoked_ms": revoked, "reason": report.reason}
    story.tell(
        "closed",
        f"span closed ({report.reason}); everything dropped here after {dropped:.3f} ms",
        report.reason == reason,
    )
    for end in report.leases:
        text = f"{end.tool}: {end.at_issuer} at the issuer; residual at the tool ({end.token_check}): {residual(end)}"
        story.tell("revoked", text, end.at_issuer == "confirmed", residual_seconds=seconds(end))
    story.tell(
        "revoked",
        f"the issuer has confirmed {len(report.leases)} credential{'s' * (len(report.leases) != 1)} after {revoked:.1f} ms",
        len(report.leases) == credentials,
    )


async def _prove(story: Story, proof: Proof, stolen: list[tuple[DemoTool, str]], report: pb.CloseResponse) -> None:
    """The same look-up as before the close, and both tokens as a thief would use them."""
    if len(stolen) != 2:
        story.tell("proof", "a token is missing: nothing can be proved", False)
        return
    looked_up = [await proof.active(tool, token) for tool, token in stolen]
    after = None if None in looked_up else any(looked_up)
    story.tell("proof", f"introspection after the close, same look-up: active: {_word(after)}", after is False)
    search, reports = [await proof.replay(tool, token) for tool, token in stolen]
    story.facts |= {"introspection_active": after, "replay_status": search}
    story.tell("replay", f"the same token at the introspecting tool, over HTTPS: {_word(search)}", search == 401)
    left = next((residual(end) for end in report.leases if end.token_check == "offline"), "none")
    text = f"the same token at the offline tool, over HTTPS: {_word(reports)}; residual life {left}: it asks nobody"
    story.tell("replay", text, reports == 200 and left != "none")


async def _attacks(stage: Stage, story: Story) -> None:
    """What a hostile agent tries; each must be refused with its reason."""
    async with _held(stage) as (opened, stream):
        mint = stage.issuer.minted
        port = int(opened.proxy_url.rpartition(":")[2])
        target = f"{stage.search.host}:{stage.search.port}"
        answer = await _raw(port, f"GET http://{target}/ HTTP/1.1\r\nHost: evil.test\r\n\r\n")
        story.tell("attack", "a Host that is not the destination: refused", b"authority_mismatch" in answer)
        story.tell("attack", *await foreign_uid_refused(stage, opened.handle))
        stolen = opened.handle
        await stream.write(pb.HoldRequest(close=True))
        await stream.read()
        explicit = int(stage.app.addresses["explicit"].rpartition(":")[2])
        answer = await _raw(
            explicit, f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: Bearer {stolen}\r\n\r\n"
        )
        story.tell("attack", "a stolen handle of a closed workflow: 407", answer.startswith(b"HTTP/1.1 407"))
        story.tell("attack", "no credential was minted for any of it", stage.issuer.minted == mint)


async def _raw(port: int, request: str) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request.encode())
    answer = await reader.read(65536)
    writer.close()
    return answer


def _kept(stage: Stage) -> dict[str, Any]:
    """Where what is left running is reached."""
    ca = stage.dir / "sidecar-ca.pem"
    ca.write_text(stage.app.plane.ca.pem)
    return {
        "path": str(Path(sys.executable).parent),
        "run_dir": f"{stage.dir}/run",
        "agent_socket": str(stage.agent_socket),
        "url": f"https://{stage.search.host}:{stage.search.port}/v1/items",
        "base_url": f"http://{stage.app.addresses['reverse']}/search/",
        "ca": str(ca),
    }


def _show_kept(stage: Stage) -> None:
    """Lines to paste into another shell, whose PATH knows nothing of where this is installed."""
    kept = _kept(stage)
    print("\nRunning; Ctrl-C ends it. In another shell:\n")
    print(f"  export PATH={shlex.quote(kept['path'])}:$PATH SPANLOCK_RUN_DIR={shlex.quote(kept['run_dir'])}")
    print(f"  spanlock exec -- curl -s {kept['url']}")
    print("  spanlock status; spanlock workflows; spanlock leases")
    print(f"""
# the same in Python:
python3 - <<'END'
import urllib.request
from sidecar.client.workflow import workflow
with workflow("pasted", socket="{kept["agent_socket"]}") as work:
    request = urllib.request.Request("{kept["base_url"]}v1/items", headers={{"x-spanlock-workflow": work.handle}})
    print(urllib.request.urlopen(request).read().decode())
print(work.summary)
END
""")
    print(f"  # base URL for SDKs inside a workflow: {kept['base_url']}   (CA: {kept['ca']})", flush=True)
