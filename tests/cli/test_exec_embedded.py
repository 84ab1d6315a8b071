"""`spanlock exec -c`: the embedded sidecar is the command's alone, runs nothing of the working directory, and never outlives it."""

import asyncio
import json
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sidecar.cli.stage import Servers
from tests.cli.running import alone, children, embedding, ended, in_a_terminal, run, until_gone, variables, words_of
from tests.stage import ready_stage, url

LEGACY = "issuers: [{name: legacy, kind: static, secret_env: LEGACY_TOKEN}, "
HOSTILE = "import pathlib; pathlib.Path({marker!r}).write_text('ran'); raise SystemExit(9)\n"


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    async with Servers(subject="svid") as servers:
        yield servers


async def started(words: list[str], env: dict[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *words,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


async def said(process: asyncio.subprocess.Process, line: bytes) -> None:
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 30) == line + b"\n"


async def sidecar_of(process: asyncio.subprocess.Process) -> list[int]:
    """The embedded sidecar once it is there, as the only child before the command."""
    async with asyncio.timeout(20):
        while not (found := children(process.pid)):
            await asyncio.sleep(0.02)
    return found


async def test_nothing_of_the_working_directory_runs(servers: Servers, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name in ("uvloop", "sidecar", "typer", "ctypes"):
        (tmp_path / f"{name}.py").write_text(HOSTILE.format(marker=str(marker)))
    status, _, err = await run(*embedding(servers, "true"), env=alone(tmp_path), cwd=tmp_path)
    assert status == 0, err
    assert not marker.exists()


async def test_the_configurations_secrets_are_not_in_the_commands_environment(servers: Servers, tmp_path: Path) -> None:
    (servers.dir / "spanlock.yaml").write_text(servers.config_text().replace("issuers: [", LEGACY))
    words = embedding(servers, "sh", "-c", "env; tr '\\0' '\\n' < /proc/self/environ")
    status, out, err = await run(*words, env=alone(tmp_path, LEGACY_TOKEN="canary-1"))
    assert status == 0 and "canary-1" not in out + err and "HTTPS_PROXY" in out


async def test_nor_when_a_sidecar_runs_already_and_a_configuration_is_named(tmp_path: Path) -> None:
    async with ready_stage(subject="svid") as stage:
        (stage.dir / "spanlock.yaml").write_text(stage.config_text().replace("issuers: [", LEGACY))
        status, out, err = await run(*embedding(stage, "env"), env=variables(stage, LEGACY_TOKEN="canary-1"))
    assert status == 0 and "canary-1" not in out + err and "HTTPS_PROXY" in out


async def test_nor_can_the_command_read_them_in_exec_or_the_sidecar(servers: Servers, tmp_path: Path) -> None:
    (servers.dir / "spanlock.yaml").write_text(servers.config_text().replace("issuers: [", LEGACY))
    powers = "-sys_ptrace,-perfmon,-sys_admin"  # with any of these every process's memory is an open book
    as_others = ["setpriv", f"--bounding-set={powers}", f"--inh-caps={powers}"] if os.getuid() == 0 else []
    script = "for p in $PPID $(cat /proc/$PPID/task/*/children); do tr '\\0' '\\n' < /proc/$p/environ; done"
    words = [*as_others, *embedding(servers, "sh", "-c", script)]
    _, out, err = await run(*words, env=alone(tmp_path, LEGACY_TOKEN="canary-1"))
    assert "canary-1" not in out and "HTTPS_PROXY" in out, err


async def test_kill_9_of_exec_ends_the_embedded_sidecar_which_revokes(servers: Servers, tmp_path: Path) -> None:
    script = f"curl -sS -o /dev/null {url(servers.search)}; echo called; exec sleep 60"
    process = await started(embedding(servers, "sh", "-c", script), alone(tmp_path))
    await said(process, b"called")
    token = servers.search.authorized[-1].removeprefix("Bearer ")
    left = children(process.pid)
    assert len(left) == 2 and servers.issuer.active(token)
    (sidecar,) = (pid for pid in left if b"--embedded-in" in Path(f"/proc/{pid}/cmdline").read_bytes())
    core = next(
        line for line in Path(f"/proc/{sidecar}/limits").read_text().splitlines() if line.startswith("Max core")
    )
    assert core.split()[4:6] == ["0", "0"]
    process.kill()
    await until_gone(left)
    assert not servers.issuer.active(token)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)]
)
async def test_a_signal_before_the_command_ends_everything(
    servers: Servers, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    await servers.spire.update([])  # no identity: it waits
    ran = tmp_path / "ran"
    process = await started(embedding(servers, "touch", str(ran)), alone(tmp_path, TMPDIR=str(servers.dir)))
    left = await sidecar_of(process)
    async with asyncio.timeout(20):
        while not list(servers.dir.glob("spanlock-exec-*/run/agents/demo/agent.sock")):
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.3)
    process.send_signal(number)
    got, _, err = await ended(process)
    assert got == status and number.name in err.splitlines()[-1], err
    await until_gone(left)
    assert not ran.exists() and not list(servers.dir.glob("spanlock-exec-*"))


async def test_a_signal_while_the_sidecar_starts_ends_it_too(servers: Servers, tmp_path: Path) -> None:
    process = await started(embedding(servers, "true"), alone(tmp_path))
    left = await sidecar_of(process)
    process.terminate()
    assert (await ended(process))[0] == 143
    await until_gone(left)


