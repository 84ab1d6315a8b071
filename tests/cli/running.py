"""`spanlock exec` as a user starts it: its words, its environment, in a terminal or out of one. Every wait is bounded."""

import asyncio
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sidecar.cli.stage import Servers

LIMIT = 45.0
"""Seconds for whatever is waited for."""


def words_of(*command: str, options: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-P", "-m", "sidecar", "exec", *options, "--", *command]


def variables(stage: Servers | None = None, **more: str) -> dict[str, str]:
    socket = {"SPANLOCK_SOCKET": str(stage.agent_socket)} if stage is not None else {}
    return {**os.environ, **socket, **more}


def alone(directory: Path, **more: str) -> dict[str, str]:
    """The environment where no sidecar runs."""
    found = variables(None, SPANLOCK_RUN_DIR=str(directory / "nobody"), **more)
    found.pop("SPANLOCK_SOCKET", None)
    return found


def embedding(servers: Servers, *command: str, options: tuple[str, ...] = ()) -> list[str]:
    """The words that bring a sidecar of the command's own."""
    return words_of(*command, options=("-c", str(servers.dir / "spanlock.yaml"), *options))


async def run(*words: str, env: dict[str, str], cwd: Path | None = None) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *words, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    return await ended(process)


async def ended(process: asyncio.subprocess.Process) -> tuple[int, str, str]:
    """The status and what was said; ends the process when it does not end."""
    try:
        out, err = await asyncio.wait_for(process.communicate(), LIMIT)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return process.returncode, (out or b"").decode(), (err or b"").decode()


def in_a_terminal(words: Sequence[str], env: dict[str, str], typed: Sequence[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """Runs `words` in a terminal and types each answer once what comes before it is on the screen. The status and the screen."""
    pid, master = pty.fork()
    if pid == 0:
        for number in (signal.SIGINT, signal.SIGQUIT):  # under nohup they are ignored, and would be so here
            signal.signal(number, signal.SIG_DFL)
        os.execvpe(words[0], list(words), env)
    deadline = time.monotonic() + LIMIT
    screen, seen, waiting = b"", 0, list(typed)
    try:
        while True:
            readable, _, _ = select.select([master], [], [], max(deadline - time.monotonic(), 0))
            if not readable:
                raise AssertionError(f"no end after {LIMIT:g} s: {screen!r}")
            try:
                screen += os.read(master, 4096)
            except OSError:  # EIO: the last process of the terminal is gone
                break
            while waiting and (found := screen.find(waiting[0][0], seen)) >= 0:
                prompt, answer = waiting.pop(0)
                seen = found + len(prompt)
                os.write(master, answer)
    finally:
        os.close(master)  # hangs up: what is left there is told
        status = _reaped(pid)
    return os.waitstatus_to_exitcode(status), screen


def _reaped(pid: int) -> int:
    """Its wait status; ends it when it does not end within some seconds."""
    for _ in range(200):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that are still there."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def there(pid: int) -> bool:
    """Whether it runs: a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until_gone(pids: Sequence[int]) -> None:
    async with asyncio.timeout(20):
        while any(there(pid) for pid in pids):
            await asyncio.sleep(0.05)
