"""The client library against the real sidecar."""

import asyncio
import gc
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import aiohttp
import httpx
import pytest
import requests
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Tracer

from sidecar.cli.stage import Stage
from sidecar.client import otel, sockets
from sidecar.client import workflow as client
from sidecar.client.otel import SpanlockSpanProcessor
from sidecar.client.workflow import SpanlockRefused, SpanlockUnavailable, WorkflowHold, workflow
from tests.stage import ready_stage, url


async def test_sync_with_requests() -> None:
    async with ready_stage() as stage:

        def work() -> object:
            with workflow("report", socket=str(stage.agent_socket)) as held:
                session = requests.Session()
                session.trust_env, session.verify = False, held.write_bundle(stage.dir)
                assert session.get(url(stage.search), proxies=held.proxies, timeout=10).status_code == 200
                assert held.handle not in repr(held)
            return held.report

        report = await asyncio.to_thread(work)
        assert [end.at_issuer for end in report.leases] == ["confirmed"]  # type: ignore[attr-defined]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


ELSEWHERE = {
    "HTTP_PROXY": "http://127.0.0.1:1", "HTTPS_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "http://127.0.0.1:1", "NO_PROXY": "*",
    "REQUESTS_CA_BUNDLE": "/dev/null", "CURL_CA_BUNDLE": "/dev/null",
}  # fmt: skip
"""An environment that leads around the workflow, as that of `spanlock exec` leads to the command's own."""


async def test_a_configured_session_calls_within_its_workflow_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in ELSEWHERE.items():
        monkeypatch.setenv(name, value)
    async with ready_stage() as stage:
        outer = await asyncio.to_thread(workflow("exec", socket=str(stage.agent_socket)).open)
        monkeypatch.setenv("HTTPS_PROXY", outer.proxy_url)
        monkeypatch.delenv("NO_PROXY")

        def work() -> tuple[str, str]:
            with workflow("report", socket=str(stage.agent_socket)) as held, requests.Session() as session:
                held.configure(session)
                assert session.get(url(stage.search), timeout=10).status_code == 200
                monkeypatch.setenv("NO_PROXY", "*")
                assert session.get(url(stage.search), timeout=10).status_code == 200
                held.configure(session)
                return held.id, str(session.verify)

        inner, bundle = await asyncio.to_thread(work)
        flows = {noun.id: noun.flow_count for noun in stage.app.registry.remembered("demo")}
        assert flows == {outer.id: 0, inner: 2}
        assert not Path(bundle).parent.exists(), "the bundle goes with the workflow"
        await asyncio.to_thread(outer.close)


async def test_httpx_and_aiohttp_call_within_the_workflow_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (ELSEWHERE | {"SSL_CERT_FILE": "/dev/null"}).items():
        monkeypatch.setenv(name, value)
    async with ready_stage() as stage, workflow("report", socket=str(stage.agent_socket)) as held:
        trust = held.ssl_context()
        async with httpx.AsyncClient(proxy=held.proxy_url, verify=trust) as agent:
            assert (await agent.get(url(stage.search))).status_code == 200
        async with aiohttp.ClientSession(trust_env=True) as session:
            async with session.get(url(stage.search), proxy=held.proxy_url, ssl=trust) as answer:
                assert answer.status == 200
        assert stage.app.registry.get(held.id).flow_count == 2


async def test_only_what_is_like_a_session_of_requests_can_be_configured() -> None:
    async with ready_stage() as stage, workflow("report", socket=str(stage.agent_socket)) as held:
        async with httpx.AsyncClient() as agent:
            with pytest.raises(TypeError, match="httpx: .*proxy=work.proxy_url, verify=work.ssl_context"):
                held.configure(agent)  # type: ignore[arg-type]


async def test_async() -> None:
    async with ready_stage() as stage:
        async with workflow("report", socket=str(stage.agent_socket)) as held:
            assert stage.app.registry.get(held.id).name == "report"
            async with httpx.AsyncClient(proxy=held.proxy_url, verify=held.ssl_context(), trust_env=False) as agent:
                assert (await agent.get(url(stage.search))).status_code == 200
        assert held.report is not None and held.report.reason == "closed"


