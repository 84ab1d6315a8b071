"""Floods at the OTLP doors: a stranger gets no byte in, and what one agent floods is its own."""

import asyncio
import gc
import os
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import grpc.aio
import pytest

from sidecar.app import App
from sidecar.cli.stage import Stage
from sidecar.model.caller import Caller
from sidecar.triggers import otlp, turns
from sidecar.triggers.grpc_door import CONNECTIONS
from tests.stage import opened
from tests.triggers.test_otlp import TRACE, export

AGENT, OTHER, STRANGER = "127.0.0.1", "127.0.0.2", "127.0.0.3"
OTHER_UID, STRANGER_UID = os.getuid() + 1, os.getuid() + 2
_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


class Callers:
    """Who calls: by the address it comes from, since a test has one uid. gRPC's clients cannot choose theirs."""

    def __init__(self) -> None:
        self.uids = {AGENT: os.getuid(), OTHER: OTHER_UID, STRANGER: STRANGER_UID}

    def find(self, app: App, local: tuple[str, int], peer: tuple[str, int]) -> Caller:
        return app.callers.by_uid(self.uids[peer[0]])


class TwoUids(Stage):
    """Two declared agents of different uids."""

    def config_text(self) -> str:
        agents = f'agents: [{{name: other, spiffe_id: "spiffe://demo.spanlock.test/other", uid: {OTHER_UID}}}, '
        return super().config_text().replace("agents: [", agents)


@pytest.fixture
def callers(monkeypatch: pytest.MonkeyPatch) -> Callers:
    callers = Callers()
    monkeypatch.setattr(App, "find_caller", lambda app, local, peer: callers.find(app, local, peer))
    return callers


@pytest.fixture
async def stage(callers: Callers) -> AsyncIterator[Stage]:
    async with TwoUids() as stage:
        async with asyncio.timeout(10):
            while stage.app.svids.problem("demo"):
                await asyncio.sleep(0)
        yield stage


@asynccontextmanager
async def begun(
    stage: Stage, source: str, path: str = "/v1/traces", body: bytes = b"x"
) -> AsyncIterator[asyncio.StreamReader]:
    """An export over HTTP that has sent its head and the beginning of its body."""
    port = stage.app.otlp.http_port
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
    try:
        writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\ncontent-type: application/x-protobuf\r\n".encode())
        writer.write(b"content-length: 4000000\r\n\r\n" + body)
        yield reader
    finally:
        writer.close()


async def answer(reader: asyncio.StreamReader) -> bytes:
    """All that comes, to the end of the connection."""
    return await asyncio.wait_for(reader.read(), 10)


async def post(stage: Stage, source: str) -> int:
    connector = aiohttp.TCPConnector(local_addr=(source, 0))
    url = f"http://127.0.0.1:{stage.app.otlp.http_port}/v1/traces"
    headers = {"content-type": "application/x-protobuf"}
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(10)) as session:
        async with session.post(url, data=export().SerializeToString(), headers=headers) as response:
            return response.status


@asynccontextmanager
async def channel(stage: Stage) -> AsyncIterator[grpc.aio.Channel]:
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{stage.app.otlp.grpc_port}", options=options) as channel:
        yield channel


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0)


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/metrics", "/v1/logs"])
async def test_a_stranger_is_refused_before_its_body_is_read(stage: Stage, path: str) -> None:
    async with begun(stage, STRANGER, path) as reader:
        refused = await answer(reader)
    assert refused.startswith(b"HTTP/1.1 403 ") and b"unknown_caller" in refused


async def test_a_strangers_flood_puts_no_agent_out(stage: Stage) -> None:
    workflow = await opened(stage, trace_id=TRACE)
    connector = aiohttp.TCPConnector(local_addr=(AGENT, 0))
    url = f"http://127.0.0.1:{stage.app.otlp.http_port}/v1/metrics"
    headers = {"content-type": "application/x-protobuf"}
    async with aiohttp.ClientSession(connector=connector) as session, AsyncExitStack() as held:
        for number in range(300):
            if number == 1:  # the agent's connection is among the oldest
                assert (await session.post(url, data=b"", headers=headers)).status == 200
                kept = next(iter(connector._conns.values()))[0][0]
            await held.enter_async_context(begun(stage, STRANGER))
        assert kept.is_connected(), "nobody's flood but its own ends an agent's connection"
        assert (await session.post(url, data=b"", headers=headers)).status == 200
    assert await post(stage, AGENT) == 200
    assert stage.app.registry.find(workflow.workflow.id).close_reason == "span_ended"  # type: ignore[union-attr]


