"""Mutated requests to every door of the data plane: each is answered or ended, no bug shows, nothing goes where it must not."""

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httptools
import pytest

from sidecar.cli.stage import Stage
from tests.stage import opened, port_of, ready_stage, tunnel

SEEDS = (
    b"GET /search/v1/items HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: @\r\n\r\n",
    b"POST /search/x?a=b HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: @\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /search/x HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: @\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n0\r\n\r\n",
    b"POST /search/x HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: @\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"PUT /reports/x HTTP/1.1\r\nHost: localhost\r\nProxy-Authorization: Bearer @\r\nExpect: 100-continue\r\n"
    b"Content-Length: 3\r\n\r\nabc",
    b"CONNECT search.tool.test:443 HTTP/1.1\r\nHost: search.tool.test:443\r\n\r\n",
    b"GET http://search.tool.test/ HTTP/1.1\r\nHost: search.tool.test\r\n\r\n",
    b"GET /search/v1/items HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: @\r\n\r\n" * 3,
)
INSERTED = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"Host: evil.test\r\n", b"Content-Length: 4\r\n", b"Connection: close\r\n",
    b"Transfer-Encoding: chunked\r\n", b"%2f", b"..", b"//", b"0\r\n\r\n", b"\xff", b"Expect: 100-continue\r\n", b"A" * 70_000,
    b"Connection: authorization, host\r\n", b"Authorization: Bearer slh_00\r\n", b"Upgrade: h2c\r\n", b"traceparent: 00-1-2-3\r\n",
)  # fmt: skip
TAIL = b"\0" * 80_000
"""Ends whatever is still open: it is more than a head may have, no chunk's size, and fills up the rest of a short body."""
BOUND = 30.0
"""Seconds after which a missing answer is a hang. Nothing waits for it in a run that passes."""


