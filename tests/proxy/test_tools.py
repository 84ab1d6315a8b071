"""Tools that misbehave, in plain bytes: each way to break HTTP has its reason, and the agent gets no half-truth."""

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from sidecar.cli.stage import Stage
from tests.stage import call, opened, ready_stage, reason_of

TOOL = """\
- {{{{name: raw, url: "http://127.0.0.1:{port}", issuer: demo-issuer, audience: tool-search, scopes: ["search:read"], methods: [GET, POST], allow_networks: [127.0.0.0/8]}}}}
"""
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

ask = functools.partial(call, path="/raw/x")


class RawTool:
    """Answers each request with `says`, in pieces, and closes after the last piece when `closes`."""

    def __init__(self) -> None:
        self.says: list[bytes] = [OK]
        self.closes = False
        self.requests: list[bytes] = []

    async def start(self) -> int:
        self.server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        return int(self.server.sockets[0].getsockname()[1])

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                for piece in self.says:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
                if self.closes:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def raw_tool() -> AsyncIterator[tuple[Stage, RawTool, str]]:
    tool = RawTool()
    port = await tool.start()
    try:
        async with ready_stage(more=TOOL.format(port=port), policy_for=("raw",)) as stage:
            yield stage, tool, (await opened(stage)).handle
    finally:
        tool.server.close()


BROKEN = {
    "no_http": [b"SSH-2.0-OpenSSH_9.2\r\n\r\n"],
    "switches_protocols": [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"],
    "head_without_end": [b"HTTP/1.1 200 OK\r\n" + b"X-Pad: " + b"y" * 70_000],
    "a_flood_of_interim_answers": [b"HTTP/1.1 103 Early Hints\r\n\r\n" * 17 + OK],
    "too_many_fields": [b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 129 + b"\r\n"],
    "no_clear_length": [b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"],
}


@pytest.mark.parametrize("name", BROKEN)
async def test_a_broken_head_is_502_with_its_reason(name: str) -> None:
    async with raw_tool() as (stage, tool, handle):
        tool.says = BROKEN[name]
        answer = await ask(stage, handle)
        assert answer.startswith(b"HTTP/1.1 502") and reason_of(answer) == "upstream_malformed", answer
        tool.says = [OK]
        assert (await ask(stage, handle)).endswith(b"\r\n\r\nok"), "and the next call is served"


@pytest.mark.parametrize(
    "pieces", [[b"zz\r\n"], [b"3\r\nabcd\r\n"], [b"1;ext=1\r\na\r\n"], [b"1" * 18], [b"0\r\nTrailer: x\r\n\r\n"]]
)
async def test_a_broken_body_ends_the_answer_unfinished(pieces: list[bytes]) -> None:
    """The head has gone out, so the only honest word left is an end without the last chunk."""
    async with raw_tool() as (stage, tool, handle):
        tool.says = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n", *pieces]
        answer = await ask(stage, handle)
        assert b"0\r\n\r\n" not in answer
        async with asyncio.timeout(5):
            while not stage.app.plane.denials:
                await asyncio.sleep(0)
        assert stage.app.plane.denials[-1].outcome == "upstream_malformed"


async def test_interim_answers_stay_here_and_the_final_one_is_passed_on() -> None:
    async with raw_tool() as (stage, tool, handle):
        tool.says = [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", OK]
        answer = await ask(stage, handle)
        assert answer.startswith(b"HTTP/1.1 200 OK") and b"link" not in answer and answer.endswith(b"ok")


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    async with raw_tool() as (stage, tool, handle):
        tool.closes = True
        tool.says = [b"HTTP/1.0 200 OK\r\n\r\n", b"to the ", b"end"]
        answer = await ask(stage, handle)
        assert b"transfer-encoding: chunked" in answer and answer.endswith(b"0\r\n\r\n")
        assert b"to the " in answer and b"end" in answer


async def test_a_connection_that_says_more_than_it_was_asked_is_used_no_more() -> None:
    """D5: bytes after an answer's end belong to nobody, whether they come with it or later."""
    async with raw_tool() as (stage, tool, handle):
        for says in ([OK + b"HTTP/1.1 200 OK\r\n"], [OK, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"]):
            tool.says = says
            assert (await ask(stage, handle)).endswith(b"\r\n\r\nok")
            tool.says = [OK]
            assert (await ask(stage, handle)).endswith(b"\r\n\r\nok"), "never an answer to another question"


async def test_d7_a_method_that_the_tool_does_not_take_is_refused_here() -> None:
    async with raw_tool() as (stage, tool, handle):
        for method in ("DELETE", "TRACE", "PUT"):
            assert reason_of(await ask(stage, handle, method=method)) == "method_refused"
        assert not tool.requests
