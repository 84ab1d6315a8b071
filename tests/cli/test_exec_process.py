"""The process that `spanlock exec` makes of its command: dispositions of signals, standard streams, the terminal of a pipeline."""

import asyncio
import json
import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sidecar.cli.stage import Stage
from tests.cli.running import in_a_terminal, run, variables, words_of
from tests.stage import ready_stage, url

IGNORED = "grep SigIgn /proc/self/status"


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with ready_stage(subject="svid") as stage:
        yield stage


@pytest.mark.parametrize("before", ["", "trap '' INT HUP USR1 QUIT TSTP; ", "nohup ", "setsid -w "])
async def test_the_command_ignores_the_signals_that_exec_was_told_to_ignore_and_no_others(
    stage: Stage, before: str
) -> None:
    exec_it = "" if "nohup" in before or "setsid" in before else "exec "
    status, plain, _ = await run("sh", "-c", f"{before}{exec_it}{IGNORED}", env=variables(stage))
    assert status == 0
    words = shlex.join(words_of(*IGNORED.split()))
    status, out, err = await run("sh", "-c", f"{before}{exec_it}{words}", env=variables(stage))
    assert (status, out) == (0, plain), err


async def test_a_pipe_that_its_reader_left_ends_the_writer_silently(stage: Stage) -> None:
    status, out, err = await run(*words_of("sh", "-c", "yes | head -1"), env=variables(stage))
    assert (status, out) == (0, "y\n") and "roken pipe" not in err


async def test_standard_error_that_cannot_be_written_changes_neither_status_nor_receipt(
    stage: Stage, tmp_path: Path
) -> None:
    receipt = tmp_path / "receipt.json"
    command = f"curl -sS -o /dev/null {url(stage.search)} 2>/dev/null; exit 3"
    words = shlex.join(words_of("sh", "-c", command, options=("--receipt", str(receipt))))
    for where in ("2>/dev/full", "2>&-", "2>&1 >/dev/null | true"):
        receipt.unlink(missing_ok=True)
        script = f"set -o pipefail; {words} {where}"
        status, out, _ = await run("bash", "-c", script, env=variables(stage))
        assert (status, out) == (3, ""), where
        assert [end["at_issuer"] for end in json.loads(receipt.read_text())["credentials"]] == ["confirmed"], where


async def test_closed_standard_streams_hold_nothing_of_ours(stage: Stage, tmp_path: Path) -> None:
    """Else a file or a socket of exec would be the command's standard output."""
    told, receipt = tmp_path / "told", tmp_path / "receipt.json"
    command = f"echo leaked; echo leaked >&2; readlink /proc/self/fd/0 /proc/self/fd/1 > {told}; exit 4"
    words = shlex.join(words_of("sh", "-c", command, options=("--receipt", str(receipt))))
    status, _, _ = await run("bash", "-c", f"{words} <&- >&- 2>&-", env=variables(stage))
    assert status == 4 and json.loads(receipt.read_text())["credentials"] == []
    assert told.read_text().splitlines()[0] == "/dev/null"


async def test_a_command_in_a_pipe_may_ask_the_terminal(stage: Stage) -> None:
    ask = "printf ask; read x </dev/tty; echo got $x"
    script = f"echo hi | {shlex.join(words_of('sh', '-c', ask))}; echo end $?"
    _, screen = await asyncio.to_thread(in_a_terminal, ["bash", "-c", script], variables(stage), [(b"ask", b"yes\n")])
    assert b"got yes" in screen and b"end 0" in screen, screen


async def test_a_pager_after_it_in_the_pipe_may_ask_the_terminal_too(stage: Stage) -> None:
    command = shlex.join(words_of("sh", "-c", "echo x; sleep 1; echo y"))
    script = f"{command} | sh -c 'read x; printf more; read y </dev/tty; echo paged $y; cat'; echo end $?"
    _, screen = await asyncio.to_thread(in_a_terminal, ["bash", "-c", script], variables(stage), [(b"more", b"on\n")])
    assert b"paged on" in screen and b"end 0" in screen, screen


async def test_a_job_in_the_background_that_asks_the_terminal_waits_for_fg(stage: Stage) -> None:
    command = shlex.join(words_of("sh", "-c", "echo started; read x </dev/tty; echo got $x"))
    typed = [
        (b"prompt> ", command.encode() + b" &\n"),
        (b"started\r\n", b"sleep 1; jobs; echo shell-$((1+1))\n"),
        (b"Stopped", b""),
        (b"\nshell-2", b"fg; echo status-$?-\n"),
        (b"fg; ", b"more\n"),
        (b"\nstatus-0-", b"exit\n"),
    ]
    env = variables(stage, PS1="prompt> ", HISTFILE="/dev/null", TERM="dumb")
    _, screen = await asyncio.to_thread(in_a_terminal, ["bash", "--norc", "--noprofile", "-i"], env, typed)
    assert b"got more" in screen and b"\nstatus-0-" in screen, screen


async def test_ctrl_z_where_no_shell_would_continue_it_goes_on_at_once(stage: Stage) -> None:
    script = "echo ready; read line; echo got $line"
    status, screen = await asyncio.to_thread(
        in_a_terminal, words_of("bash", "-c", script), variables(stage), [(b"ready", b"\x1amore\n")]
    )
    assert status == 0 and b"got more" in screen, screen
