"""What most tests need: the embedded stage, a workflow on it, and raw bytes to a proxy port."""

import asyncio
import os
import random
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import grpc.aio
import httpx

from sidecar.app import App, World
from sidecar.cli.stage import Stage
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from sidecar.wire.spanlock.v1 import workflows_pb2_grpc
from tests.fakes.clock import FakeClock


class Staged(Protocol):
    """A sidecar that runs in this process, with whichever servers behind it."""

    app: App

    @property
    def agent_socket(self) -> Path: ...

    @property
    def operator_socket(self) -> Path: ...


OTHER_ID = "spiffe://demo.spanlock.test/other"


class TwoAgents(Stage):
    """Two declared agents that may use every tool: `demo`, and `other`, which runs as `uid` (by default as the same one)."""

    def __init__(self, uid: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._uid = os.getuid() if uid is None else uid
        self.spire.entries.append(OTHER_ID)

    def config_text(self) -> str:
        agents = f'agents: [{{name: other, spiffe_id: "{OTHER_ID}", uid: {self._uid}}}, '
        return super().config_text().replace("agents: [", agents)

    def write_files(self) -> None:
        super().write_files()
        policy = self.dir / "policy.cedar"
        policy.write_text(policy.read_text() + 'permit(principal == Spanlock::Agent::"other", action, resource);\n')

    @property
    def other_socket(self) -> Path:
        return self.dir / "run/agents/other/agent.sock"


@asynccontextmanager
async def two_agents(uid: int | None = None, **options: Any) -> AsyncIterator[TwoAgents]:
    async with TwoAgents(uid, **options) as stage:
        assert await stage.app.svids.wait_ready(10)
        yield stage


@asynccontextmanager
async def ready_stage(**options: Any) -> AsyncIterator[Stage]:
    async with Stage(**options) as stage:
        assert await stage.app.svids.wait_ready(10)
        yield stage


@asynccontextmanager
async def timed_stage(**options: Any) -> AsyncIterator[tuple[Stage, FakeClock]]:
    """A stage whose clock is turned by hand; it is turned on while the sidecar stops."""
    clock = FakeClock(now=time.time())  # certificates and tokens of the servers are real
    entered = ready_stage(around=World(clock, random.Random(1)), **options)
    stage = await entered.__aenter__()
    try:
        yield stage, clock
    finally:
        stopping = asyncio.ensure_future(entered.__aexit__(None, None, None))
        while not stopping.done():
            await clock.advance(1)
        await stopping


@asynccontextmanager
async def stub(
    stage: Staged, service: Any = workflows_pb2_grpc.WorkflowsStub, operator: bool = False, socket: Path | None = None
) -> AsyncIterator[Any]:
    """A service of the agent's own socket, unless another is named."""
    socket = socket or (stage.operator_socket if operator else stage.agent_socket)
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        yield service(channel)


async def opened(stage: Staged, **fields: Any) -> pb.OpenResponse:
    async with stub(stage) as workflows:
        response: pb.OpenResponse = await workflows.Open(pb.OpenRequest(name="test", **fields))
        return response


async def closed(stage: Staged, workflow_id: str) -> pb.CloseResponse:
    async with stub(stage) as workflows:
        response: pb.CloseResponse = await workflows.Close(pb.CloseRequest(workflow_id=workflow_id))
        return response


def client(stage: Staged, proxy: str, **options: Any) -> httpx.AsyncClient:
    """A real HTTP client that trusts the sidecar's CA only."""
    context = ssl.create_default_context(cadata=stage.app.plane.ca.pem)
    return httpx.AsyncClient(proxy=proxy, verify=context, trust_env=False, timeout=10, **options)


def url(tool: Any, path: str = "/v1/items") -> str:
    return f"https://{tool.host}:{tool.port}{path}"


def port_of(address: str) -> int:
    return int(address.rstrip("/").rpartition(":")[2])


async def call(
    stage: Staged, handle: str, *, path: str = "/search/v1/items", method: str = "GET", body: bytes = b""
) -> bytes:
    """One request by the base URL on a connection of its own; whatever comes back, and nothing where it is broken off."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: {handle}\r\nConnection: close\r\n"
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    try:
        return await raw(port_of(stage.app.addresses["reverse"]), f"{head}{length}\r\n".encode() + body)
    except ConnectionError:
        return b""


async def raw(port: int, request: bytes) -> bytes:
    """Sends bytes and reads to the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


@asynccontextmanager
async def tunnel(
    stage: Staged, port: int, tool: Any, sni: str | None = None, handle: str = ""
) -> AsyncIterator[tuple[Any, Any]]:
    """CONNECT to `tool`, with a workflow's `handle` if there is one, then TLS with `sni` as the server name (an address: none)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        target = f"{tool.host}:{tool.port}"
        proof = f"Proxy-Authorization: Bearer {handle}\r\n" if handle else ""
        writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{proof}\r\n".encode())
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        context = ssl.create_default_context(cadata=stage.app.plane.ca.pem)
        context.check_hostname = False
        await writer.start_tls(context, server_hostname=sni or tool.host)
        yield reader, writer
    finally:
        writer.close()


def reason_of(answer: bytes) -> str:
    for line in answer.split(b"\r\n"):
        if line.lower().startswith(b"x-spanlock-reason:"):
            return line.split(b":")[1].strip().decode()
    return ""