def mutated(chance: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(chance.randrange(5)):
        at = chance.randrange(len(out) + 1)
        kind = chance.randrange(4)
        if kind == 0:
            out[at:at] = chance.choice(INSERTED)
        elif kind == 1:
            del out[at : at + chance.randrange(1, 8)]
        elif kind == 2 and at < len(out):
            out[at] = chance.randrange(256)
        else:
            out[at:at] = out[max(0, at - 20) : at]
    return bytes(out)


@dataclass
class Messages:
    """What another parser than ours makes of some bytes: how many whole messages, and whether another has begun."""

    whole: int = 0
    begun: bool = False
    method: bytes = b""
    finals: list[int] = field(default_factory=list)

    def on_message_begin(self) -> None:
        self.begun = True

    def on_message_complete(self) -> None:
        self.whole, self.begun = self.whole + 1, False


def answers_due(data: bytes) -> int:
    """How many answers must come though nothing more is sent: one for each whole request, where all of it is whole."""
    seen = Messages()
    try:
        httptools.HttpRequestParser(seen).feed_data(data)
    except httptools.HttpParserUpgrade:
        return 1
    except httptools.HttpParserError:
        return 0  # and an end, sooner or later
    return 0 if seen.begun else seen.whole


class Answers:
    """Reads answers off a connection, whole ones only; interim ones do not count."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self.reader = reader
        self.raw = b""
        self.ended = False
        self.finals = 0
        self.tunnel = False
        self._status = 0
        self._parser = httptools.HttpResponseParser(self)

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_message_complete(self) -> None:
        self.finals += self._status >= 200

    async def read(self, count: float) -> None:
        """Until `count` have come, or a tunnel, or the end. Raises `TimeoutError` at the bound: that is a hang."""
        async with asyncio.timeout(BOUND):
            while self.finals < count and not self.ended and not self.tunnel:
                try:
                    data = await self.reader.read(65536)
                except (OSError, RuntimeError):
                    data = b""
                self.ended = not data
                self.raw += data
                self.tunnel = self.raw.startswith(b"HTTP/1.1 200 Connection established")
                if data and not self.tunnel:
                    self._parser.feed_data(data)  # what we answer is HTTP to anybody


@asynccontextmanager
async def door(
    stage: Stage, port: int, inside: bool
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    if inside:
        async with tunnel(stage, port, stage.search) as streams:
            yield streams
        return
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def written(writer: asyncio.StreamWriter, data: bytes, step: int) -> None:
    for at in range(0, len(data), step):
        with contextlib.suppress(OSError, RuntimeError):  # ended by the other side: then there is something to read
            writer.write(data[at : at + step])
            await asyncio.sleep(0)


async def sent(stage: Stage, data: bytes, port: int, step: int, inside: bool, rude: bool) -> bytes:
    """Sends it in steps; takes what is due, then ends what is still open. All that came back."""
    if inside:
        host = f"{stage.search.host}:{stage.search.port}".encode()
        data = data.replace(b"127.0.0.1", host).replace(b"/search/", b"/")
    async with door(stage, port, inside) as (reader, writer):
        answers = Answers(reader)
        await written(writer, data, step)
        if rude:
            writer.transport.abort()
            return b""
        try:
            await answers.read(answers_due(data))
            if not wants_more_than_the_tail(data):
                await written(writer, TAIL, len(TAIL))
                answers.tunnel = False
                await answers.read(float("inf"))
        except TimeoutError:
            raise AssertionError(
                f"neither an answer nor an end for {data!r} in steps of {step}: {answers.raw!r}"
            ) from None
        return answers.raw


def wants_more_than_the_tail(data: bytes) -> bool:
    """A length that a mutation has made large: the rest of such a body may be waited for as long as the agent likes."""
    lengths = [int(n) for n in re.findall(rb"(?i)content-length:\s*(\d+)", data)]
    chunks = [int(n, 16) for n in re.findall(rb"\n([0-9a-fA-F]+)\r\n", data)]
    return max(lengths + chunks, default=0) >= len(TAIL) // 2


@pytest.mark.parametrize("seed", range(3))
async def test_nothing_that_is_sent_hangs_shows_a_bug_or_leaks(seed: int) -> None:
    chance = random.Random(seed)
    async with ready_stage() as stage:
        workflow, own = await opened(stage), await opened(stage, listener=True)
        bugs: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: bugs.append(context))
        resolved: list[str] = []

        async def resolve(host: str, port: int) -> list[str]:
            resolved.append(host)
            return []

        stage.app.pool._resolve = resolve
        doors = [port_of(address) for address in (*stage.app.addresses.values(), own.proxy_url)]
        back: list[bytes] = []
        for _ in range(15):
            batch = []
            for _ in range(20):
                data = mutated(chance, chance.choice(SEEDS)).replace(b"@", workflow.handle.encode())
                step = 1 << 20 if len(data) > 3000 else chance.choice([1, 7, 100, 1 << 20])
                inside = chance.random() < 0.2
                port = doors[-1] if inside else chance.choice(doors)
                batch.append(sent(stage, data, port, step, inside, chance.random() < 0.2))
            back += await asyncio.gather(*batch)
        noun = stage.app.registry.get(workflow.workflow.id)
        async with asyncio.timeout(BOUND):
            while stage.app.listeners.connections or noun.flows:
                await asyncio.sleep(0.01)
        assert not bugs and not resolved
        seen = [(tool, headers) for tool in (stage.search, stage.reports) for headers in tool.headers]
        assert seen and any(answer.startswith(b"HTTP/1.1 200") for answer in back), "some went through"
        for tool, headers in seen:
            assert headers["Host"].split(":")[0] == tool.host and "x-spanlock-workflow" not in headers
            token = headers["Authorization"].removeprefix("Bearer ")
            assert stage.issuer.claims_of(token)["aud"] == [f"tool-{tool.host.partition('.')[0]}"]
            assert not any(token.encode() in answer for answer in back)
