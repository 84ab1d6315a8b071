"""A side that does not read holds the other side up, not our memory; nothing is lost when it goes on."""

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from sidecar.cli.stage import Stage
from sidecar.model.tool import Authority, Tool
from sidecar.proxy.downstream import Connection
from sidecar.proxy.http1 import Fields, parse_response
from sidecar.proxy.outbox import Outbox, Sender
from sidecar.proxy.upstream import Upstream, withheld
from tests.proxy.test_tools import TOOL
from tests.stage import opened, port_of, ready_stage

SIZE = 64 << 20
"""Far more than all socket buffers on the way take."""
HERE = 1 << 20
"""Bytes that may wait in the sidecar: the transport's limit, and one read beyond it."""
BLOCK = bytes(range(256)) * 256
WHOLE = hashlib.sha256(BLOCK * (SIZE // len(BLOCK))).digest()


class Streaming:
    """A tool that sends SIZE bytes, or takes as many, at the other side's pace; `gate` holds its reading back."""

    def __init__(self) -> None:
        self.sent = 0
        self.asked = False
        self.taken = hashlib.sha256()
        self.gate = asyncio.Event()

    async def start(self) -> int:
        self.server = await asyncio.start_server(self._talk, "127.0.0.1", 0, limit=1 << 16)
        return int(self.server.sockets[0].getsockname()[1])

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.asked = True
            if head.startswith(b"GET"):
                await self._send(writer)
            else:
                await self._take(reader)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    async def _send(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
        while self.sent < SIZE:
            writer.write(BLOCK)
            await writer.drain()
            self.sent += len(BLOCK)

    async def _take(self, reader: asyncio.StreamReader) -> None:
        await self.gate.wait()
        left = SIZE
        while left:
            data = await reader.read(1 << 16)
            self.taken.update(data)
            left -= len(data)


@asynccontextmanager
async def streaming() -> AsyncIterator[tuple[Stage, Streaming, asyncio.StreamReader, asyncio.StreamWriter, str]]:
    tool = Streaming()
    port = await tool.start()
    try:
        async with ready_stage(more=TOOL.format(port=port), policy_for=("raw",)) as stage:
            handle = (await opened(stage)).handle
            proxy = port_of(stage.app.addresses["reverse"])
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy, limit=1 << 16)
            yield (
                stage,
                tool,
                reader,
                writer,
                f"/raw/x HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: {handle}\r\n",
            )
            writer.close()
    finally:
        tool.server.close()


async def carrying(stage: Stage, held: Callable[[Connection], bool]) -> Connection:
    """The connection that carries the call, once one of its sides is held up."""
    async with asyncio.timeout(20):
        while True:
            for connection in stage.app.listeners.connections:
                if connection.flow is not None and connection.flow.upstream is not None and held(connection):
                    return connection
            await asyncio.sleep(0.01)


def waiting(sender: Sender | None) -> int:
    """Bytes that wait here for a side that does not read."""
    assert sender is not None and sender.transport is not None
    return sender.transport.get_write_buffer_size() + sum(map(len, sender._unsent))


def tool_is_held(connection: Connection) -> bool:
    upstream = connection.flow.upstream.transport if connection.flow and connection.flow.upstream else None
    return upstream is not None and not upstream.is_reading()


async def test_an_agent_that_does_not_read_holds_the_tool_up() -> None:
    async with streaming() as (stage, tool, reader, writer, rest):
        writer.write(f"GET {rest}\r\n".encode())
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        connection = await carrying(stage, tool_is_held)
        assert waiting(connection) < HERE and tool.sent < SIZE
        digest = hashlib.sha256()
        for _ in range(SIZE // len(BLOCK)):
            digest.update(await asyncio.wait_for(reader.readexactly(len(BLOCK)), 10))
        assert digest.digest() == WHOLE


async def test_a_tool_that_does_not_read_holds_the_agent_up() -> None:
    async with streaming() as (stage, tool, reader, writer, rest):
        writer.write(f"POST {rest}Content-Length: {SIZE}\r\n\r\n".encode())

        async def upload() -> None:
            for _ in range(SIZE // len(BLOCK)):
                writer.write(BLOCK)
                await writer.drain()

        uploading = asyncio.ensure_future(upload())
        connection = await carrying(stage, lambda c: c._paused and tool.asked)
        assert connection.flow is not None
        assert waiting(connection.flow.upstream) < HERE and not uploading.done()
        tool.gate.set()
        await asyncio.wait_for(uploading, 20)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert head.startswith(b"HTTP/1.1 200") and tool.taken.digest() == WHOLE


async def test_an_agent_that_has_not_read_the_last_answer_holds_the_next_one_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A transport says once that it is full; the answer that comes after must find it out by itself."""
    async with streaming() as (stage, tool, reader, writer, rest):
        writer.write(f"GET {rest.replace('/raw/', '/search/')}\r\n".encode())
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        (connection,) = stage.app.listeners.connections
        async with asyncio.timeout(5):
            while connection.flow is not None:
                await asyncio.sleep(0)
        monkeypatch.setattr(Connection, "reply", full_at(Connection.reply))
        monkeypatch.setattr(Connection, "pause_writing", lambda _: None)
        writer.write(f"GET {rest}\r\n".encode())
        await carrying(stage, tool_is_held)
        assert waiting(connection) < HERE and tool.sent < SIZE
        connection.resume_writing()
        rest_of_it = 0
        while rest_of_it < SIZE:
            rest_of_it += len(await asyncio.wait_for(reader.read(1 << 16), 10))


def full_at(reply: Any, last: bool = False) -> Any:
    """`Connection.reply` while the agent has not taken the answer before; `last`: it has, right after this one."""

    def replying(self: Connection, *arguments: Any) -> None:
        self.choked = True
        reply(self, *arguments)
        self.choked = not last

    return replying


async def test_a_tools_connection_that_was_held_up_at_its_answers_end_serves_the_next_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Connection, "reply", full_at(Connection.reply, last=True))
    async with streaming() as (_, _, reader, writer, rest):
        for _ in range(4):
            writer.write(f"GET {rest.replace('/raw/', '/search/')}\r\n".encode())
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await asyncio.wait_for(reader.readexactly(length), 10)


class Unread:
    """A transport whose other end has not taken everything."""

    left = 5
    closed = False

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def get_extra_info(self, _: str) -> socket.socket:
        return self._sock

    def get_write_buffer_size(self) -> int:
        return self.left

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("left", "reused"), [(5, False), (0, True)])
def test_d5_a_connection_whose_request_has_not_been_taken_whole_carries_no_other(left: int, reused: bool) -> None:
    tool = Tool(name="t", scheme="http", authority=Authority("127.0.0.1", 9), issuer="i")
    with socket.socket() as sock:
        _reused_or_closed(Upstream(Outbox(), "wf", tool, "127.0.0.1"), Unread(sock), left, reused)


def _reused_or_closed(upstream: Upstream, transport: Unread, left: int, reused: bool) -> None:
    transport.left = left
    upstream.transport = transport  # type: ignore[assignment]
    upstream.response = parse_response(b"HTTP/1.1 200 OK\r\nContent-Length: 0", b"POST", Fields(withheld))
    upstream.complete = True
    assert upstream.release() is reused and transport.closed is not reused


class Answering:
    """A tool whose every answer has `size` bytes and comes whole."""

    def __init__(self, size: int) -> None:
        self.requests = 0
        self._answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size)

    async def __aenter__(self) -> "Answering":
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                self.requests += 1
                writer.write(self._answer)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.close()


async def whole_answer(reader: asyncio.StreamReader) -> bytes:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    await asyncio.wait_for(reader.readexactly(length), 10)
    return head.split(b"\r\n")[0]


async def test_an_agent_that_does_not_read_gets_no_more_answers_made() -> None:
    """Pipelined requests whose answers come whole: each would fill our memory, and none would hold the next one up."""
    many = 400
    async with Answering(60_000) as tool, ready_stage(more=TOOL.format(port=tool.port), policy_for=("raw",)) as stage:
        handle = (await opened(stage)).handle
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port_of(stage.app.addresses["reverse"]), limit=1 << 16
        )
        writer.write(f"GET /raw/x HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: {handle}\r\n\r\n".encode() * many)
        (connection,) = await until(lambda: [c for c in stage.app.listeners.connections if c.choked])
        served = tool.requests
        for _ in range(200):
            await asyncio.sleep(0)
        assert tool.requests <= served + 1 < many and waiting(connection) < HERE
        for _ in range(many):
            assert await whole_answer(reader) == b"HTTP/1.1 200 OK"
        writer.close()


@pytest.mark.parametrize("path", ["/raw/x", "/nowhere/x"], ids=["served", "refused"])
async def test_requests_that_are_sent_ahead_are_held_back_and_none_is_lost(path: str) -> None:
    async with Answering(9) as tool, ready_stage(more=TOOL.format(port=tool.port), policy_for=("raw",)) as stage:
        handle = (await opened(stage)).handle
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port_of(stage.app.addresses["reverse"]), limit=1 << 20
        )
        filler = "f" * 2000
        request = (
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: {handle}\r\nx: {filler}\r\n\r\n".encode()
        )
        many, most = 2000, 0

        async def send() -> None:
            for _ in range(many):
                writer.write(request)
                await writer.drain()

        sending = asyncio.ensure_future(send())
        for _ in range(many):
            await whole_answer(reader)
            most = max(most, *(len(connection._buffer) for connection in stage.app.listeners.connections))
        await sending
        assert 0 < most <= HERE
        writer.close()


async def until(found: Callable[[], Any]) -> Any:
    async with asyncio.timeout(20):
        while not (what := found()):
            await asyncio.sleep(0.01)
    return what
