"""THE WAY OF A REQUEST, top to bottom: `Flow.serve`.

Each step hands the next a typed proof: Workflow → Route → Permit → verified Upstream → Lease → OutboundRequest. A denied
call costs no DNS query, no connection and no exchange; a wrong certificate costs no exchange. No `await` stands between
the last liveness check (`broker.use`) and the write.
"""

import asyncio
from typing import Protocol

from sidecar.errors import CallerError, Denied, Reason, SpanlockError, UpstreamError
from sidecar.model.audit import FlowRecord
from sidecar.model.caller import Caller
from sidecar.model.lease import Lease
from sidecar.model.policy import Permit
from sidecar.model.tool import Authority, Route, Tool
from sidecar.model.workflow import Workflow
from sidecar.proxy import binding, destination
from sidecar.proxy.destination import Mode
from sidecar.proxy.driver import Driven
from sidecar.proxy.framing import LAST_CHUNK, chunk
from sidecar.proxy.http1 import RequestHead, ResponseHead
from sidecar.proxy.inject import inject
from sidecar.proxy.plane import Plane
from sidecar.proxy.upstream import Upstream

_IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"))
_REFUSED_METHODS = frozenset((b"TRACE", b"TRACK", b"CONNECT"))
_ENDS_CONNECTION = (Reason.MALFORMED_REQUEST, Reason.INTERNAL)
"""After these nobody can be sure where the next request begins."""


class Downstream(Protocol):
    """What a flow needs of the agent's connection."""

    caller: Caller
    mode: Mode
    authority: Authority | None
    tool: Tool | None
    handle: str | None
    choked: bool
    """The agent does not read what it was sent."""

    def reply(self, head: ResponseHead, keep_alive: bool, first: bytes) -> None: ...
    def relay(self, payload: bytes) -> None: ...
    def end_reply(self) -> None: ...
    def send_continue(self) -> None: ...
    def reject(self, error: SpanlockError, keep_alive: bool) -> int: ...
    def abort(self) -> None: ...
    def body_wanted(self, wanted: bool) -> None: ...
    def flow_ended(self, keep_alive: bool, now: float) -> None: ...


