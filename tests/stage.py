"""What most tests need: the embedded stage, a workflow on it, and raw bytes to a proxy port."""

import asyncio
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
    stage: Staged, service: Any = workflows_pb2_grpc.WorkflowsStub, operator: bool = False
) -> AsyncIterator[Any]:
    socket = stage.operator_socket if operator else stage.agent_socket
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
async def tunnel(stage: Staged, port: int, tool: Any, sni: str | None = None) -> AsyncIterator[tuple[Any, Any]]:
    """CONNECT to `tool`, then TLS with `sni` as the server name."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        target = f"{tool.host}:{tool.port}"
        writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
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