async def test_a_signal_while_a_sidecar_hangs_ends_it_too(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        process = await started(words_of("true"), variables(SPANLOCK_SOCKET=str(tmp_path / "s")))
        silent.settimeout(20)
        connection, _ = await asyncio.to_thread(silent.accept)
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(5):
            assert (await ended(process))[0] == 130
        connection.close()


async def test_ctrl_c_that_the_command_handles_leaves_the_sidecar_to_it(servers: Servers, tmp_path: Path) -> None:
    script = f"trap 'echo told; told=1' INT; echo up; while [ -z \"$told\" ]; do sleep .1; done; curl -sS -o /dev/null -w '%{{http_code}}\\n' {url(servers.search)}"
    process = await started(embedding(servers, "bash", "-c", script), alone(tmp_path))
    await said(process, b"up")
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does
    status, out, err = await ended(process)
    assert (status, out) == (0, "told\n200\n"), err
    assert err.splitlines()[-1].startswith("spanlock: 1 credential: 1 confirmed dead"), err


async def test_the_closing_line_is_the_last_and_the_sidecar_has_ended_before_it(
    servers: Servers, tmp_path: Path
) -> None:
    status, _, err = await run(*embedding(servers, "curl", "-sS", url(servers.search)), env=alone(tmp_path))
    lines = err.splitlines()
    assert status == 0 and lines[-1].startswith("spanlock: 1 credential: 1 confirmed dead"), err
    assert any('"stopped"' in line for line in lines[:-1])


@pytest.mark.parametrize("comes_back", [False, True], ids=["down", "back again"])
async def test_a_revocation_that_failed_is_tried_until_the_sidecar_ends(
    servers: Servers, tmp_path: Path, comes_back: bool
) -> None:
    (servers.dir / "spanlock.yaml").write_text(servers.config_text() + "credentials: {revoke_deadline: 1.7}\n")
    go = tmp_path / "go"
    script = (
        f"curl -sS -o /dev/null {url(servers.search)}; echo called; while [ ! -e {go} ]; do sleep .05; done; echo end"
    )
    process = await started(embedding(servers, "sh", "-c", script), alone(tmp_path))
    await said(process, b"called")
    token = servers.search.authorized[-1].removeprefix("Bearer ")
    servers.issuer.down = True
    go.touch()
    await said(process, b"end")
    if comes_back:
        await asyncio.sleep(2.1)  # the close has reported by now
        servers.issuer.down = False
    status, _, err = await ended(process)
    lines = err.splitlines()
    assert status == 0 and lines[-1].startswith("spanlock: 1 credential: 1 failed"), err
    assert comes_back or servers.issuer.active(token)
    if not servers.issuer.active(token):  # as nearly always when it came back, if a try fell into the drain
        assert "revoked or expired" in lines[-2], err
    else:
        (named,) = [json.loads(line) for line in lines if '"not_revoked"' in line and '"issuer"' in line]
        assert named["tool"] == "search" and "not everything was revoked" in lines[-2], err


async def test_a_sidecar_that_does_not_end_is_killed(servers: Servers, tmp_path: Path) -> None:
    """It is stopped here, so that it hears no SIGTERM."""
    text = servers.config_text().replace("drain_seconds: 0.2", "drain_seconds: 0")
    (servers.dir / "spanlock.yaml").write_text(text + "credentials: {revoke_deadline: 0.1}\n")
    process = await started(embedding(servers, "sh", "-c", "echo up; exec sleep 60"), alone(tmp_path))
    await said(process, b"up")
    left = children(process.pid)
    sidecar = next(pid for pid in left if b"--embedded-in" in Path(f"/proc/{pid}/cmdline").read_bytes())
    command = next(pid for pid in left if pid != sidecar)
    os.kill(sidecar, signal.SIGSTOP)
    os.kill(command, signal.SIGTERM)
    status, _, err = await ended(process)
    assert status == 143 and "killed" in err, err
    await until_gone(left)


async def test_a_dead_sidecars_socket_does_not_stand_in_the_way(servers: Servers, tmp_path: Path) -> None:
    stale = tmp_path / "nobody/agents/demo"
    stale.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale / "agent.sock"))
    for env in (alone(tmp_path), variables(SPANLOCK_SOCKET=str(stale / "agent.sock"))):
        status, out, err = await run(*embedding(servers, "curl", "-sS", url(servers.search)), env=env)
        assert status == 0 and "search.tool.test" in out, err


async def test_a_configuration_that_is_wrong_is_125_and_says_where(servers: Servers, tmp_path: Path) -> None:
    (servers.dir / "spanlock.yaml").write_text(servers.config_text() + "nonsense: 1\n")
    status, _, err = await run(*embedding(servers, "true"), env=alone(tmp_path))
    assert status == 125 and "nonsense" in err


async def test_the_sidecar_writes_to_a_terminal_that_stops_background_writers(servers: Servers, tmp_path: Path) -> None:
    words = shlex.join(embedding(servers, "curl", "-sS", "-o", "/dev/null", url(servers.search)))
    script = f"stty tostop; {words}; echo end $?"
    status, screen = await asyncio.to_thread(in_a_terminal, ["bash", "-c", script], alone(tmp_path), [])
    assert status == 0 and b"1 confirmed dead" in screen and b"end 0" in screen, screen