class Flow(Driven):
    """One request and its response. Registered with its workflow while it lives, so that a close can cut it."""

    __slots__ = (
        "_counted", "_early", "_keep_alive", "_named", "_pending", "_silent_since", "_tool_full", "body_complete",
        "downstream", "error", "head", "lease", "method", "permit", "plane", "replied", "request_bytes",
        "response_bytes", "route", "started", "status", "touched",
        "upstream", "workflow",
    )  # fmt: skip

    def __init__(self, plane: Plane, downstream: Downstream, head: RequestHead) -> None:
        super().__init__(plane.background)
        self.plane = plane
        self.downstream = downstream
        self.head = head
        self.method = head.method
        self.started = plane.clock.monotonic()
        self.touched = True
        """Bytes have come since the last sweep."""
        self._silent_since = self.started
        self.workflow: Workflow | None = None
        self.route: Route | None = None
        self.permit: Permit | None = None
        self._named: Lease | None = None
        """That of the CredentialHandle which the call carried."""
        self.lease: Lease | None = None
        self._counted = False
        """This call's use of the lease has been counted; a second try is the same use."""
        self.upstream: Upstream | None = None
        self.error: SpanlockError | None = None
        self.replied = False
        self.status = 0
        self.request_bytes = 0
        self.response_bytes = 0
        self.body_complete = head.framing.done
        self._pending: list[bytes] = []
        self._early: list[bytes] = []
        self._keep_alive = head.keep_alive
        self._tool_full = False

    # -- the way of a request -----------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Serves the request. Every end is an answer, or an aborted connection, and one audit record."""
        outcome: str = Reason.INTERNAL
        try:
            tool, target = self._names_agree()
            workflow = self._join(tool)  # within which workflow
            self.route = route = self.plane.router.route(tool, target)  # which tool, which canonical path
            self.permit = permit = self._permitted(workflow, route)  # may it
            upstream = self._idle(workflow, tool) or await self._dial(workflow, tool)  # resolve, pin, dial, verify
            try:
                head = await self._call(upstream, workflow, route, permit)  # lease, inject, write; the answer's head
            except UpstreamError:
                if not self._may_retry(upstream):
                    raise
                upstream = await self._dial(workflow, tool)
                head = await self._call(upstream, workflow, route, permit)
            await self._stream_back(upstream, head)
            outcome = "ok"
        except SpanlockError as error:
            outcome = self._refuse(self.error or error)
        except asyncio.CancelledError:
            outcome = self._refuse(self.error or CallerError(Reason.CLIENT_GONE, "the call was abandoned"))
        except Exception as bug:  # noqa: BLE001 - whatever it is costs this call, and is told
            context = {"message": "a call failed", "exception": bug}
            asyncio.get_running_loop().call_exception_handler(context)
            outcome = self._refuse(self.error or SpanlockError(Reason.INTERNAL, "a bug; the sidecar's log has it"))
        finally:
            self._end(outcome)

    def _names_agree(self) -> tuple[Tool, bytes]:
        """One destination, fixed before everything else (H1, H2, H5)."""
        head, connection = self.head, self.downstream
        if head.method in _REFUSED_METHODS:
            raise CallerError(Reason.METHOD_REFUSED, f"{head.method.decode('latin-1')} is refused")
        if head.upgrades:
            raise CallerError(Reason.UPGRADE_REFUSED, "protocol upgrades are refused")
        if connection.mode == "intercepted" and connection.authority is not None and connection.tool is not None:
            return destination.intercepted(head, connection.authority, connection.tool)
        if connection.mode == "reverse" or head.target.startswith(b"/"):
            return destination.reverse(head, self.plane.router)
        return destination.absolute(head, self.plane.router)

    def _join(self, tool: Tool) -> Workflow:
        """The workflow that this call belongs to; from here on a close cuts the flow."""
        if self.plane.draining:
            raise CallerError(Reason.DRAINING, "the sidecar is shutting down")
        workflow, self._named = binding.join(
            self.plane, self.downstream.caller, self.head, self.downstream.handle, tool
        )
        self.workflow = workflow
        self.plane.registry.enter(workflow, self, self.started)
        return workflow

    def _permitted(self, workflow: Workflow, route: Route) -> Permit:
        method = self.method.decode("latin-1")
        tool = route.tool
        if tool.methods and method not in tool.methods:
            raise CallerError(Reason.METHOD_REFUSED, f"tool {tool.name} does not take {method}")
        return self.plane.decider.decide_request(workflow.agent, workflow.name, tool, method, route.path)

    def _idle(self, workflow: Workflow, tool: Tool) -> Upstream | None:
        """An idle verified connection of this workflow to this tool."""
        self.upstream = upstream = self.plane.pool.take(workflow, tool)
        return upstream

    async def _dial(self, workflow: Workflow, tool: Tool) -> Upstream:
        """A new connection, resolved, pinned, dialled and verified."""
        self.upstream = upstream = await self.plane.pool.dial(workflow, tool)
        self._check()
        self.plane.router.require(tool)
        return upstream

    async def _call(self, upstream: Upstream, workflow: Workflow, route: Route, permit: Permit) -> ResponseHead:
        """One try on one connection, up to the head of the answer."""
        lease = self._held(workflow, route.tool, permit) or await self._issue(workflow, route.tool, permit)
        self._send(upstream, route, lease, workflow)  # the last liveness check and the write
        while upstream.response is None:
            if upstream.error is not None:
                raise upstream.error
            self._check()
            await self
        return upstream.response

    def _held(self, workflow: Workflow, tool: Tool, permit: Permit) -> Lease | None:
        """The lease of the handle that the call carried, or the active one."""
        named = self._named
        if named is None:
            self.lease = self.plane.broker.active(workflow, tool, permit)
        elif named.ttl > permit.ttl or not set(named.key.scopes) <= set(permit.scopes):
            what = "policy wants a younger or narrower credential for this call than the handle's; call without it"
            raise Denied(Reason.POLICY_DENIED, what)
        else:
            self.lease = named
        return self.lease

    async def _issue(self, workflow: Workflow, tool: Tool, permit: Permit) -> Lease:
        """A new lease: the exchange of an SVID for a credential, or a share in one that is under way."""
        self.lease = lease = await self.plane.broker.lease(workflow, tool, permit)
        self._check()
        return lease

    def _send(self, upstream: Upstream, route: Route, lease: Lease, workflow: Workflow) -> None:
        """Synchronous from the liveness checks to the write; then the body, as far as it has come."""
        plane = self.plane
        plane.router.require(route.tool)
        if self.permit is not None and self.permit.epoch != plane.decider.epoch:
            self._ask_again(workflow, route, self.permit)
        credential = plane.broker.use(lease, workflow, self._counted)
        self._counted = True
        upstream.send(inject(self.head, route, credential), self)
        if not self.body_complete:
            if self.head.expects_continue:
                self.downstream.send_continue()
            self.downstream.body_wanted(True)
        if self.head.framing.kind != "none":
            self._flush_body()

    def _ask_again(self, workflow: Workflow, route: Route, permit: Permit) -> None:
        """A reload came while this call was on its way: what holds now is asked, and must be what the lease was made for."""
        self.permit = self._permitted(workflow, route)
        if not self.permit.same(permit):
            raise Denied(Reason.POLICY_DENIED, "the policy changed while this call was on its way; call again")

    async def _stream_back(self, upstream: Upstream, head: ResponseHead) -> None:
        """The head, then the body by the protocols' own callbacks, until the last byte."""
        if upstream.error is not None:
            raise upstream.error
        self._check()
        self.replied = True
        self.status = head.status
        # An answer before the request's end leaves unread bytes on both sides: neither connection is used again (D5).
        self._keep_alive = self._keep_alive and self.body_complete
        upstream.resume()
        self.downstream.reply(head, self._keep_alive, b"".join(self._early))
        while not upstream.complete:
            if upstream.error is not None:
                raise upstream.error
            self._check()
            await self
            self._check()
        self.downstream.end_reply()

    # -- called by the connections ------------------------------------------------------------------------------

    def relay(self, payload: bytes) -> None:
        """A piece of the response's body (from the upstream)."""
        self.touched = True
        self.response_bytes += len(payload)
        if self.replied:
            self.downstream.relay(payload)
        else:
            self._early.append(payload)
            if self.in_task and self.upstream is not None:
                self.upstream.pause()  # a Task wakes a step later, and the loop reads many times in a step

    def request_body(self, payload: bytes, complete: bool) -> None:
        """A piece of the request's body (from the downstream)."""
        self.touched = True
        self.body_complete = complete
        if payload:
            self._pending.append(payload)
        upstream = self.upstream
        if upstream is not None and upstream.flow is self:
            self._flush_body()

    def upstream_writable(self, writable: bool) -> None:
        """Whether the tool takes more of the request's body (from the upstream)."""
        self._tool_full = not writable
        self.downstream.body_wanted(writable)

    def fail(self, error: SpanlockError) -> None:
        """Ends the flow from outside with `error`: client gone, time-out, cut."""
        if self.error is None:
            self.error = error
        if self.upstream is not None and self.upstream.flow is self:
            self.upstream.abort()
        self.wake()
        self.cancel_wait()

    def expire(self, now: float) -> None:
        """Ends the flow when the tool keeps silent for longer than its time-outs allow (called once a second)."""
        if self.upstream is None or self.route is None or self.upstream.flow is not self:
            return
        if self.touched:
            self.touched, self._silent_since = False, now
            return
        timeouts = self.route.tool.timeouts
        limit = timeouts.idle if self.replied else timeouts.response
        if now - self._silent_since <= limit:
            return
        self.fail(self._silent(self.route.tool, limit))

    def _silent(self, tool: Tool, limit: float) -> SpanlockError:
        """Who has kept still for `limit` seconds."""
        if self.downstream.choked:
            return CallerError(Reason.REQUEST_TIMEOUT, f"the agent took no byte of the answer for {limit:g} s")
        if self.replied or self.body_complete:
            return UpstreamError(Reason.UPSTREAM_TIMEOUT, f"no byte from tool {tool.name} for {limit:g} s")
        if self._tool_full:
            return UpstreamError(
                Reason.UPSTREAM_TIMEOUT, f"tool {tool.name} took no byte of the request for {limit:g} s"
            )
        return CallerError(Reason.REQUEST_TIMEOUT, f"no byte of the request's body for {limit:g} s")

    def cut(self) -> None:
        """The workflow closed: no further byte with the credential leaves (model.workflow.LiveFlow)."""
        self.fail(CallerError(Reason.WORKFLOW_CLOSED, "the workflow closed while this call was in flight"))

    def drop_lease(self) -> None:
        """The lease was withdrawn while this call was in flight."""
        self.fail(CallerError(Reason.LEASE_GONE, "the credential was withdrawn while this call was in flight"))

    def crashed(self) -> None:
        """`serve` raised, so nobody knows how far it came: both connections end."""
        if self.upstream is not None:
            self.upstream.abort()
        self.downstream.abort()

    # -- inside -------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.error is not None:
            raise self.error

    def _flush_body(self) -> None:
        upstream = self.upstream
        if upstream is None:
            return
        pieces, self._pending = self._pending, []
        self.request_bytes += sum(map(len, pieces))
        if self.head.framing.kind == "chunked":
            for piece in pieces:
                upstream.write(chunk(piece))
            if self.body_complete and not upstream.complete:
                upstream.write(LAST_CHUNK)
        else:
            for piece in pieces:
                upstream.write(piece)

    def _may_retry(self, upstream: Upstream) -> bool:
        """Once, on a pooled connection that proved stale: nothing was sent, or no response byte came and twice does no harm."""
        if self.error is not None or not upstream.reused:
            return False
        if upstream.flow is not self:
            return True
        return not upstream.answered and self.method in _IDEMPOTENT and self.head.framing.kind == "none"

    def _refuse(self, error: SpanlockError) -> str:
        self.error = error
        if self.replied or error.reason is Reason.CLIENT_GONE:
            self.downstream.abort()
        else:
            self._keep_alive = self._keep_alive and self.body_complete and error.reason not in _ENDS_CONNECTION
            self.status = self.downstream.reject(error, self._keep_alive)
        return str(error.reason)

    def _end(self, outcome: str) -> None:
        """Gives everything back and writes the one record."""
        plane, workflow, upstream = self.plane, self.workflow, self.upstream
        now = plane.clock.monotonic()
        if workflow is not None:
            if upstream is not None:
                if self.error is not None or not self.body_complete:
                    upstream.abort()
                plane.pool.give(upstream, workflow, now)
            plane.registry.leave(workflow, self, now)
        plane.record_flow(self._record(outcome, now), self.head.traceparent)
        self.downstream.flow_ended(self._keep_alive, now)

    def _record(self, outcome: str, now: float) -> FlowRecord:
        route, lease, permit, workflow, upstream = self.route, self.lease, self.permit, self.workflow, self.upstream
        caller = self.downstream.caller
        return FlowRecord(  # by position: by name it costs twice as much, and it is made for every call
            self.plane.clock.now(),
            workflow.agent if workflow is not None else ",".join(sorted(caller.agents)),
            caller.uid,
            workflow.id if workflow is not None else caller.workflow or "",
            route.tool.name if route is not None else "",
            self.method.decode("latin-1"),
            route.path if route is not None else "",
            self.status,
            outcome,
            self.error.detail if self.error is not None else "",
            self.request_bytes,
            self.response_bytes,
            (now - self.started) * 1000,
            lease.id if lease is not None else "",
            lease.epoch if lease is not None else 0,
            permit.policy_ids if permit is not None else (),
            (workflow.trace_id or "") if workflow is not None else "",
            self.downstream.mode,
            upstream.address if upstream is not None else "",
        )
