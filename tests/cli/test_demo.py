"""`spanlock demo`: the whole story with every option, its JSON, and that a step which does not happen fails it."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import pytest

from sidecar.cli import demo
from sidecar.cli.demo import Story
from sidecar.cli.foreign_uid import foreign_uid_refused
from sidecar.cli.proof import Proof
from sidecar.cli.stage import Stage
from sidecar.clock import SystemClock
from sidecar.demo.tools import DemoTool
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from tests.stage import client, closed, opened, ready_stage, url


async def test_every_option_in_json() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sidecar",
        "demo",
        "--json",
        "--crash",
        "--attack",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(), 50)
    lines = [json.loads(line) for line in out.decode().splitlines()]
    assert process.returncode == 0, err.decode()
    facts = lines[-1]
    assert (facts["ok"], facts["introspection_before"], facts["introspection_active"]) == (True, True, False)
    assert facts["replay_status"] == 401 and 0 < facts["close_to_dropped_ms"] < facts["close_to_revoked_ms"]
    steps = [line["step"] for line in lines[:-1]]
    assert [s for i, s in enumerate(steps) if s not in steps[:i]] == [
        "identity", "workflow", "calls", "injected", "proof", "closed", "revoked", "replay", "crash", "cut", "attack"
    ]  # fmt: skip
    assert not re.search(r"eyJ[\w-]{12}", out.decode()), "no token is printed whole"


async def test_keep_prints_lines_that_work_when_pasted() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "demo", "--keep", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None
    shown = b""
    while b"base URL" not in shown:
        shown += await asyncio.wait_for(process.stdout.readline(), 30)
    text = shown.decode()
    exported = re.search(r"export PATH=(\S+):\$PATH SPANLOCK_RUN_DIR=(\S+)", text)
    assert exported is not None and "issuer has confirmed 2 credentials" in text
    lines = (
        f"{exported[0]}\nspanlock exec -- curl -s https://" + text.partition("curl -s https://")[2].partition("\n")[0]
    )
    bare = {"PATH": "/usr/bin:/bin"}
    curled = await asyncio.create_subprocess_exec(
        "bash", "-c", lines, env=bare, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(curled.communicate(), 30)
    assert curled.returncode == 0 and json.loads(out)["tool"] == "search.tool.test" and out.endswith(b"}\n"), (
        err.decode()
    )
    script = text.partition("<<'END'\n")[2].partition("\nEND\n")[0]
    pasted = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(pasted.communicate(), 30)
    assert pasted.returncode == 0 and b"search.tool.test" in out and b"confirmed" in out, err.decode()
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.wait(), 20)


async def test_a_signal_to_end_leaves_no_files() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "demo", "--keep", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    lines: list[dict[str, Any]] = []
    while not lines or "introspection_before" not in lines[-1]:
        lines.append(json.loads(await asyncio.wait_for(process.stdout.readline(), 30)))
    kept = Path(lines[-2]["run_dir"])
    assert lines[-2]["step"] == "keep" and kept.is_dir()
    process.terminate()
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, out, err.decode()) == (128 + signal.SIGTERM, b"", "")
    assert not kept.parent.exists(), "the directory of the stage is gone, with its secrets"


async def stolen(stage: Stage) -> tuple[list[tuple[DemoTool, str]], pb.CloseResponse]:
    """Both tools' tokens as they saw them, and the report of the close that ended them."""
    workflow = await opened(stage, listener=True)
    tools = (stage.search, stage.reports)
    async with client(stage, workflow.proxy_url) as agent:
        for tool in tools:
            assert (await agent.get(url(tool))).status_code == 200
    report = await closed(stage, workflow.workflow.id)
    return [(tool, tool.authorized[-1].removeprefix("Bearer ")) for tool in tools], report


async def test_the_proof_goes_over_the_tools_and_the_issuers_own_protocols(capsys: pytest.CaptureFixture[str]) -> None:
    async with ready_stage() as stage, Proof(stage) as proof:
        tokens, report = await stolen(stage)
        story = Story(True, SystemClock())
        await demo._prove(story, proof, tokens, report)
        assert story.ok and story.facts["introspection_active"] is False and story.facts["replay_status"] == 401
        assert (stage.search.requests, stage.reports.requests) == (2, 2), "the agent's, and the thief's"
        assert stage.search.headers[-1]["Authorization"] == f"Bearer {tokens[0][1]}"
        assert stage.search.headers[-1]["Host"] == f"search.tool.test:{stage.search.port}"
        shown = capsys.readouterr().out
        assert "residual life at most 300 s" in shown and not any(token in shown for _, token in tokens)


async def test_a_look_up_that_nobody_answers_proves_nothing() -> None:
    async with ready_stage() as stage, Proof(stage) as proof:
        tokens, report = await stolen(stage)
        stage.issuer.down = True
        story = Story(True, SystemClock())
        await demo._prove(story, proof, tokens, report)
        assert not story.ok and story.facts["introspection_active"] is None
        stage.issuer.down = False
        await stage.reports.stop()
        story = Story(True, SystemClock())
        await demo._prove(story, proof, tokens, report)
        assert not story.ok and story.facts["introspection_active"] is False, "no replay, no residual life shown"


async def test_a_story_in_which_nothing_works_fails_with_every_field(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Stage):
        async def __aenter__(self) -> Self:
            await super().__aenter__()
            self.issuer.down = True
            return self

    monkeypatch.setattr(demo, "Stage", Broken)
    assert await demo._demo(False, False, False, True, []) == 1
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(demo._FACTS) <= set(facts) and facts["ok"] is False and facts["replay_status"] is None

    async def breaks(*_: Any) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(demo, "_main_story", breaks)
    assert await demo._demo(False, False, False, True, []) == 1
    *_, last_step, facts = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert "ConnectionResetError" in last_step["text"] and facts["ok"] is False and set(facts) == set(demo._FACTS)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another uid")
async def test_the_foreign_uid_is_a_process_of_another_uid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # it needs no program but the interpreter
    async with ready_stage() as stage:
        workflow = await opened(stage)
        text, refused = await foreign_uid_refused(stage, workflow.handle)
        assert refused and "a process of uid 65534" in text
        assert stage.app.plane.denials[-1].outcome == "unknown_caller"


def test_a_step_that_does_not_happen_fails_the_story(capsys: pytest.CaptureFixture[str]) -> None:
    story = Story(False, SystemClock(), 0.0)
    story.tell("one", "happened")
    assert story.ok
    story.tell("two", "did not", False)
    story.tell("three", "happened")
    assert not story.ok and "FAIL" in capsys.readouterr().out
