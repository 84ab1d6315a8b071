"""The open workflows: who may join which, what is in flight in each, and how each ends.

A close takes effect before `close` returns: the workflow is out of every index, its flows are cut, its leases dropped.
Only what the issuers must be told takes longer, and that is the task that `close` returns. Ends race (Close, Hold's end,
span, age, idle, operator): the first one names the reason, the others get the same task.
"""

import asyncio
import heapq
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from sidecar.clock import Clock
from sidecar.errors import CallerError, Reason
from sidecar.machine import step
from sidecar.model.caller import Caller
from sidecar.model.lease import CloseReport
from sidecar.model.traceparent import parse
from sidecar.model.workflow import (
    WORKFLOW_TABLE,
    CloseReason,
    LiveFlow,
    Workflow,
    WorkflowEvent,
    WorkflowState,
)
from sidecar.secret import Secret
from sidecar.tasks import Background
from sidecar.workflows.config import WorkflowsConfig

Settle = Callable[[Workflow], asyncio.Task[CloseReport]]
"""Drops every lease of the workflow before it returns; the task revokes and reports."""
OnChange = Callable[[Workflow, CloseReport | None], None]
"""Called when a workflow opened, began to close, and closed (then with the report). Must not raise."""

_KEPT = 256
"""Closed workflows remembered for List and for a Close that comes twice."""
_WATCHERS = 64
"""Of one agent."""
_AHEAD = 1024
"""Changes that a watcher may be behind."""
_SWEEP = 0.5


