"""The agent's connection: strict heads in, one flow at a time, answers out.

One class for every listener and for the inside of an intercepted tunnel: what differs is `mode` and what CONNECT fixed.
Bytes are read only as far as the present message goes; what follows waits, so pipelined requests are served in order.
"""

import asyncio
import ssl
from operator import itemgetter
from typing import cast

from sidecar.errors import CallerError, Reason, SpanlockError
from sidecar.model.caller import Caller
from sidecar.model.tool import Authority, Tool
from sidecar.model.workflow import Workflow
from sidecar.proxy import binding, destination, rescue
from sidecar.proxy.destination import Mode
from sidecar.proxy.flow import Flow
from sidecar.proxy.framing import LAST_CHUNK, chunk
from sidecar.proxy.http1 import MAX_HEAD, Fields, RequestHead, ResponseHead, parse_request
from sidecar.proxy.inject import stripped
from sidecar.proxy.outbox import Sender
from sidecar.proxy.plane import Plane

MAX_AHEAD = 64 * 1024
"""Bytes read ahead of what the tool takes; then the agent's socket is not read. Precedent: asyncio's write buffer."""

NOBODY = Caller(uid=-1, agents=frozenset())
_HANDSHAKE_SECONDS = 10.0
_PARTING_SECONDS = 2.0
"""For an agent to take its last answer and go. Precedent: nginx's lingering_timeout is 5 s."""
_PREFACE = b"PRI * HTTP/2.0\r\n"
_LINE = itemgetter(2)
"""Of a `Field`."""


def _handshake_refusal(error: Exception) -> CallerError:
    """The client only sees the connection end, so the reason stands in the audit alone."""
    if isinstance(error, ssl.SSLError) and "CALLBACK" in (error.reason or ""):
        return CallerError(Reason.AUTHORITY_MISMATCH, "the TLS server name is missing or not the CONNECT target")
    return CallerError(Reason.CLIENT_GONE, "the agent ended the TLS handshake; does it trust the sidecar's CA?")


