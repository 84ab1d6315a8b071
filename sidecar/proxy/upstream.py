"""One connection to a tool, resolved, pinned and verified before the first byte is written. Carries one flow at a time."""

import asyncio
import fcntl
import socket
import struct
import termios
from array import array
from typing import Protocol, cast

from sidecar.errors import CallerError, Reason, SpanlockError, UpstreamError
from sidecar.model.tool import Tool
from sidecar.proxy.framing import Framing
from sidecar.proxy.http1 import MAX_HEAD, Fields, ResponseHead, parse_response
from sidecar.proxy.inject import OutboundRequest
from sidecar.proxy.outbox import Outbox, Sender

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, for no time: a close sends a reset instead of what is queued (socket(7))."""
_MAX_INTERIM = 16
"""Heads in one read, of which all but the last are 1xx. Precedent: Go takes 5."""
_WITHHELD = frozenset(
    (b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
     b"transfer-encoding", b"upgrade", b"alt-svc")
)  # fmt: skip
"""Of an answer's fields: what is between the tool and us, or would lead the agent past us."""


def unsent_by_kernel(descriptor: int) -> int:
    """Bytes that the other end has not acknowledged (tcp(7), SIOCOUTQ)."""
    count = array("i", [0])
    fcntl.ioctl(descriptor, termios.TIOCOUTQ, count)
    return count[0]


def withheld(name: bytes) -> bool:
    """Whether a tool's field of this lower-case name never goes to the agent. `x-spanlock-reason` is ours to say."""
    return name in _WITHHELD or name.startswith(b"x-spanlock")


class Carried(Protocol):
    """What the connection needs of the flow that it carries."""

    method: bytes

    def wake(self) -> None:
        """Something changed: the head is there, the body ended, or the connection failed."""
        ...

    def relay(self, payload: bytes) -> None:
        """A piece of the response's body. What comes in one read with the head is relayed before the `wake` for it."""
        ...

    def upstream_writable(self, writable: bool) -> None:
        """Whether the tool takes more of the request's body."""
        ...


class Upstream(Sender):
    """The protocol of one connection. The pool owns it while idle, the flow while in use; `abort` ends it at once."""

    __slots__ = (
        "_buffer", "_fields", "_framing", "_held_up", "address", "answered", "complete", "error",
        "flow", "idle_since", "response", "reused", "tool", "workflow",
    )  # fmt: skip

    def __init__(self, outbox: Outbox, workflow: str, tool: Tool, address: str) -> None:
        super().__init__(outbox)
        self.workflow = workflow
        self.tool = tool
        self.address = address
        self.flow: Carried | None = None
        self.reused = False
        self.idle_since = 0.0
        """Monotonic seconds; of no meaning while it carries a flow."""
        self._fields = Fields(withheld)
        self._buffer = b""
        self._framing: Framing | None = None
        self._held_up = False
        self.response: ResponseHead | None = None
        self.complete = False
        """The response's last byte has been relayed."""
        self.answered = False
        """Any byte of a response has come for this flow."""
        self.error: SpanlockError | None = None

    # -- asyncio.Protocol ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        flow = self.flow
        if flow is None or self.complete:
            # Bytes that answer no request: the stream is out of step and can carry nobody else (D5).
            self.abort()
            return
        self.answered = True
        try:
            if self.response is None:
                self._head(flow, self._buffer + data if self._buffer else data)
            else:
                self._body(flow, data)
                if self.complete:
                    flow.wake()
        except UpstreamError as error:
            self._fail(error)
        except CallerError:
            self._fail(UpstreamError(Reason.UPSTREAM_MALFORMED, "the tool's answer has broken chunked framing"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self.flow is None or self.complete:
            return
        if (
            self.response is not None
            and self._framing is not None
            and self._framing.kind == "until_close"
            and exc is None
        ):
            self.complete = True
            self.flow.wake()
        else:
            self._fail(UpstreamError(Reason.UPSTREAM_CLOSED, "the tool closed the connection in mid-answer"))

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        if self.flow is not None:
            self.flow.upstream_writable(False)

    def resume_writing(self) -> None:
        if self.flow is not None:
            self.flow.upstream_writable(True)

    def abort(self) -> None:
        """Closes at once. What the kernel has not sent yet is thrown away as well: it would go on sending after a close."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            sock = transport.get_extra_info("socket")
            if unsent_by_kernel(sock.fileno()):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        super().abort()

    # -- for the flow -------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def send(self, request: OutboundRequest, flow: Carried) -> None:
        """Writes the head; a cut in this same step takes it back. The caller has just checked liveness."""
        if not self.alive:
            raise UpstreamError(Reason.UPSTREAM_CLOSED, "the tool closed the connection")
        self.flow = flow
        self.response = self._framing = self.error = None
        self.complete = self.answered = False
        self.write(request.head)

    def pause(self) -> None:
        """Reads no more until `resume`, or the end of this flow's use."""
        if self.transport is not None and not self.transport.is_closing():
            self._held_up = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._held_up and self.transport is not None and not self.transport.is_closing():
            self._held_up = False
            self.transport.resume_reading()

    def release(self) -> bool:
        """Ends this flow's use. True when the connection may carry another of the same workflow and tool."""
        self.flow = None
        in_step = self.complete and not self.unsent and self.response is not None and self.response.keep_alive
        # What the tool has not taken of this request would go before the next one.
        reusable = in_step and self.alive and cast(asyncio.Transport, self.transport).get_write_buffer_size() == 0
        self.response = self._framing = None
        self._buffer = b""
        self.reused = True
        self.resume()
        if not reusable:
            self.abort()
        return reusable

    # -- inside -------------------------------------------------------------------------------------------------

    def _head(self, flow: Carried, data: bytes) -> None:
        for _ in range(_MAX_INTERIM):
            end = data.find(b"\r\n\r\n")
            if end < 0 or end > MAX_HEAD:
                if len(data) > MAX_HEAD:
                    raise UpstreamError(Reason.UPSTREAM_MALFORMED, "the head of the tool's answer is over 64 KiB")
                self._buffer = data
                return
            head, data = parse_response(data[:end], flow.method, self._fields), data[end + 4 :]
            if head.status == 101:
                raise UpstreamError(Reason.UPSTREAM_MALFORMED, "the tool switched protocols unasked")
            if head.status >= 200:
                break
        else:
            raise UpstreamError(Reason.UPSTREAM_MALFORMED, f"the tool sent {_MAX_INTERIM} interim answers at once")
        self._buffer = b""
        self.response, self._framing = head, head.framing
        self._body(flow, data)
        flow.wake()  # once for the head, its first bytes, and perhaps the end

    def _body(self, flow: Carried, data: bytes) -> None:
        framing = self._framing
        if framing is None:
            return
        payload, rest = framing.feed(data)
        if payload:
            flow.relay(payload)
        if framing.done:
            self.complete = True
            if rest and self.response is not None:
                self.response.keep_alive = False

    def _fail(self, error: SpanlockError) -> None:
        self.error = self.error or error
        flow = self.flow
        self.abort()
        if flow is not None:
            flow.wake()
