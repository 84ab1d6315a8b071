"""Pooled connections that the tool has closed meanwhile: one more try where doing it twice does no harm, else the truth."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sidecar.cli.stage import Stage
from sidecar.credentials.broker import Broker
from sidecar.model.lease import Lease
from tests.stage import call, opened, ready_stage, reason_of

TOOL = """\
- {{{{name: plain, url: "http://127.0.0.1:{port}", issuer: demo-issuer, audience: tool-search, scopes: ["search:read"], allow_networks: [127.0.0.0/8]}}}}
"""

plain = functools.partial(call, path="/plain/x")


class Dropping:
    """A tool that reads each request to its end and then answers it, or drops the connection: as told, in order."""

    def __init__(self) -> None:
        self.plan: list[str] = []
        self.requests: list[tuple[int, str]] = []
        """The connection's number and the method of each request that came whole."""
        self.connections: list[asyncio.StreamWriter] = []

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def stop(self) -> None:
        self._server.close()
        for writer in self.connections:
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            await self._serve(reader, writer)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.connections)
        self.connections.append(writer)
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if b"content-length: 4" in head:
                await reader.readexactly(4)
            self.requests.append((number, head.split(b" ")[0].decode()))
            step = self.plan.pop(0)
            if step == "half":
                writer.write(b"HTTP/1.1 200 ")
            if step != "answer":
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


@asynccontextmanager
async def dropping() -> AsyncIterator[tuple[Stage, Dropping]]:
    tool = Dropping()
    port = await tool.start()
    try:
        async with ready_stage(more=TOOL.format(port=port), policy_for=("plain",)) as stage:
            yield stage, tool
    finally:
        tool.stop()


async def test_a_stale_connection_is_tried_once_more_on_a_new_one() -> None:
    async with dropping() as (stage, tool):
        workflow = await opened(stage)
        tool.plan = ["answer", "drop", "answer"]
        assert b"200 OK" in await plain(stage, workflow.handle)
        assert b"200 OK" in await plain(stage, workflow.handle)
        assert tool.requests == [(0, "get"), (0, "get"), (1, "get")]


async def test_once_more_means_once() -> None:
    async with dropping() as (stage, tool):
        workflow = await opened(stage)
        tool.plan = ["answer", "drop", "drop"]
        await plain(stage, workflow.handle)
        assert reason_of(await plain(stage, workflow.handle)) == "upstream_closed"
        assert len(tool.requests) == 3 and not tool.plan


@pytest.mark.parametrize(("method", "body"), [("POST", b""), ("POST", b"once"), ("PUT", b"once")])
async def test_what_may_have_been_done_is_not_done_twice(method: str, body: bytes) -> None:
    """A body has left and is not kept; a POST may have had its effect."""
    async with dropping() as (stage, tool):
        workflow = await opened(stage)
        tool.plan = ["answer", "drop"]
        await plain(stage, workflow.handle)
        answer = await plain(stage, workflow.handle, method=method, body=body)
        assert answer.startswith(b"HTTP/1.1 502") and reason_of(answer) == "upstream_closed"
        assert tool.requests == [(0, "get"), (0, method.lower())]


async def test_an_answer_that_began_is_not_asked_for_again() -> None:
    async with dropping() as (stage, tool):
        workflow = await opened(stage)
        tool.plan = ["answer", "half"]
        await plain(stage, workflow.handle)
        assert reason_of(await plain(stage, workflow.handle)) == "upstream_closed"
        assert len(tool.requests) == 2


async def test_a_new_connection_that_breaks_is_no_stale_one() -> None:
    async with dropping() as (stage, tool):
        workflow = await opened(stage)
        tool.plan = ["drop"]
        assert reason_of(await plain(stage, workflow.handle)) == "upstream_closed"
        assert tool.requests == [(0, "get")]


@pytest.mark.parametrize(("method", "body"), [("GET", b""), ("POST", b"once")])
async def test_a_connection_that_goes_stale_while_the_credential_is_fetched_costs_nothing(
    method: str, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was sent on it, so any call may take another."""
    async with dropping() as (stage, tool):
        workflow = await opened(stage)
        tool.plan = ["answer", "answer"]
        await plain(stage, workflow.handle)
        (pooled,) = stage.app.plane.pool._idle[workflow.workflow.id]["plain"]
        lease = Broker.lease

        async def gone() -> None:
            while pooled.alive:
                await asyncio.sleep(0)

        async def slow(broker: Broker, *of: Any) -> Lease:
            monkeypatch.undo()
            tool.connections[0].close()
            await asyncio.ensure_future(asyncio.wait_for(gone(), 10))
            return await lease(broker, *of)

        monkeypatch.setattr(Broker, "active", lambda *_: None)  # as when another path needs other scopes
        monkeypatch.setattr(Broker, "lease", slow)
        assert b"200 OK" in await plain(stage, workflow.handle, method=method, body=body)
        assert tool.requests == [(0, "get"), (1, method.lower())]
