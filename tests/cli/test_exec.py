"""`spanlock exec` as a user runs it: real commands, an embedded sidecar, unchanged clients, terminals, signals, deaths."""

import asyncio
import json
import shlex
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.cli.stage import Servers, Stage
from tests.cli import clients
from tests.cli.running import in_a_terminal, run, variables, words_of
from tests.stage import ready_stage, url

GIT = """\
- {{{{name: git, url: "https://git.tool.test:{port}", address: 127.0.0.1, ca_file: "{{dir}}/tools-ca.pem", issuer: demo-issuer, audience: tool-search, scopes: ["search:read"]}}}}
"""


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with ready_stage() as stage:
        yield stage


@pytest.mark.parametrize(
    "client",
    [
        ["curl", "-sS"], clients.python(clients.REQUESTS), clients.python(clients.HTTPX), clients.python(clients.AIOHTTP),
        clients.python(clients.URLLIB),
    ],
    ids=["curl", "requests", "httpx", "aiohttp", "urllib"],
)  # fmt: skip
async def test_a_client_works_unchanged_and_sees_no_credential(stage: Stage, client: list[str]) -> None:
    inherited = {"HTTPS_PROXY": "http://127.0.0.1:1", "https_proxy": "http://127.0.0.1:1", "NO_PROXY": "*"}
    status, out, err = await run(*words_of(*client, url(stage.search)), env=variables(stage, **inherited))
    assert status == 0, err
    assert json.loads(out)["tool"] == "search.tool.test"
    token = stage.search.authorized[-1].removeprefix("Bearer ")
    assert token and token not in out + err
    assert "1 confirmed dead" in err.splitlines()[-1]


