"""Workflows on an agent's own socket: the socket says who calls, and a call reaches that agent's workflows only."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from sidecar.control import convert
from sidecar.control.rescue import Context, Rescued, refusal, rescued, rescued_stream
from sidecar.credentials.broker import Broker
from sidecar.errors import CallerError, Reason, SpanlockError
from sidecar.model.audit import RpcRefusal
from sidecar.model.workflow import CloseReason, Workflow
from sidecar.policy.decider import Decider
from sidecar.secret import Secret
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from sidecar.wire.spanlock.v1 import workflows_pb2_grpc
from sidecar.workflows.registry import Registry

_TRACE = re.compile(r"(?!0{32})[0-9a-f]{32}")
_SPAN = re.compile(r"(?!0{16})[0-9a-f]{16}")
FIRST_SECONDS = 10.0
"""For a Hold's first message: until then it is memory that no limit of workflows counts."""
_MAX_NAME = 128
_MAX_SUBJECT = 16 * 1024


@dataclass(frozen=True)
class Doors:
    """What the services on an agent's socket need. `open_listener` gives a workflow a listener of its own."""

    registry: Registry
    broker: Broker
    decider: Decider
    open_listener: Callable[[Workflow], Awaitable[str]]
    ca_pem: Callable[[], str]
    otlp_endpoint: Callable[[], str]
    identity_problem: Callable[[str], str]
    """Why an agent has no identity now; empty: it has one."""
    accepting: Callable[[], bool]
    refused: Callable[[RpcRefusal], None]
    """Records an RPC that was refused."""


class AgentService(Rescued):
    """A service on one agent's socket: what it refuses is recorded."""

    def __init__(self, agent: str, doors: Doors) -> None:
        self._agent = agent
        self._doors = doors

    def note_refusal(self, rpc: str, request: object, error: SpanlockError) -> None:
        self._doors.refused(refusal(self._agent, rpc, request, error))


async def _first(requests: AsyncIterator[pb.HoldRequest]) -> pb.HoldRequest | None:
    """None: the stream ended before it. Raises `CallerError` (request_timeout)."""
    try:
        async with asyncio.timeout(FIRST_SECONDS):
            return await anext(aiter(requests), None)
    except TimeoutError:
        what = f"the first message, with `open`, was not there within {FIRST_SECONDS:g} seconds"
        raise CallerError(Reason.REQUEST_TIMEOUT, what) from None


def _invalid(field: str, what: str) -> CallerError:
    return CallerError(Reason.INVALID_ARGUMENT, f"{field}: {what}")


