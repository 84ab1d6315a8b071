"""What connections write in one step of the loop leaves together at the step's end.

Writing at once costs a third more CPU for each call under load: the process at the other end goes to sleep and is woken
for each write, and the kernel's code and ours push each other out of the caches. Nothing waits for more to come: what one
step writes, it sends. Bulk goes out at once: the loop reads a socket up to 32 times in a step, and only a transport that
has the bytes can say that it is full. What has not left yet is thrown away by `abort`, so a close that comes in the same step
as a call keeps the call's credential here.
"""

import asyncio

_LARGE = 16 * 1024
"""Bytes in one write that go out at once."""
_MANY = 64
"""Writes in one step after which all go out."""


class Outbox:
    """The connections with something to send, of one loop. Owned by the plane."""

    __slots__ = ("_full",)

    def __init__(self) -> None:
        self._full: list[Sender] = []

    def add(self, sender: "Sender") -> None:
        """`sender` has something to send; it is flushed at the end of this step."""
        if not self._full:
            asyncio.get_running_loop().call_soon(self._send)
        self._full.append(sender)

    def _send(self) -> None:
        full, self._full = self._full, []
        for sender in full:
            try:
                sender.flush()
            except Exception as error:  # noqa: BLE001 - one connection's trouble must not hold up the others
                context = {"message": "a connection could not be written", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
                sender.abort()


class Sender(asyncio.Protocol):
    """Base of the two connections: their transport, and what it has not been given yet."""

    __slots__ = ("_outbox", "_unsent", "transport")

    def __init__(self, outbox: Outbox) -> None:
        self.transport: asyncio.Transport | None = None
        """None before the connection is made and after it is lost."""
        self._outbox = outbox
        self._unsent: list[bytes] = []

    @property
    def unsent(self) -> bool:
        """Something still waits for the step's end."""
        return bool(self._unsent)

    def write(self, data: bytes) -> None:
        """Sends `data` at the end of this step. Dropped when the connection is gone: whoever waits is told otherwise."""
        if self.transport is not None:
            if not self._unsent:
                self._outbox.add(self)
            self._unsent.append(data)
            if len(data) >= _LARGE or len(self._unsent) >= _MANY:
                self.flush()

    def flush(self) -> None:
        """Gives what is unsent to the transport now."""
        unsent, self._unsent = self._unsent, []
        if unsent and self.transport is not None and not self.transport.is_closing():
            self.transport.write(unsent[0] if len(unsent) == 1 else b"".join(unsent))

    def close(self) -> None:
        """Closes after what is written has gone out."""
        self.flush()
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Closes at once; what has not left is thrown away."""
        self._unsent = []
        if self.transport is not None:
            self.transport.abort()
