"""`spanlock run` as a process of its own: how it ends, how it comes back, how it reloads."""

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from sidecar.cli.stage import AGENT_ID, Servers, config_of
from sidecar.wire.spanlock.v1 import admin_pb2, admin_pb2_grpc, workflows_pb2_grpc
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb

ISSUER = '{name: i, kind: token_exchange, issuer: "https://issuer.test"}'
TOOL = '- {name: t, url: "https://t.test", issuer: i, audience: t}\n'


class Daemon:
    """A real one on the embedded servers."""

    def __init__(self, servers: Servers, process: asyncio.subprocess.Process) -> None:
        self.servers = servers
        self.process = process

    async def call(self, ask: Any, operator: bool = False) -> Any:
        """One call, as an agent or as the operator."""
        socket = self.servers.operator_socket if operator else self.servers.agent_socket
        service = admin_pb2_grpc.AdminStub if operator else workflows_pb2_grpc.WorkflowsStub
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            return await ask(service(channel))

    async def open(self, **fields: Any) -> pb.OpenResponse:
        response: pb.OpenResponse = await self.call(lambda s: s.Open(pb.OpenRequest(name="test", **fields)))
        return response

    async def status(self) -> admin_pb2.StatusResponse:
        response: admin_pb2.StatusResponse = await self.call(lambda s: s.Status(admin_pb2.StatusRequest()), True)
        return response

    async def get(self, opened: pb.OpenResponse, path: str = "/v1/items") -> bytes:
        """One call by the base URL; the whole answer's head and body."""
        reverse = next(line for line in (await self.status()).listeners if line.startswith("reverse "))
        port = int(reverse.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        handle = f"x-spanlock-workflow: {opened.handle}\r\n"
        writer.write(f"GET /search{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{handle}Connection: close\r\n\r\n".encode())
        try:
            return await reader.read()
        finally:
            writer.close()

    async def ended(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """Signals it; its exit status and its log."""
        if number is not None:
            self.process.send_signal(number)
        _, log = await asyncio.wait_for(self.process.communicate(), 30)
        assert self.process.returncode is not None
        return self.process.returncode, log.decode()


async def until_ready(daemon: Daemon) -> None:
    async with asyncio.timeout(20):
        while True:
            assert daemon.process.returncode is None, "it ended"
            try:
                if (await daemon.status()).ready:
                    return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def daemon(servers: Servers) -> AsyncIterator[Daemon]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "run", "-c", str(servers.dir / "spanlock.yaml"), stderr=subprocess.PIPE
    )
    running = Daemon(servers, process)
    try:
        await until_ready(running)
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def servers() -> AsyncIterator[Servers]:
    async with Servers() as servers:
        yield servers


def audited(servers: Servers, **wanted: str) -> list[dict[str, Any]]:
    """The audit records with these values."""
    records = [json.loads(line) for line in (servers.dir / "audit.jsonl").read_text().splitlines()]
    return [r for r in records if all(r.get(key) == value for key, value in wanted.items())]


async def test_sigterm_lets_calls_end_revokes_every_lease_and_exits_0(servers: Servers) -> None:
    async with daemon(servers) as running:
        opened = await running.open()
        assert b"200 OK" in await running.get(opened)
        token = servers.search.authorized[-1].removeprefix("Bearer ")
        status, log = await running.ended(signal.SIGTERM)
    assert status == 0, log
    assert servers.issuer.revocations >= 2 and token not in log
    assert [r["reason"] for r in audited(servers, kind="workflow", event="closed")] == ["shutdown"]
    assert [r["outcome"] for r in audited(servers, kind="lease", event="revoked")] == ["confirmed"]
    assert not servers.agent_socket.exists() and not servers.operator_socket.exists()


async def test_sigterm_waits_for_a_call_in_flight_and_takes_no_new_ones(servers: Servers) -> None:
    text = servers.config_text().replace("drain_seconds: 0.2", "drain_seconds: 20")
    (servers.dir / "spanlock.yaml").write_text(text)
    async with daemon(servers) as running:
        opened = await running.open()
        gate = servers.issuer.gate = asyncio.Event()
        flying = asyncio.ensure_future(running.get(opened))
        async with asyncio.timeout(10):
            while not servers.issuer.waiting:
                await asyncio.sleep(0.01)
        running.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            while (await running.status()).not_ready_because != "shutting down":
                await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await running.open()
        assert "shutting down" in str(refused.value.details())
        gate.set()
        assert b"200 OK" in await flying, "what had begun was let end"
        assert (await running.ended())[0] == 0


async def test_sigterm_with_the_issuer_down_names_what_was_not_revoked_and_exits_1(servers: Servers) -> None:
    text = servers.config_text() + "credentials: {revoke_deadline: 1}\n"
    (servers.dir / "spanlock.yaml").write_text(text)
    async with daemon(servers) as running:
        await running.get(await running.open())
        servers.issuer.down = True
        status, log = await running.ended(signal.SIGTERM)
    assert status == 1
    (line,) = [json.loads(line) for line in log.splitlines() if '"not_revoked"' in line and '"issuer"' in line]
    assert (line["issuer"], line["tool"], line["because"]) == ("demo-issuer", "search", "issuer_unavailable")
    assert line["lease"].startswith("ls_") and 0 < line["residual_seconds"] <= 300


async def test_a_crash_closes_every_workflow_and_the_next_start_says_so(servers: Servers) -> None:
    async with daemon(servers) as running:
        opened, finished = await running.open(), await running.open()
        await running.call(lambda s: s.Close(pb.CloseRequest(workflow_id=finished.workflow.id)))
        await running.ended(signal.SIGKILL)
    async with daemon(servers) as again:
        listed = await again.call(lambda s: s.List(pb.ListRequest()))
        assert [(w.id, w.state, w.close_reason) for w in listed.workflows] == [
            (opened.workflow.id, "closed", "sidecar_restarted")
        ]
        refused = await again.get(opened)
        assert b"407" in refused.split(b"\r\n")[0] and b"handle_invalid" in refused
        report = await again.call(lambda s: s.Close(pb.CloseRequest(workflow_id=opened.workflow.id)))
        assert report.reason == "sidecar_restarted"
        await again.ended(signal.SIGTERM)
    assert [r["workflow"] for r in audited(servers, kind="workflow", reason="sidecar_restarted")] == [
        opened.workflow.id
    ]
    async with daemon(servers) as third:
        assert not (await third.call(lambda s: s.List(pb.ListRequest()))).workflows, "said once"


async def test_a_second_sidecar_on_the_same_run_dir_is_refused_and_the_first_does_not_notice(servers: Servers) -> None:
    sockets, roll = (
        (servers.agent_socket, servers.operator_socket),
        servers.operator_socket.with_name("workflows.jsonl"),
    )
    config = servers.dir / "other.yaml"
    config.write_text(servers.config_text().replace("name: demo,", "name: another,"))
    async with daemon(servers) as running:
        opened = await running.open()
        before = [path.stat().st_ino for path in sockets], roll.stat().st_ino, roll.read_bytes()
        for file in (config, servers.dir / "spanlock.yaml"):
            words = [sys.executable, "-m", "sidecar", "run", "-c", str(file)]
            second = await asyncio.create_subprocess_exec(*words, stderr=subprocess.PIPE)
            _, err = await asyncio.wait_for(second.communicate(), 30)
            said = [line for line in err.decode().splitlines() if not line.startswith("{")]
            assert second.returncode == 2 and len(said) == 1, err.decode()
            assert said[0].startswith("spanlock: run_dir: another sidecar answers on ") and "another run_dir" in said[0]
        assert ([path.stat().st_ino for path in sockets], roll.stat().st_ino, roll.read_bytes()) == before
        assert not (servers.dir / "run/agents/another").exists(), "it asked every socket before it made one"
        assert b"200 OK" in await running.get(opened)
        assert (await running.ended(signal.SIGTERM))[0] == 0
    assert not any(path.exists() for path in sockets)


async def test_sighup_takes_a_good_change_and_refuses_a_bad_one_whole(servers: Servers) -> None:
    policy, config = servers.dir / "policy.cedar", servers.dir / "spanlock.yaml"
    good = policy.read_text()
    async with daemon(servers) as running:
        opened, epoch = await running.open(), (await running.status()).policy_epoch
        assert b"200 OK" in await running.get(opened)
        policy.write_text('@id("open") permit(principal, action == Spanlock::Action::"workflow.open", resource);\n')
        running.process.send_signal(signal.SIGHUP)
        async with asyncio.timeout(10):
            while (await running.status()).policy_epoch == epoch:
                await asyncio.sleep(0.01)
        assert b"policy_denied" in await running.get(opened), "the next call is decided by the new policy"
        policy.write_text("permit(nonsense")
        config.write_text(servers.config_text().replace("max_age", "max_rage"))
        refused = await running.call(lambda s: s.Reload(admin_pb2.ReloadRequest()), True)
        assert not refused.applied and refused.errors
        assert b"policy_denied" in await running.get(opened), "the last good one goes on"
        policy.write_text(good)
        applied = await running.call(lambda s: s.Reload(admin_pb2.ReloadRequest()), True)
        assert applied.applied and not applied.needs_restart
        assert b"200 OK" in await running.get(opened)


async def test_reload_closes_the_workflows_of_an_agent_that_is_gone(servers: Servers) -> None:
    config = servers.dir / "spanlock.yaml"
    both = servers.config_text().replace(
        "agents: [", 'agents: [{name: other, spiffe_id: "spiffe://demo.spanlock.test/other", uid: 12345}, '
    )
    async with daemon(servers) as running:
        opened = await running.open()
        config.write_text(both.replace("{name: demo,", "{name: renamed,"))
        applied = await running.call(lambda s: s.Reload(admin_pb2.ReloadRequest()), True)
        assert applied.applied and "agents (sockets)" in applied.needs_restart
        report = await running.call(lambda s: s.Close(pb.CloseRequest(workflow_id=opened.workflow.id)))
        assert report.reason == "agent_removed"


def test_it_cannot_be_traced_and_dumps_no_core(tmp_path: Path) -> None:
    """Of the command itself, at the moment when it begins to serve: only the process can say it, where everybody is root."""
    config = tmp_path / "spanlock.yaml"
    config.write_text(config_of(tmp_path, spire=tmp_path / "s", agent=AGENT_ID, issuer=ISSUER) + TOOL)
    (tmp_path / "policy.cedar").write_text("permit(principal, action, resource);")
    script = (
        "import ctypes, resource, sys\nfrom sidecar.cli import run\nfrom sidecar.__main__ import main\n"
        "async def serve(settings, path):\n"
        "    print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE))\n"  # PR_GET_DUMPABLE
        "    return 0\n"
        "run._serve = serve\nmain()"
    )
    words = [sys.executable, "-c", script, "run", "-c", str(config)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "0 (0, 0)\n"), done.stderr