async def test_git_over_https_works_unchanged(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = clients.GitServer(clients.git_repository(tmp_path))
    async with ready_stage(more=GIT.format(port=port), policy_for=("git",)) as stage:
        await server.start(stage.pki.server_context("git.tool.test"), port)
        try:
            remote = f"https://git.tool.test:{port}/repo.git"
            status, out, err = await run(*words_of("git", "ls-remote", remote), env=variables(stage))
        finally:
            await server.stop()
    assert status == 0, err
    assert "refs/heads/main" in out and server.credentials


async def test_opentelemetry_configured_by_nothing_but_the_environment_reaches_the_sidecar(stage: Stage) -> None:
    inherited = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_HEADERS": "x=y"}
    status, out, err = await run(*words_of(*clients.python(clients.EXPORT_A_SPAN)), env=variables(stage, **inherited))
    assert (status, out.strip()) == (0, "exported"), err


async def test_a_sidecar_is_embedded_when_none_runs(tmp_path: Path) -> None:
    async with Servers() as servers:
        receipt = tmp_path / "receipt.json"
        options = ("-c", str(servers.dir / "spanlock.yaml"), "--receipt", str(receipt))
        env = variables(SPANLOCK_RUN_DIR=str(tmp_path / "nobody"))
        env.pop("SPANLOCK_SOCKET", None)
        status, out, err = await run(
            *words_of("curl", "-sS", url(servers.search), options=options),
            env=env,
        )
        assert status == 0, err
        assert json.loads(out)["tool"] == "search.tool.test"
    told = json.loads(receipt.read_text())
    assert [end["at_issuer"] for end in told["credentials"]] == ["confirmed"] and told["reason"] == "closed"


@pytest.mark.parametrize(
    ("command", "status"), [(["false"], 1), (["sh", "-c", "exit 42"], 42), (["/nonexistent"], 127), (["/etc/passwd"], 126),
                            (["sh", "-c", "kill -9 $$"], 137), (["sh", "-c", "kill -TERM $$"], 143)]
)  # fmt: skip
async def test_the_exit_status_is_passed(stage: Stage, command: list[str], status: int) -> None:
    assert (await run(*words_of(*command), env=variables(stage)))[0] == status


async def test_signals_reach_the_whole_group(stage: Stage) -> None:
    script = "trap 'echo told; exit 7' TERM; echo up; while :; do read -t 1 x < /dev/zero || :; done"
    process = await asyncio.create_subprocess_exec(
        *words_of("bash", "-c", script), env=variables(stage), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and await process.stdout.readline() == b"up\n"
    process.terminate()
    out, _ = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, out) == (7, b"told\n")


async def test_kill_9_of_exec_closes_the_workflow_and_tells_the_command(stage: Stage, tmp_path: Path) -> None:
    told = tmp_path / "told"
    script = f"trap 'echo told > {told}; exit' TERM; echo up; while :; do read -t 1 x < /dev/zero || :; done"
    process = await asyncio.create_subprocess_exec(
        *words_of("bash", "-c", script), env=variables(stage), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout is not None and await process.stdout.readline() == b"up\n"
    (workflow,) = stage.app.registry.remembered("demo")
    process.kill()
    await asyncio.wait_for(stage.app.registry.wait_closed(workflow), 10)
    assert workflow.close_reason == "holder_gone"
    await asyncio.wait_for(process.stdout.read(), 10)  # ends when the command has
    assert told.read_text() == "told\n"


async def test_a_terminal_is_the_commands_own(stage: Stage) -> None:
    """It sees a terminal, is in its foreground (else reading would stop it), and Ctrl-C goes to it alone."""
    script = "test -t 0 && test -t 1 && echo ready; read line; echo got $line"
    status, screen = await asyncio.to_thread(
        in_a_terminal, words_of("bash", "-c", script), variables(stage), [(b"ready", b"typed\n")]
    )
    assert status == 0 and b"got typed" in screen, screen
    script = "trap 'echo interrupted; exit 3' INT; echo ready; while read -t 1 x || [ $? -gt 128 ]; do :; done"
    status, screen = await asyncio.to_thread(
        in_a_terminal, words_of("bash", "-c", script), variables(stage), [(b"ready", b"\x03")]
    )
    assert status == 3 and b"interrupted" in screen, screen
    assert b"no credentials were needed" in screen, "the last line is still ours"


async def test_ctrl_z_gives_the_shell_its_terminal_and_fg_goes_on(stage: Stage) -> None:
    """In a real shell with job control; in the background the command does not take the terminal away."""
    command = shlex.join(words_of("bash", "-c", "echo ready; read line; echo got $line"))
    typed = [
        (b"prompt> ", command.encode() + b"\n"),
        (b"\r\nready", b"\x1a"),
        (b"Stopped", b"echo shell-$((1+1))\n"),
        (b"\r\nshell-2", b"fg\n"),
        (b"fg\r\n", b"more\n"),
        (b"got more", b""),
        (b"no credentials were needed", shlex.join(words_of("true")).encode() + b" &\n"),
        (b"no credentials were needed", b"echo still-$((2+2))\n"),
        (b"\r\nstill-4", b"exit\n"),
    ]
    env = variables(stage, PS1="prompt> ", HISTFILE="/dev/null", TERM="dumb")
    shell = ["bash", "--norc", "--noprofile", "-i"]
    _, screen = await asyncio.to_thread(in_a_terminal, shell, env, typed)
    assert b"still-4" in screen, screen


async def test_the_receipt_of_a_sidecar_that_went_away_says_that_nothing_is_known(tmp_path: Path) -> None:
    receipt = tmp_path / "receipt.json"
    async with Servers() as servers:
        sidecar = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "sidecar", "run", "-c", str(servers.dir / "spanlock.yaml"), stderr=subprocess.DEVNULL
        )
        async with asyncio.timeout(20):
            while not servers.operator_socket.exists():
                await asyncio.sleep(0.01)
        process = await asyncio.create_subprocess_exec(
            *words_of("sh", "-c", "echo $SPANLOCK_WORKFLOW; read line", options=("--receipt", str(receipt))),
            env=variables(servers), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        workflow = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
        sidecar.kill()
        await sidecar.wait()
        _, err = await asyncio.wait_for(process.communicate(b"go on\n"), 30)
    assert process.returncode == 0 and b"the sidecar went away" in err
    assert json.loads(receipt.read_text()) == {
        "workflow": workflow, "reason": "unknown", "close_to_dropped_ms": None, "close_to_revoked_ms": None, "credentials": None,
        "refused": None,
    }  # fmt: skip


async def test_a_receipt_that_cannot_be_written_is_said_before_anything_runs(stage: Stage, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    words = words_of("touch", str(ran), options=("--receipt", str(tmp_path / "no" / "receipt.json")))
    status, _, err = await run(*words, env=variables(stage))
    assert status == 125 and "--receipt" in err and "No such file" in err and not ran.exists()


async def test_our_own_failures_are_125_and_say_what_to_do(tmp_path: Path) -> None:
    env: dict[str, Any] = variables(SPANLOCK_RUN_DIR=str(tmp_path))
    env.pop("SPANLOCK_SOCKET", None)
    status, _, err = await run(*words_of("true"), env=env)
    assert status == 125 and "spanlock run" in err
    status, _, err = await run(*words_of(), env=env)
    assert status == 125 and "CMD" in err
    status, _, err = await run(*words_of("true", options=("-c", str(tmp_path / "none.yaml"))), env=env)
    assert status == 125 and "none.yaml" in err
