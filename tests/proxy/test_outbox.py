"""What a step writes leaves together, at its end, in order; an abort takes it back."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from sidecar.proxy.outbox import Outbox, Sender


class Plain(Sender):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None


@asynccontextmanager
async def pair(outbox: Outbox) -> AsyncIterator[tuple[Plain, socket.socket]]:
    """A sender on one end of a real socket, the bare other end."""
    here, there = socket.socketpair()
    there.setblocking(False)
    _, sender = await asyncio.get_running_loop().create_unix_connection(lambda: Plain(outbox), sock=here)
    try:
        yield sender, there
    finally:
        sender.abort()
        there.close()


def arrived(there: socket.socket) -> bytes | None:
    try:
        return there.recv(65536)
    except BlockingIOError:
        return None


async def test_the_writes_of_one_step_leave_together_and_in_order() -> None:
    outbox = Outbox()
    async with pair(outbox) as (one, far_one), pair(outbox) as (two, far_two):
        one.write(b"a")
        two.write(b"x")
        one.write(b"b")
        assert arrived(far_one) is None and one.unsent
        await asyncio.sleep(0)
        assert (arrived(far_one), arrived(far_two)) == (b"ab", b"x")
        one.write(b"c")
        await asyncio.sleep(0)
        assert arrived(far_one) == b"c"


async def test_bulk_leaves_at_once_so_that_the_transport_can_say_that_it_is_full() -> None:
    outbox = Outbox()
    async with pair(outbox) as (one, far):
        one.write(b"head")
        one.write(b"x" * 20_000)
        assert not one.unsent and len(arrived(far) or b"") == 20_004
        for _ in range(64):
            one.write(b"y")
        assert not one.unsent and arrived(far) == b"y" * 64


async def test_abort_takes_back_what_has_not_left() -> None:
    outbox = Outbox()
    async with pair(outbox) as (one, far_one), pair(outbox) as (two, far_two):
        one.write(b"secret")
        two.write(b"x")
        one.abort()
        await asyncio.sleep(0)
        assert arrived(far_one) in (None, b""), "nothing, or the end"
        assert arrived(far_two) == b"x"


async def test_close_sends_the_rest_first() -> None:
    async with pair(Outbox()) as (one, far):
        one.write(b"last words")
        one.close()
        assert arrived(far) == b"last words"
        one.write(b"nobody hears")
        await asyncio.sleep(0)
        assert arrived(far) == b"" and not one.unsent


async def test_a_write_while_the_step_is_flushed_goes_out_with_the_next() -> None:
    outbox = Outbox()
    async with pair(outbox) as (one, far):

        class Writing(Plain):
            def flush(self) -> None:
                one.write(b"again")

        outbox.add(Writing(outbox))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert arrived(far) == b"again"


async def test_one_connection_that_cannot_be_written_does_not_hold_up_the_others() -> None:
    class Broken(Plain):
        aborted = False

        def flush(self) -> None:
            raise RuntimeError("the handle is closed")

        def abort(self) -> None:
            self.aborted = True

    outbox, told = Outbox(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["message"]))
    async with pair(outbox) as (one, far):
        broken = Broken(outbox)
        outbox.add(broken)
        one.write(b"goes out")
        await asyncio.sleep(0)
        assert arrived(far) == b"goes out" and broken.aborted and told == ["a connection could not be written"]