class WorkflowsService(AgentService, workflows_pb2_grpc.WorkflowsServicer):
    """One for each agent."""

    @rescued
    async def Open(self, request: pb.OpenRequest, context: Context) -> pb.OpenResponse:
        _, response = await self._open(request)
        return response

    async def _open(self, request: pb.OpenRequest) -> tuple[Workflow, pb.OpenResponse]:
        doors = self._doors
        if not doors.accepting():
            raise CallerError(Reason.DRAINING, "the sidecar is shutting down")
        _check(request)
        doors.decider.decide_open(self._agent, request.name)
        workflow = doors.registry.open(
            self._agent,
            name=request.name,
            trace_id=request.trace_id or None,
            root_span_id=request.root_span_id or None,
            max_age=_seconds(request, "max_age"),
            idle=_seconds(request, "idle"),
            subject_token=Secret(request.subject_token) if request.subject_token else None,
        )
        try:
            proxy_url = await doors.open_listener(workflow) if request.listener else ""
        except BaseException:
            doors.registry.close(workflow, CloseReason.CLOSED)
            raise
        return workflow, pb.OpenResponse(
            workflow=self._message(workflow),
            handle=workflow.handle.reveal(),
            proxy_url=proxy_url,
            ca_pem=doors.ca_pem(),
            otlp_endpoint=doors.otlp_endpoint(),
        )

    @rescued_stream
    async def Hold(self, requests: AsyncIterator[pb.HoldRequest], context: Context) -> AsyncIterator[pb.HoldResponse]:
        """The first message opens; however the stream ends without Close, the workflow closes (`holder_gone`)."""
        first = await _first(requests)
        if first is None or not first.HasField("open"):
            raise _invalid("open", "must be set in the first message")
        workflow, opened = await self._open(first.open)
        registry = self._doors.registry
        reading = asyncio.ensure_future(self._read(requests, workflow))  # noqa: TID251 - ends with this call
        try:
            yield pb.HoldResponse(opened=opened)
            closed = registry.wait_closed(workflow)
            waiting: set[asyncio.Future[Any]] = {reading, closed}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            reason = CloseReason.CLOSED if reading.done() and reading.result() else CloseReason.HOLDER_GONE
            report = await asyncio.shield(registry.close(workflow, reason))
            yield pb.HoldResponse(closed=convert.close_report(report))
        finally:
            reading.cancel()
            registry.close(workflow, CloseReason.HOLDER_GONE)

    async def _read(self, requests: AsyncIterator[pb.HoldRequest], workflow: Workflow) -> bool:
        """Renews at each message. True: asked to close; False: the holder is gone."""
        try:
            async for message in requests:
                if message.close:
                    return True
                self._doors.registry.renew(workflow)
        except Exception:  # noqa: BLE001 - whatever broke the stream, the holder is gone
            return False
        return False

    @rescued
    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        workflow = self._mine(request.workflow_id)
        self._doors.registry.renew(workflow)
        return pb.RenewResponse(workflow=self._message(workflow))

    @rescued
    async def Close(self, request: pb.CloseRequest, context: Context) -> pb.CloseResponse:
        workflow = self._doors.registry.find(request.workflow_id)
        if workflow is None or workflow.agent != self._agent:
            raise CallerError(Reason.WORKFLOW_UNKNOWN, "no such workflow of this agent")
        report = await asyncio.shield(self._doors.registry.close(workflow, CloseReason.CLOSED))
        return convert.close_report(report)

    @rescued
    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        return pb.ListResponse(workflows=[self._message(w) for w in self._doors.registry.remembered(self._agent)])

    @rescued_stream
    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.WatchResponse]:
        with self._doors.registry.watch(self._agent) as changes:
            for workflow in self._doors.registry.remembered(self._agent):
                if workflow.is_open:
                    yield pb.WatchResponse(workflow=self._message(workflow))
            while (changed := await changes.get()) is not None:
                yield pb.WatchResponse(workflow=self._message(changed))

    def _mine(self, workflow_id: str) -> Workflow:
        workflow = self._doors.registry.get(workflow_id)
        if workflow.agent != self._agent:
            raise CallerError(Reason.WORKFLOW_UNKNOWN, "no such workflow of this agent")
        return workflow

    def _message(self, workflow: Workflow) -> pb.Workflow:
        doors = self._doors
        return convert.workflow(
            workflow, doors.registry.expires_at(workflow), len(doors.broker.leases(workflow=workflow.id))
        )


def _seconds(request: pb.OpenRequest, field: str) -> float | None:
    if not request.HasField(field):
        return None
    seconds = getattr(request, field).seconds + getattr(request, field).nanos / 1e9
    if not 0 < seconds <= 366 * 86400:
        raise _invalid(field, "must be a positive duration")
    return float(seconds)


def _check(request: pb.OpenRequest) -> None:
    if len(request.name) > _MAX_NAME or not request.name.isprintable():
        # An operator's terminal shows it: no escape in C0 or C1, nothing that turns the direction of what follows.
        raise _invalid("name", "at most 128 printable characters")
    if request.trace_id and not _TRACE.fullmatch(request.trace_id):
        raise _invalid("trace_id", "32 lower-case hex digits, not all zero")
    if request.root_span_id and (not request.trace_id or not _SPAN.fullmatch(request.root_span_id)):
        raise _invalid("root_span_id", "16 lower-case hex digits, not all zero, beside a trace_id")
    if len(request.subject_token) > _MAX_SUBJECT:
        raise _invalid("subject_token", "over 16 KiB")
