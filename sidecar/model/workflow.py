"""A workflow: one bounded piece of an agent's work, and how it may end."""

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Protocol

from sidecar.secret import Secret


class WorkflowState(Enum):
    OPEN = "open"
    """Calls may join it."""
    CLOSING = "closing"
    """Everything is dropped here; revocations at the issuers are under way."""
    CLOSED = "closed"
    """Every lease has its final outcome."""


class WorkflowEvent(Enum):
    CLOSE = "close"
    SETTLED = "settled"
    """Each lease's revocation ended, or reached its deadline and is reported."""


_OPEN = WorkflowState.OPEN  # asked for each call; Python 3.11 takes 170 ns to find a member in its Enum

WORKFLOW_TABLE: dict[tuple[WorkflowState, WorkflowEvent], WorkflowState] = {
    (WorkflowState.OPEN, WorkflowEvent.CLOSE): WorkflowState.CLOSING,
    (
        WorkflowState.CLOSING,
        WorkflowEvent.CLOSE,
    ): WorkflowState.CLOSING,  # several ends may race: the first one names the reason
    (WorkflowState.CLOSED, WorkflowEvent.CLOSE): WorkflowState.CLOSED,
    (WorkflowState.CLOSING, WorkflowEvent.SETTLED): WorkflowState.CLOSED,
}


class CloseReason(StrEnum):
    """What ended a workflow."""

    CLOSED = "closed"
    HOLDER_GONE = "holder_gone"
    SPAN_ENDED = "span_ended"
    MAX_AGE = "max_age"
    IDLE = "idle"
    OPERATOR = "operator"
    AGENT_REMOVED = "agent_removed"
    SHUTDOWN = "shutdown"
    SIDECAR_RESTARTED = "sidecar_restarted"


class LiveFlow(Protocol):
    """What a workflow knows of a call in flight: that it can be cut."""

    def cut(self) -> None:
        """Ends the call at once; no further byte with the credential leaves. Synchronous, idempotent."""
        ...


@dataclass(slots=True, eq=False)
class Workflow:
    """One open piece of work. Fields below the line change; only `workflows.registry` changes them."""

    id: str
    """Public, not secret: `wf_` and 16 hex digits."""
    agent: str
    """The declared agent's name: the only caller that may join."""
    name: str
    """What the agent calls this work; free text of at most 128 characters."""
    handle: Secret
    """The WorkflowHandle; 128 random bits."""
    opened_at: float
    """Wall seconds."""
    deadline: float
    """Monotonic seconds of the maximum age; never moved."""
    idle_seconds: float
    trace_id: str | None = None
    """32 lower-case hex digits."""
    root_span_id: str | None = None
    """16 lower-case hex digits; None: the trace's span with an empty parent."""
    subject_token: Secret | None = None
    """A token that the host application handed in, to be exchanged on behalf of its user."""
    # ---
    state: WorkflowState = WorkflowState.OPEN
    last_used: float = 0.0
    """Monotonic seconds."""
    close_reason: CloseReason | None = None
    flows: set[LiveFlow] = field(default_factory=set)
    """Calls in flight, connections with a tunnel included."""
    flow_count: int = 0
    """All calls so far."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reason to how many calls did not end well for it."""

    @property
    def is_open(self) -> bool:
        return self.state is _OPEN