class Connection(Sender):
    """One connection from an agent. `connections` (the listener's set) holds it while it lives."""

    __slots__ = (
        "_buffer", "_chunked_reply", "_connections", "_discarding", "_fields", "_intercepting", "_joined", "_own_workflow",
        "_paused", "_refusal", "authority", "caller", "choked", "deadline", "flow", "handle", "mode", "plane", "tool",
    )  # fmt: skip

    def __init__(self, plane: Plane, mode: Mode, connections: "set[Connection]", workflow: str | None = None) -> None:
        super().__init__(plane.outbox)
        self.plane = plane
        self.mode = mode
        self.caller = NOBODY if workflow is None else Caller(uid=-1, agents=frozenset(), workflow=workflow)
        self.authority: Authority | None = None
        self.tool: Tool | None = None
        self.handle: str | None = None
        self.deadline = plane.clock.monotonic() + plane.limits.request_head_seconds
        self.flow: Flow | None = None
        self._fields = Fields(stripped)
        self._connections = connections
        self._own_workflow = workflow
        self._joined: Workflow | None = None
        self._buffer = b""
        self._refusal: SpanlockError | None = None
        self.choked = False
        """The agent does not read what it was sent."""
        self._discarding = False
        """It has its last answer, and what it still sends is thrown away."""
        self._chunked_reply = False
        self._intercepting = False
        self._paused = False

    # -- asyncio.Protocol ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accepts: who is calling is found once, here. What is refused takes nobody's place."""
        self.transport = cast(asyncio.Transport, transport)
        try:
            if len(self._connections) >= self.plane.limits.connections:
                raise CallerError(Reason.TOO_MANY_CONNECTIONS, "the limit of open connections is reached")
            caller = self.plane.find_caller(transport.get_extra_info("sockname"), transport.get_extra_info("peername"))
            self.caller = Caller(caller.uid, caller.agents, self._own_workflow)
            if self._crowds_out():
                raise CallerError(Reason.TOO_MANY_CONNECTIONS, "this uid holds half of all connections already")
        except SpanlockError as error:
            self._refusal = error
            if self._crowded:  # at once, whatever it was going to ask: nobody waits here for it
                self._refuse(error)
                self.close()
                return
        self._connections.add(self)

    @property
    def _crowded(self) -> bool:
        return len(self._connections) >= self.plane.limits.connections // 2

    def _crowds_out(self) -> bool:
        """One uid may hold half of all connections at most when others are declared: its flood is not theirs."""
        if not self._crowded or self.plane.callers.uids == 1:
            return False
        half = self.plane.limits.connections // 2
        return sum(other.caller.uid == self.caller.uid for other in self._connections) >= half

    def attach(self, transport: asyncio.Transport) -> None:
        """Inside a tunnel: `start_tls` calls no `connection_made`, and data may have come before it returned."""
        self.transport = transport
        self._connections.add(self)
        if self._joined is not None and not self._joined.is_open:
            self.close()  # it closed during the handshake, when there was nothing to cut yet
        elif self._buffer:
            data, self._buffer = self._buffer, b""
            self._advance(data)

    def data_received(self, data: bytes) -> None:
        if self.flow is not None:
            self._body(self.flow, data)
        elif self.transport is None or self.choked:
            self._wait(data)
        elif self._discarding:
            return
        elif self._intercepting:
            self._reject(CallerError(Reason.EARLY_DATA, "bytes came before CONNECT was answered"))
        else:
            self._advance(self._buffer + data if self._buffer else data)

    def _wait(self, data: bytes) -> None:
        """Keeps what comes for later; when that is too much, no more is read."""
        self._buffer += data
        if len(self._buffer) > MAX_AHEAD:
            self._hold_back()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._connections.discard(self)
        if self._joined is not None:
            self._joined.flows.discard(self)
        if self.flow is not None:
            self.flow.fail(CallerError(Reason.CLIENT_GONE, "the agent closed the connection"))

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.choked = True
        self._hold_tool()

    def _hold_tool(self) -> None:
        if self.flow is not None and self.flow.upstream is not None:
            self.flow.upstream.pause()

    def resume_writing(self) -> None:
        self.choked = False
        if self.flow is None:
            self._serve_next()
        elif self.flow.upstream is not None:
            self.flow.upstream.resume()

    # -- requests in --------------------------------------------------------------------------------------------

    def _advance(self, data: bytes) -> None:
        """Takes one head off `data` and begins its flow; the rest is its body, then the next request."""
        end = data.find(b"\r\n\r\n")
        if end < 0 or end + 4 > MAX_HEAD:
            self._incomplete(data)
            return
        self._buffer = b""
        try:
            if self._refusal is not None:
                raise self._refusal
            if data.startswith(_PREFACE):
                raise CallerError(Reason.UPGRADE_REFUSED, "HTTP/2 without negotiation is refused")
            head = parse_request(data[:end], self._fields)
            rest = data[end + 4 :]
            if head.method == b"CONNECT":
                self._connect(head, rest)
                return
            payload, rest = head.framing.feed(rest) if rest else (b"", rest)
        except SpanlockError as error:
            self._reject(error)
            return
        self.flow = flow = Flow(self.plane, self, head)
        if payload or not flow.body_complete:
            flow.request_body(payload, head.framing.done)
        if rest:
            self._wait(rest)
        if not head.framing.done and not head.expects_continue:
            self._hold_back()
        flow.start(flow.serve())

    def _incomplete(self, data: bytes) -> None:
        if len(data) > MAX_HEAD:
            self._reject(CallerError(Reason.REQUEST_TOO_LARGE, "the request's head is over 64 KiB"))
            return
        if not self._buffer:
            self.deadline = self.plane.clock.monotonic() + self.plane.limits.request_head_seconds
        self._buffer = data
        self.body_wanted(True)
        if data.count(b"\n") != data.count(b"\r\n"):
            # It will never be a head, and waiting for its end would only tie the connection up.
            self._reject(CallerError(Reason.MALFORMED_REQUEST, "bare LF line ends"))

    def _body(self, flow: Flow, data: bytes) -> None:
        """More of the present request's body, and perhaps the beginning of the next request."""
        framing = flow.head.framing
        try:
            payload, rest = framing.feed(data)
        except SpanlockError as error:
            flow.fail(error)
            return
        if payload or (framing.done and not flow.body_complete):
            flow.request_body(payload, framing.done)
        if rest:
            self._wait(rest)
        elif flow.upstream is None or flow.upstream.flow is not flow:
            self._hold_back()

    def _hold_back(self) -> None:
        """Stops reading until the tool takes the body: at most one read is ahead."""
        if self.transport is not None and not self._paused and not self.transport.is_closing():
            self.transport.pause_reading()
            self._paused = True

    def body_wanted(self, wanted: bool) -> None:
        if not wanted:
            self._hold_back()
        elif self._paused and self.transport is not None and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    # -- CONNECT ------------------------------------------------------------------------------------------------

    def _connect(self, head: RequestHead, rest: bytes) -> None:
        """Fixes the tunnel's one destination, then answers; TLS begins in a task of its own."""
        if self.mode != "explicit":
            raise CallerError(Reason.METHOD_REFUSED, "CONNECT is refused inside a tunnel and on the base-URL listener")
        if rest or not head.framing.done:
            raise CallerError(Reason.EARLY_DATA, "bytes followed CONNECT before it was answered")
        if self.plane.draining:
            raise CallerError(Reason.DRAINING, "the sidecar is shutting down")
        self.authority, self.tool = destination.connect(head, self.plane.router)
        self.plane.ca.require(self.authority.host)
        self.handle = binding.handle_of(head.handle)
        if self.handle is not None or self.caller.workflow is not None:
            self._joined = self.plane.registry.join(self.caller, self.handle, None)
            self._joined.flows.add(self)
        self._intercepting = True
        self.plane.background.spawn(self._intercept(self.authority.host), "intercept")

    async def _intercept(self, host: str) -> None:
        """Answers 200 and terminates TLS with a leaf for the CONNECT name; a failed handshake ends the connection."""
        loop = asyncio.get_running_loop()
        context = await loop.run_in_executor(None, self.plane.ca.leaf, host)
        outer = self.transport
        if outer is None or outer.is_closing():
            return
        inner = Connection(self.plane, "intercepted", self._connections)
        inner.inherit(self)
        self.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        self.flush()
        try:
            transport = await loop.start_tls(
                outer, inner, context, server_side=True, ssl_handshake_timeout=_HANDSHAKE_SECONDS
            )
        except (OSError, ValueError) as error:
            outer.abort()
            inner.connection_lost(None)
            self.plane.record_refusal(self.caller, "intercepted", 0, _handshake_refusal(error))
            return
        finally:
            self._connections.discard(self)
        if transport is None:
            return
        inner.attach(transport)

    def inherit(self, outer: "Connection") -> None:
        """What CONNECT fixed holds inside the tunnel: caller, destination, handle, and the workflow that may cut it."""
        self.caller, self.handle = outer.caller, outer.handle
        self.authority, self.tool = outer.authority, outer.tool
        self._joined, outer._joined = outer._joined, None
        if self._joined is not None:
            self._joined.flows.discard(outer)
            self._joined.flows.add(self)

    # -- answers out (called by the flow) -----------------------------------------------------------------------

    def send_continue(self) -> None:
        self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def reply(self, head: ResponseHead, keep_alive: bool, first: bytes) -> None:
        """The response's head, re-serialised, with the `first` bytes of its body; one of unknown length is chunked anew."""
        self._chunked_reply = head.framing.kind in ("chunked", "until_close")
        parts = [b"HTTP/1.1 %d " % head.status, head.phrase, b"\r\n"]
        parts += map(_LINE, head.headers)
        if self._chunked_reply:
            parts.append(b"transfer-encoding: chunked\r\n")
        parts.append(b"\r\n" if keep_alive else b"connection: close\r\n\r\n")
        if first:
            parts.append(chunk(first) if self._chunked_reply else first)
        self.write(b"".join(parts))
        if self.choked:
            self._hold_tool()  # by the answer before: the transport says it once only

    def relay(self, payload: bytes) -> None:
        self.write(chunk(payload) if self._chunked_reply else payload)

    def end_reply(self) -> None:
        if self._chunked_reply:
            self.write(LAST_CHUNK)

    def reject(self, error: SpanlockError, keep_alive: bool) -> int:
        """Answers with the refusal and returns its status."""
        head_only = self.flow is not None and self.flow.method == b"HEAD"
        self.write(rescue.response(error, keep_alive=keep_alive, head_only=head_only))
        return rescue.STATUS[error.reason]

    def cut(self) -> None:
        """The workflow that this tunnel belongs to closed (model.workflow.LiveFlow). Its flow has been cut by itself."""
        if self.flow is None:
            self.close()

    def flow_ended(self, keep_alive: bool, now: float) -> None:
        """The connection is free for the next request, or ends. `now`: monotonic seconds."""
        flow, self.flow = self.flow, None
        if self.transport is None:
            return
        if not keep_alive:
            self._part(now, unread=flow is not None and not flow.body_complete)
            return
        self.deadline = now + self.plane.limits.keep_alive_seconds
        if len(self._buffer) <= MAX_AHEAD:
            self.body_wanted(True)
        self._serve_next()

    def _serve_next(self) -> None:
        """The next pipelined request, in a step of its own; none while the agent does not read its answers."""
        if self._buffer and not self.choked:
            asyncio.get_running_loop().call_soon(self._resume)

    def _resume(self) -> None:
        """Unless newer bytes have begun it already."""
        if self._buffer and self.flow is None and self.transport is not None and not self.choked:
            data, self._buffer = self._buffer, b""
            self._advance(data)

    def _part(self, now: float, unread: bool) -> None:
        """Closes after the last answer. `unread`: the agent may still be sending, and a close would reset the connection under
        the answer; so what it sends is thrown away until it ends, or for a while. `now`: monotonic seconds."""
        self.deadline = now + _PARTING_SECONDS
        transport = self.transport
        if not unread or transport is None or transport.is_closing():
            self.close()
            return
        self.flush()
        self._discarding, self._buffer = True, b""
        if transport.can_write_eof():
            transport.write_eof()
        self.body_wanted(True)

    # -- inside -------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """Called by the listener's sweep: a request that never completes, an idle connection, a silent stream."""
        if self.flow is not None:
            self.flow.expire(now)
        elif now > self.deadline and self.transport is not None:
            self._overdue(now, self.transport)

    def _overdue(self, now: float, transport: asyncio.Transport) -> None:
        if self._discarding or transport.is_closing():
            self.abort()  # it neither takes its answer nor goes
        elif self._buffer:
            self._reject(CallerError(Reason.REQUEST_TIMEOUT, "the request's head did not arrive in time"))
        else:
            self._part(now, unread=False)

    def _reject(self, error: SpanlockError) -> None:
        """A refusal before any flow: answered, recorded, and the connection ends."""
        self._refuse(error)
        # Inside TLS there is no half-close, and the agent would wait for the end.
        unread = self.transport is not None and self.transport.can_write_eof()
        self._part(self.plane.clock.monotonic(), unread)

    def _refuse(self, error: SpanlockError) -> None:
        status = self.reject(error, keep_alive=False)
        self.plane.record_refusal(self.caller, self.mode, status, error)