async def test_a_hold_opens_one_workflow_at_a_time() -> None:
    async with ready_stage() as stage:
        held = workflow("report", socket=str(stage.agent_socket))
        async with held:
            first = held.id
            with pytest.raises(RuntimeError, match="open already"):
                held.open()
            with pytest.raises(RuntimeError, match="open already"):
                async with held:
                    pass
            assert held.id == first and stage.app.registry.open_count == 1
        async with held:
            assert held.id != first and held.report is None, "after the close it opens anew"
        assert held.report is not None and stage.app.registry.open_count == 0


def test_a_hold_that_could_not_open_may_be_opened_again(tmp_path: Path) -> None:
    held = workflow("x", socket=str(tmp_path / "s.sock"))
    for _ in range(2):
        with pytest.raises(SpanlockUnavailable):
            held.open()


async def test_a_hold_that_is_dropped_closes_its_workflow_and_says_so() -> None:
    async with ready_stage() as stage:

        def forget() -> None:
            workflow("forgotten", socket=str(stage.agent_socket)).open()
            gc.collect()

        before = descriptors()
        with pytest.warns(ResourceWarning, match="unclosed workflow wf_"):
            await asyncio.to_thread(forget)
        (noun,) = stage.app.registry.remembered("demo")
        await asyncio.wait_for(stage.app.registry.wait_closed(noun), 10)
        assert noun.close_reason == "holder_gone"
        async with asyncio.timeout(10):
            while descriptors() > before:  # the connection goes too
                await asyncio.sleep(0.01)


async def test_a_hold_that_was_closed_is_dropped_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    async with ready_stage() as stage:
        async with workflow("report", socket=str(stage.agent_socket)) as held:
            pass
        del held
        gc.collect()
    assert not [w for w in recwarn if "workflow" in str(w.message)]


EXITS = """
import sys
from sidecar.client.workflow import workflow
held = workflow("report", socket=sys.argv[1]).open()
"""


async def test_a_hold_that_is_open_at_the_interpreters_exit_holds_nothing_up() -> None:
    async with ready_stage() as stage:
        with stage.app.registry.watch("demo") as changes:
            words = (sys.executable, "-W", "error", "-c", EXITS, str(stage.agent_socket))
            process = await asyncio.create_subprocess_exec(*words, stderr=subprocess.PIPE)
            _, err = await asyncio.wait_for(process.communicate(), 20)
            assert (err, process.returncode) == (b"", 0)
            async with asyncio.timeout(10):
                seen = [await changes.get() for _ in range(3)]
        assert seen[-1] is not None and seen[-1].close_reason == "holder_gone"


FORKS = """
import os, sys
import requests
from sidecar.client.workflow import workflow
with workflow("report", socket=sys.argv[1]) as held:
    session = requests.Session()
    held.configure(session)
    if (child := os.fork()) == 0:
        assert held.close() is None
        sys.exit(7)  # leaves the block, and the interpreter, as a worker does
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.path.exists(session.verify), held.id, flush=True)
    sys.stdin.read()
print(held.report.reason)
"""


