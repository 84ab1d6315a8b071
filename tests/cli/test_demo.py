"""`spanlock demo`: the whole story with every option, its JSON, and that a step which does not happen fails it."""

import asyncio
import json
import re
import signal
import subprocess
import sys

import pytest

from sidecar.cli.demo import Story
from sidecar.clock import SystemClock


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
    script = text.partition("<<'END'\n")[2].partition("\nEND\n")[0]
    pasted = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await asyncio.wait_for(pasted.communicate(), 30)
    assert pasted.returncode == 0 and b"search.tool.test" in out and b"confirmed" in out, err.decode()
    process.send_signal(signal.SIGINT)
    await asyncio.wait_for(process.wait(), 20)


def test_a_step_that_does_not_happen_fails_the_story(capsys: pytest.CaptureFixture[str]) -> None:
    story = Story(False, SystemClock(), 0.0)
    story.tell("one", "happened")
    assert story.ok
    story.tell("two", "did not", False)
    story.tell("three", "happened")
    assert not story.ok and "FAIL" in capsys.readouterr().out