class Registry:
    """The only writer of `Workflow`'s changing fields."""

    def __init__(
        self, clock: Clock, config: WorkflowsConfig, settle: Settle, on_change: OnChange, background: Background
    ) -> None:
        self.config = config
        self._clock = clock
        self._settle = settle
        self._on_change = on_change
        self._background = background
        self._open: dict[str, Workflow] = {}
        self._by_handle: dict[str, Workflow] = {}
        self._by_trace: dict[tuple[str, str], Workflow] = {}
        self._by_agent: dict[str, dict[str, Workflow]] = {}
        self._deadlines: list[tuple[float, str]] = []
        self._closing: dict[str, asyncio.Task[CloseReport]] = {}
        self._ending: dict[str, Workflow] = {}
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._watchers: dict[str, list[asyncio.Queue[Workflow | None]]] = {}
        self._closed: OrderedDict[str, tuple[Workflow, CloseReport | None]] = OrderedDict()

    # -- open and find ------------------------------------------------------------------------------------------

    def open(
        self,
        agent: str,
        *,
        name: str,
        trace_id: str | None = None,
        root_span_id: str | None = None,
        max_age: float | None = None,
        idle: float | None = None,
        subject_token: Secret | None = None,
    ) -> Workflow:
        """A new workflow of `agent`; policy has been asked already. Raises `CallerError` (limits, a trace id in use)."""
        mine = self._by_agent.get(agent, {})
        if len(self._open) >= self.config.max_open or len(mine) >= self.config.max_open_per_agent:
            raise CallerError(Reason.TOO_MANY_WORKFLOWS, "the limit of open workflows is reached")
        if trace_id is not None and (agent, trace_id) in self._by_trace:
            raise CallerError(Reason.INVALID_ARGUMENT, "trace_id: this agent has an open workflow with it already")
        now = self._clock.monotonic()
        workflow = Workflow(
            id="wf_" + secrets.token_hex(8),
            agent=agent,
            name=name,
            handle=Secret("slw_" + secrets.token_hex(16)),
            opened_at=self._clock.now(),
            deadline=now + min(max_age or self.config.max_age, self.config.max_age),
            idle_seconds=min(idle or self.config.idle, self.config.idle),
            trace_id=trace_id,
            root_span_id=root_span_id,
            subject_token=subject_token,
            last_used=now,
        )
        self._open[workflow.id] = workflow
        self._by_handle[workflow.handle.reveal()] = workflow
        self._by_agent.setdefault(agent, {})[workflow.id] = workflow
        if trace_id is not None:
            self._by_trace[agent, trace_id] = workflow
        heapq.heappush(self._deadlines, (self._due(workflow), workflow.id))
        self._changed(workflow, None)
        return workflow

    def get(self, workflow_id: str) -> Workflow:
        """An open workflow. Raises `CallerError` (workflow_closed, workflow_unknown)."""
        workflow = self._open.get(workflow_id)
        if workflow is None:
            known = workflow_id in self._closing or workflow_id in self._closed
            raise CallerError(
                Reason.WORKFLOW_CLOSED if known else Reason.WORKFLOW_UNKNOWN,
                "the workflow is closed" if known else "no such workflow",
            )
        return workflow

    def find(self, workflow_id: str) -> Workflow | None:
        """A workflow in any state, as long as it is remembered."""
        if (workflow := self._open.get(workflow_id) or self._ending.get(workflow_id)) is not None:
            return workflow
        entry = self._closed.get(workflow_id)
        return entry[0] if entry is not None else None

    def remembered(self, agent: str | None = None) -> list[Workflow]:
        """Open workflows, then remembered ones."""
        found = [*self._open.values(), *self._ending.values(), *(workflow for workflow, _ in self._closed.values())]
        return [w for w in found if agent is None or w.agent == agent]

    @property
    def open_count(self) -> int:
        return len(self._open)

    # -- bind calls ---------------------------------------------------------------------------------------------

    def join(self, caller: Caller, handle: str | None, traceparent: bytes | None) -> Workflow:
        """The open workflow that a call of `caller` belongs to. First match; a bad handle never falls through.

        Raises `CallerError`: handle_invalid, workflow_closed, no_workflow.
        """
        if caller.workflow is not None:
            return self._own_listener(caller, caller.workflow, handle)
        if handle is not None:
            workflow = self._by_handle.get(handle)
            if workflow is None or workflow.agent not in caller.agents:
                raise CallerError(Reason.HANDLE_INVALID, "the workflow handle is unknown, closed, or another caller's")
            return workflow
        if len(caller.agents) == 1:
            (agent,) = caller.agents
            if traceparent is not None and (parent := parse(traceparent)) is not None:
                workflow = self._by_trace.get((agent, parent.trace_id))
                if workflow is not None:
                    return workflow
            mine = self._by_agent.get(agent)
            if self.config.bind_only_open and mine is not None and len(mine) == 1:
                return next(iter(mine.values()))
        raise CallerError(Reason.NO_WORKFLOW, _no_workflow(caller))

    def _own_listener(self, caller: Caller, workflow_id: str, handle: str | None) -> Workflow:
        workflow = self._open.get(workflow_id)
        if workflow is None:
            raise CallerError(Reason.WORKFLOW_CLOSED, "the workflow of this listener is closed")
        if workflow.agent not in caller.agents:
            raise CallerError(Reason.UNKNOWN_CALLER, "this listener belongs to a workflow of another caller")
        if handle is not None and self._by_handle.get(handle) is not workflow:
            raise CallerError(Reason.HANDLE_INVALID, "the handle belongs to another workflow than this listener")
        return workflow

    def enter(self, workflow: Workflow, flow: LiveFlow, now: float) -> None:
        """Registers a call in flight, so that a close cuts it. `now`: monotonic seconds."""
        workflow.flows.add(flow)
        workflow.flow_count += 1
        workflow.last_used = now

    def refused(self, workflow_id: str, reason: str) -> None:
        """A call of this workflow, or on its listener, did not end well."""
        workflow = self._open.get(workflow_id) or self._ending.get(workflow_id)
        if workflow is not None:
            workflow.refused[reason] += 1

    def leave(self, workflow: Workflow, flow: LiveFlow, now: float) -> None:
        """The call has ended. `now`: monotonic seconds."""
        workflow.flows.discard(flow)
        workflow.last_used = now

    def renew(self, workflow: Workflow) -> None:
        """Pushes the idle time back; never the maximum age."""
        workflow.last_used = self._clock.monotonic()

    def expires_at(self, workflow: Workflow) -> float:
        """Wall seconds of the maximum age."""
        return self._clock.now() + max(workflow.deadline - self._clock.monotonic(), 0.0)

    @contextmanager
    def watch(self, agent: str) -> Iterator[asyncio.Queue[Workflow | None]]:
        """The changes of `agent`'s workflows while the block lasts. None ends it: the reader was too slow and missed some.

        Raises `CallerError` (too_many_connections) when the agent has too many already.
        """
        watchers = self._watchers.setdefault(agent, [])
        if len(watchers) >= _WATCHERS:
            raise CallerError(Reason.TOO_MANY_CONNECTIONS, f"this agent watches {_WATCHERS} times already")
        changes: asyncio.Queue[Workflow | None] = asyncio.Queue(_AHEAD + 1)
        watchers.append(changes)
        try:
            yield changes
        finally:
            watchers.remove(changes)

    def _changed(self, workflow: Workflow, report: CloseReport | None) -> None:
        self._on_change(workflow, report)
        for changes in self._watchers.get(workflow.agent, ()):
            if not changes.full():
                changes.put_nowait(workflow if changes.qsize() < _AHEAD else None)

    def wait_closed(self, workflow: Workflow) -> asyncio.Future[None]:
        """Done as soon as the workflow begins to close, whoever closes it."""
        waiting = self._waiting.get(workflow.id)
        if waiting is None:
            waiting = asyncio.get_running_loop().create_future()
            if workflow.is_open:
                self._waiting[workflow.id] = waiting
            else:
                waiting.set_result(None)
        return waiting

    # -- end ----------------------------------------------------------------------------------------------------

    def close(self, workflow: Workflow, reason: CloseReason) -> asyncio.Task[CloseReport]:
        """Ends the workflow: nothing of it is usable when this returns. The task gives the report; idempotent."""
        task = self._closing.get(workflow.id)
        if task is not None:
            return task
        if workflow.state is not WorkflowState.OPEN:
            return self._background.spawn(self._remembered(workflow), "closed workflow")
        workflow.state = step(WORKFLOW_TABLE, workflow.state, WorkflowEvent.CLOSE)
        workflow.close_reason = reason
        workflow.subject_token = None
        self._forget(workflow)
        if (waiting := self._waiting.pop(workflow.id, None)) is not None and not waiting.done():
            waiting.set_result(None)
        for flow in list(workflow.flows):
            flow.cut()
        settled = self._settle(workflow)
        self._changed(workflow, None)
        task = self._background.spawn(self._finish(workflow, settled), f"close {workflow.id}")
        self._closing[workflow.id] = task
        self._ending[workflow.id] = workflow
        return task

    async def _finish(self, workflow: Workflow, settled: asyncio.Task[CloseReport]) -> CloseReport:
        report = replace(await asyncio.shield(settled), refused=tuple(sorted(workflow.refused.items())))
        workflow.state = step(WORKFLOW_TABLE, workflow.state, WorkflowEvent.SETTLED)
        self._closing.pop(workflow.id, None)
        self._ending.pop(workflow.id, None)
        self._remember(workflow, report)
        return report

    def _remember(self, workflow: Workflow, report: CloseReport) -> None:
        self._closed[workflow.id] = (workflow, report)
        while len(self._closed) > _KEPT:
            self._closed.popitem(last=False)
        self._changed(workflow, report)

    def restarted(self, left: list[Workflow]) -> None:
        """Takes note of the workflows that the last sidecar left open: closed, remembered, and told to `on_change`."""
        for workflow in left:
            self._remember(workflow, CloseReport(workflow.id, workflow.agent, str(workflow.close_reason)))

    async def _remembered(self, workflow: Workflow) -> CloseReport:
        _, report = self._closed.get(workflow.id, (workflow, None))
        return report or CloseReport(workflow.id, workflow.agent, str(workflow.close_reason))

    def _forget(self, workflow: Workflow) -> None:
        del self._open[workflow.id]
        self._by_handle.pop(workflow.handle.reveal(), None)
        mine = self._by_agent.get(workflow.agent, {})
        mine.pop(workflow.id, None)
        if not mine:
            self._by_agent.pop(workflow.agent, None)
        if workflow.trace_id is not None:
            self._by_trace.pop((workflow.agent, workflow.trace_id), None)

    def close_all(self, reason: CloseReason, agent: str | None = None) -> list[asyncio.Task[CloseReport]]:
        """Closes every open workflow (of one agent)."""
        return [self.close(w, reason) for w in list(self._open.values()) if agent is None or w.agent == agent]

    def span_ended(self, agent: str, trace_id: str, span_id: str, parent_empty: bool) -> None:
        """A span ended, says OTLP: closes the caller's own workflow when it is the declared root, or has no parent.

        It can only take access away, and only from the agent that sent it.
        """
        workflow = self._by_trace.get((agent, trace_id))
        if workflow is None:
            return
        is_root = workflow.root_span_id == span_id if workflow.root_span_id is not None else parent_empty
        if is_root:
            self.close(workflow, CloseReason.SPAN_ENDED)

    # -- time ---------------------------------------------------------------------------------------------------

    def _due(self, workflow: Workflow) -> float:
        return min(workflow.deadline, workflow.last_used + workflow.idle_seconds)

    async def run(self) -> None:
        """For ever: closes what is too old or idle. One heap; a workflow that was used goes back into it."""
        while True:
            await self._clock.sleep(_SWEEP)
            self.expire()

    def expire(self) -> None:
        """Closes every workflow that is due now."""
        now = self._clock.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, workflow_id = heapq.heappop(self._deadlines)
            workflow = self._open.get(workflow_id)
            if workflow is None:
                continue
            if now >= workflow.deadline:
                self.close(workflow, CloseReason.MAX_AGE)
            elif now >= workflow.last_used + workflow.idle_seconds and not workflow.flows:
                self.close(workflow, CloseReason.IDLE)
            else:
                again = (
                    self._due(workflow) if not workflow.flows else min(workflow.deadline, now + workflow.idle_seconds)
                )
                heapq.heappush(self._deadlines, (again, workflow_id))


def _no_workflow(caller: Caller) -> str:
    if len(caller.agents) > 1:
        return "several agents share this uid, so the call must carry its workflow's handle"
    return "the call names no open workflow: no listener of its own, no handle, no traceparent of one"