async def test_a_forked_child_closes_nothing_of_its_parents() -> None:
    async with ready_stage() as stage:
        words = (sys.executable, "-c", FORKS, str(stage.agent_socket))
        process = await asyncio.create_subprocess_exec(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdin is not None and process.stdout is not None
        status, bundle, held = (await asyncio.wait_for(process.stdout.readline(), 20)).decode().split()
        assert (status, bundle) == ("7", "True") and stage.app.registry.get(held).is_open
        process.stdin.close()
        assert await asyncio.wait_for(process.stdout.read(), 20) == b"closed\n"


async def test_a_task_cancelled_while_it_opens_leaves_no_workflow_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ready_stage() as stage:
        started, gate, open_it = threading.Event(), threading.Event(), WorkflowHold.open

        def slow(held: WorkflowHold) -> WorkflowHold:
            started.set()
            assert gate.wait(10)
            return open_it(held)

        async def work() -> None:
            async with workflow("unwanted", socket=str(stage.agent_socket)):
                raise AssertionError("it never begins")

        monkeypatch.setattr(WorkflowHold, "open", slow)
        task = asyncio.ensure_future(work())
        assert await asyncio.to_thread(started.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with stage.app.registry.watch("demo") as changes:
            gate.set()
            async with asyncio.timeout(10):
                seen = [await changes.get() for _ in range(3)]
        assert [w.state.value for w in seen if w is not None][-1] == "closed"
        assert seen[-1] is not None and (seen[-1].name, seen[-1].close_reason) == ("unwanted", "closed")


async def test_the_socket_is_the_only_agents_in_the_run_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async with ready_stage() as stage:
        monkeypatch.delenv("SPANLOCK_SOCKET", raising=False)
        monkeypatch.setenv("SPANLOCK_RUN_DIR", str(stage.dir / "run"))
        held = workflow("found")
        async with held:
            assert stage.app.registry.get(held.id).agent == "demo"
        other = stage.agent_socket.parents[1] / "other" / "agent.sock"
        other.parent.mkdir()
        other.touch()
        with pytest.raises(SpanlockUnavailable, match=r"several agents .*\(demo, other\); set SPANLOCK_SOCKET"):
            workflow("x").open()
        monkeypatch.setenv("SPANLOCK_SOCKET", str(stage.agent_socket))
        async with workflow("named") as held:
            assert held.id
    monkeypatch.delenv("SPANLOCK_SOCKET")
    monkeypatch.setenv("SPANLOCK_RUN_DIR", str(tmp_path))
    with pytest.raises(SpanlockUnavailable, match=f"no agent's socket in {tmp_path}/agents; .*spanlock run"):
        workflow("x").open()


@pytest.mark.parametrize("prefix", ["", "unix:", "unix://"])
async def test_a_socket_may_be_named_as_grpc_names_it(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    async with ready_stage() as stage:
        async with workflow("report", socket=prefix + str(stage.agent_socket)) as held:
            assert held.id
        monkeypatch.setenv("SPANLOCK_SOCKET", prefix + str(stage.agent_socket))
        assert sockets.candidates() == [stage.agent_socket]
        async with workflow("report") as held:
            assert held.id
        async with workflow("report", socket=stage.agent_socket) as held:
            assert held.id


def test_a_path_is_taken_as_it_is() -> None:
    assert sockets.path_of("//run/a.sock") == Path("//run/a.sock")
    assert sockets.path_of("unix:run/a.sock") == Path("run/a.sock")


@pytest.mark.parametrize("name", [None, b"report", 7])
def test_a_name_that_is_no_text_is_said(name: object) -> None:
    with pytest.raises(TypeError, match=f"name: text, not {type(name).__name__}"):
        workflow(name)  # type: ignore[arg-type]


async def test_a_hold_tells_its_end_in_one_line() -> None:
    async with ready_stage() as stage:
        held = workflow("report", socket=str(stage.agent_socket))
        assert held.summary == "not opened"
        async with held:
            async with httpx.AsyncClient(proxy=held.proxy_url, verify=held.ssl_context()) as agent:
                await agent.get(url(stage.search))
            assert held.summary == "still open"
    assert held.summary.startswith("1 credential: 1 confirmed dead; revoked in ")


def test_no_sidecar_is_said_with_the_fix() -> None:
    with pytest.raises(SpanlockUnavailable, match="SPANLOCK_SOCKET"), workflow("x", socket="/nonexistent.sock"):
        pass


def test_a_sidecar_that_hangs_does_not_hang_the_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_OPEN_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s.sock"))
        silent.listen()
        with pytest.raises(SpanlockUnavailable, match="no answer within 0.2 s"):
            workflow("x", socket=str(tmp_path / "s.sock")).open()
        processor, tracer = spans(tmp_path / "s.sock")
        with tracer.start_as_current_span("work"):
            pass
        assert not processor._held


def spans(socket: Path) -> tuple[SpanlockSpanProcessor, Tracer]:
    processor = SpanlockSpanProcessor(socket=str(socket))
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    return processor, provider.get_tracer("t")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[WorkflowHold]:
    """Every hold that is opened from now on, or tried."""
    tried, open_it = [], WorkflowHold.open

    def noted(held: WorkflowHold) -> WorkflowHold:
        tried.append(held)
        return open_it(held)

    monkeypatch.setattr(WorkflowHold, "open", noted)
    return tried


def test_spans_without_a_sidecar_are_said_once_and_cost_one_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tried, (_, tracer) = counted(monkeypatch), spans(tmp_path / "none.sock")
    for _ in range(3):
        tracer.start_span("work").end()
    assert len(tried) == 1
    monkeypatch.setattr(otel, "_PAUSE", 0.0)
    processor, tracer = spans(tmp_path / "none.sock")
    for _ in range(3):
        tracer.start_span("work").end()
    assert len(tried) == 4, "after the pause it is tried again"
    assert [(r.name, r.levelname) for r in caplog.records] == [("spanlock", "WARNING")] * 2, "once an outage, each"
    assert "no_workflow" in caplog.text and "SPANLOCK_SOCKET" in caplog.text


def test_the_next_outage_is_said_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def scripted(held: WorkflowHold) -> WorkflowHold:
        if answers.pop(0):
            return held
        raise SpanlockUnavailable("down")

    answers = [True, False, False, True, True, False, True]
    monkeypatch.setattr(otel, "_PAUSE", 0.0)
    monkeypatch.setattr(WorkflowHold, "open", scripted)
    caplog.set_level("INFO", "spanlock")
    _, tracer = spans(tmp_path / "s.sock")
    while answers:
        tracer.start_span("work").end()
    assert [r.levelname for r in caplog.records if r.name == "spanlock"] == ["WARNING", "INFO"] * 2


def begin_and_end(tracer: Tracer, name: str) -> None:
    tracer.start_span(name).end()


class Choosy(Stage):
    """Permits every workflow but those of one name."""

    def write_files(self) -> None:
        super().write_files()
        forbidden = 'forbid(principal, action == Spanlock::Action::"workflow.open", resource) when { context.workflow == "no" };'
        with (self.dir / "policy.cedar").open("a") as policy:
            policy.write(forbidden)


async def test_a_span_that_is_refused_is_said_once_and_keeps_no_other_from_its_workflow(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with Choosy() as stage:
        processor, tracer = spans(stage.agent_socket)
        for name in ("no", "yes", "no", "yes"):
            await asyncio.to_thread(begin_and_end, tracer, name)
        assert [w.name for w in stage.app.registry.remembered("demo")] == ["yes", "yes"]
        (said,) = [r.getMessage() for r in caplog.records if r.name == "spanlock"]
        assert "policy_denied" in said
        with pytest.raises(SpanlockRefused) as refused:
            await asyncio.to_thread(workflow("no", socket=str(stage.agent_socket)).open)
        assert refused.value.reason == "policy_denied"
        await asyncio.to_thread(processor.shutdown)


def test_one_span_at_a_time_asks_whether_the_sidecar_is_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    processor, tracer = spans(tmp_path / "none.sock")
    tracer.start_span("work").end()
    asked, answer, threads = threading.Event(), threading.Event(), []

    def hangs(held: WorkflowHold) -> WorkflowHold:
        threads.append(threading.current_thread())
        asked.set()
        assert answer.wait(10)
        raise SpanlockUnavailable("hangs")

    monkeypatch.setattr(WorkflowHold, "open", hangs)
    processor._again = 0.0  # the pause is over
    asking = threading.Thread(target=lambda: tracer.start_span("work").end())
    asking.start()
    assert asked.wait(10)
    tracer.start_span("meanwhile").end()
    answer.set()
    asking.join(10)
    assert threads == [asking]


async def test_a_sidecar_that_hangs_at_the_close_does_not_hang_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ready_stage() as stage:
        held = await asyncio.to_thread(workflow("report", socket=str(stage.agent_socket)).open)
        monkeypatch.setattr(client, "_CALL_SECONDS", 0.2)
        thread = threading.Thread(target=held.close)
        thread.start()
        thread.join()  # holds up the loop that the sidecar runs on
        assert held.report is None and held.summary.startswith("the sidecar went away")


async def test_the_span_processor_opens_and_closes_with_the_root_span() -> None:
    async with ready_stage() as stage:
        provider = TracerProvider()
        provider.add_span_processor(SpanlockSpanProcessor(socket=str(stage.agent_socket)))
        tracer = provider.get_tracer("t")
        root = await asyncio.to_thread(tracer.start_span, "work\n" + "x" * 200)
        (noun,) = stage.app.registry.remembered("demo")
        assert noun.trace_id == f"{root.get_span_context().trace_id:032x}"
        gone = stage.app.registry.wait_closed(noun)
        root.end()
        await asyncio.wait_for(gone, 5)


def test_the_library_alone_says_where_its_command_is() -> None:
    script = (
        "import sys; sys.modules['typer'] = None; import sidecar.__main__ as m\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer': raise ModuleNotFoundError(name=name)\n"
        "del sys.modules['typer']; sys.meta_path.insert(0, Missing()); m.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "spanlock[sidecar]" in done.stderr and "Traceback" not in done.stderr
