"""Whose the directories of the sockets are: as in a pod, where volumes are root's and the sidecar and its agent share a group."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar.cli.stage import Stage
from sidecar.clock import SystemClock
from sidecar.control.health import HealthServer
from sidecar.control.sockets import Socket
from sidecar.errors import ConfigError

SIDECAR, AGENT, SHARED = 2102, 2000, 2200
_BOTH = """
import asyncio, os, sys
from pathlib import Path
from sidecar.clock import SystemClock
from sidecar.control.sockets import Socket
from sidecar.errors import ConfigError
from sidecar.model.caller import Agent
os.setgroups([]); os.setgid({gid}); os.setuid({uid}); os.umask(0o077)
async def main(run):
    operator = Socket(run / "operator/operator.sock", (), lambda _: None, None, lambda: True, SystemClock(), 16)
    agent = Socket(run / "agents/a/agent.sock", (), lambda _: None, Agent("a", "spiffe://td/a", None, {agent}),
                   lambda: True, SystemClock(), 16)
    try:
        await operator.start()
        await agent.start()
    except ConfigError as error:
        print(error.detail, flush=True)
        return
    print("listening", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await agent.stop(0)
    await operator.stop(0)
asyncio.run(main(Path(sys.argv[1])))
"""
_AGENT = """
import os, socket, sys
os.setgroups([]); os.setgid({gid}); os.setuid({uid})
def tried(what, *arguments):
    try:
        what(*arguments)
        return "done"
    except OSError as error:
        return type(error).__name__
run = sys.argv[1]
mine, theirs = run + "/agents/a/agent.sock", run + "/operator/operator.sock"
print(tried(socket.socket(socket.AF_UNIX).connect, mine), tried(socket.socket(socket.AF_UNIX).connect, theirs),
      tried(os.listdir, run + "/operator"), tried(os.rename, mine, mine + "2"), tried(os.unlink, mine))
"""
_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become the sidecar's and the agent's uid")


@pytest.fixture
def volume() -> Iterator[Path]:
    """A directory as Kubernetes makes an emptyDir for a pod with an fsGroup."""
    path = Path(tempfile.mkdtemp(prefix="spanlock-volume-"))
    if os.geteuid() == 0:
        os.chown(path, 0, SHARED)
    path.chmod(0o2777)
    yield path
    shutil.rmtree(path)


def sidecar_on(run: Path) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", _BOTH.format(uid=SIDECAR, gid=SHARED, agent=AGENT), str(run)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@_root
def test_on_a_volume_of_roots_the_sidecar_makes_its_directories_and_the_agent_changes_nothing(volume: Path) -> None:
    """The volume is mounted whole in the sidecar; the agent sees `agents/a` of it alone, which is the sidecar's."""
    with sidecar_on(volume) as sidecar:
        assert sidecar.stdout is not None and sidecar.stdout.readline() == "listening\n"
        words = [sys.executable, "-I", "-S", "-c", _AGENT.format(uid=AGENT, gid=SHARED), str(volume)]
        agent = subprocess.run(words, capture_output=True, text=True, check=True)
        sidecar.communicate("", timeout=30)
    assert agent.stdout.split() == ["done", *["PermissionError"] * 4]
    for name, mode in (("operator", 0o700), ("agents", 0o755), ("agents/a", 0o755)):
        status = (volume / name).stat()
        assert (status.st_uid, status.st_mode & 0o777) == (SIDECAR, mode), name


@_root
@pytest.mark.parametrize("name", ["operator", "agents", "agents/a"])
def test_a_directory_of_anothers_in_which_others_may_write_is_refused_with_the_fix(volume: Path, name: str) -> None:
    """In `agents/a` the agent could put a socket of its own in the place of ours; in `operator` it could ask as operator."""
    (volume / name).mkdir(parents=True)
    (volume / name).chmod(0o2777)
    with sidecar_on(volume) as sidecar:
        said, _ = sidecar.communicate("", timeout=30)
    assert said.startswith(f"run_dir: {volume / name} is uid 0's and others may write in it (mode 2777)"), said
    assert f"as uid {SIDECAR}" in said and len(said.splitlines()) == 1


@_root
async def test_root_takes_the_directory_of_a_socket(volume: Path) -> None:
    (volume / "operator").mkdir()
    os.chown(volume / "operator", AGENT, SHARED)
    socket = Socket(volume / "operator/operator.sock", (), lambda _: None, None, lambda: True, SystemClock(), 16)
    await socket.start()
    status = (volume / "operator").stat()
    await socket.stop(0)
    assert (status.st_uid, status.st_mode & 0o777) == (0, 0o700)


async def test_a_path_that_no_socket_can_have_is_said(tmp_path: Path) -> None:
    socket = Socket(tmp_path / ("r" * 107) / "operator.sock", (), lambda _: None, None, lambda: True, SystemClock(), 16)
    with pytest.raises(ConfigError, match="run_dir: .* bytes, a socket's path 107 at most; set a shorter"):
        await socket.start()
    assert not list(tmp_path.iterdir())


async def test_probes_answer_when_every_socket_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod's agent starts when the sidecar's startup probe has passed."""
    stage, seen = Stage(), []
    start = HealthServer.start

    async def noted(self: HealthServer) -> None:
        seen.append([stage.agent_socket.is_socket(), stage.operator_socket.is_socket()])
        await start(self)

    monkeypatch.setattr(HealthServer, "start", noted)
    async with stage:
        assert seen == [[True, True]]