async def test_a_strangers_grpc_connection_is_ended_at_once_and_told_why(stage: Stage, callers: Callers) -> None:
    callers.uids[AGENT] = STRANGER_UID
    async with channel(stage) as stranger:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stranger.unary_unary(_EXPORT)(b"", timeout=10)  # type: ignore[call-arg]
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "403" in (refused.value.details() or "")
    reader, writer = await asyncio.open_connection("127.0.0.1", stage.app.otlp.grpc_port, local_addr=(STRANGER, 0))
    assert b"unknown_caller" in await answer(reader)
    writer.close()


async def test_a_body_that_does_not_come_is_not_waited_for(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "BODY_SECONDS", 0.05)
    for path in ("/v1/traces", "/v1/metrics", "/v1/logs"):
        async with begun(stage, AGENT, path) as reader:
            late = await answer(reader)
        assert late.startswith(b"HTTP/1.1 408 ") and b"request_timeout" in late
    async with channel(stage) as agent:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agent.stream_unary(_EXPORT)()  # type: ignore[call-arg]  # says nothing
    assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "request_timeout" in (refused.value.details() or "")


async def test_one_agents_bodies_over_http_hold_up_only_its_own(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "WAITING", 3)
    workflow = await opened(stage, trace_id=TRACE)
    async with AsyncExitStack() as held:
        for _ in range(turns.AT_ONCE + 3):
            await held.enter_async_context(begun(stage, OTHER))
        line = stage.app.otlp._turns._lines
        await until(lambda: OTHER_UID in line and line[OTHER_UID].waiting == 3)
        assert await post(stage, OTHER) == 429
        assert await post(stage, AGENT) == 200
    assert stage.app.registry.find(workflow.workflow.id).close_reason == "span_ended"  # type: ignore[union-attr]
    assert await post(stage, OTHER) == 200, "when they have ended, the next has its turn"


async def test_one_agents_silent_grpc_exports_hold_up_only_its_own(stage: Stage, callers: Callers) -> None:
    workflow = await opened(stage, trace_id=TRACE)
    async with AsyncExitStack() as held:
        callers.uids[AGENT] = OTHER_UID
        channels = [await held.enter_async_context(channel(stage)) for _ in range(8)]
        calls: list[Any] = []
        for flooding in channels:
            calls += [flooding.stream_unary(_EXPORT)() for _ in range(32)]  # type: ignore[call-arg]
        first = next(iter(asyncio.as_completed([call.code() for call in calls], timeout=10)))
        assert await first is grpc.StatusCode.RESOURCE_EXHAUSTED
        callers.uids[AGENT] = os.getuid()
        agent = await held.enter_async_context(channel(stage))
        await agent.unary_unary(_EXPORT)(export().SerializeToString(), timeout=10)  # type: ignore[call-arg]
        for call in calls:
            call.cancel()
    assert stage.app.registry.find(workflow.workflow.id).close_reason == "span_ended"  # type: ignore[union-attr]


async def test_one_agents_grpc_connections_put_out_its_own_only(stage: Stage) -> None:
    port = stage.app.otlp.grpc_port
    kept_reader, kept = await asyncio.open_connection("127.0.0.1", port, local_addr=(AGENT, 0))
    others = [await asyncio.open_connection("127.0.0.1", port, local_addr=(OTHER, 0)) for _ in range(CONNECTIONS + 2)]
    assert await asyncio.wait_for(kept_reader.readexactly(9), 10), "its server greets it"
    connected = stage.app.otlp._grpc._connected  # type: ignore[union-attr]
    await until(
        lambda: OTHER_UID in connected and others[-1][1].get_extra_info("sockname") == _peer(connected[OTHER_UID][-1])
    )
    assert len(connected[OTHER_UID]) <= CONNECTIONS
    assert _peer(connected[OTHER_UID][0]) not in [writer.get_extra_info("sockname") for _, writer in others[:2]]
    assert [_peer(writer) for writer in connected[os.getuid()]] == [kept.get_extra_info("sockname")]
    for _, writer in [*others, (kept_reader, kept)]:
        writer.close()


def _peer(writer: asyncio.StreamWriter) -> Any:
    return writer.get_extra_info("peername")


async def test_bodies_that_break_off_are_let_go_at_once(stage: Stage) -> None:
    """Without waiting for a collection: it is long in coming where little is made."""
    assert await post(stage, AGENT) == 200
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(10):
            async with begun(stage, AGENT, body=bytes(1_000_000)):
                await until(lambda: tracemalloc.get_traced_memory()[0] > 1_000_000)
            await until(lambda: not stage.app.otlp._site._runner.server.connections)  # type: ignore[union-attr]
        await until(lambda: tracemalloc.get_traced_memory()[0] < 1_500_000)
    finally:
        tracemalloc.stop()
        gc.enable()
