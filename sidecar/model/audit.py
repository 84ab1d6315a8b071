"""What the audit log holds: one record a flow, a lease event, a workflow event. No field can hold a `Secret`."""

from typing import NamedTuple


class FlowRecord(NamedTuple):
    """One call, as the agent made it: never headers, never a query, never a body. A tuple, as it is made per request.

    Also an RPC on the agent's socket that was refused: `mode` is grpc, `method` the RPC's name, `status` gRPC's code, and `uid`
    is -1, as gRPC does not show it.
    """

    time: float
    """Wall seconds."""
    agent: str
    uid: int
    workflow: str
    tool: str
    method: str
    path: str
    status: int
    outcome: str
    """"ok", or the stable reason."""
    detail: str
    request_bytes: int
    """Of the body that was sent to the tool: what went out."""
    response_bytes: int
    """Of the body that was relayed to the agent."""
    duration_ms: float
    lease: str
    lease_epoch: int
    policy_ids: tuple[str, ...]
    trace_id: str
    mode: str
    upstream: str
    """The pinned IP address."""


class RpcRefusal(NamedTuple):
    """An RPC on an agent's socket that was refused; becomes a `FlowRecord`."""

    agent: str
    rpc: str
    workflow: str
    """As the agent wrote it, and so is the tool: neither need exist."""
    tool: str
    status: int
    """gRPC's code."""
    reason: str
    detail: str


class LeaseRecord(NamedTuple):
    """One event in a lease's life."""

    time: float
    event: str
    """issued, issue_failed, renewed, renew_failed, exported (the agent was given the token itself), dropped, revoked."""
    lease: str
    workflow: str
    agent: str
    tool: str
    issuer: str
    scopes: tuple[str, ...]
    outcome: str
    """At the end: what became of it at the issuer."""
    residual_seconds: float
    """At the end: at most this long it may still be accepted at the tool; -1.0: no end (a static secret)."""
    reason: str
    policy_ids: tuple[str, ...]
    seconds: float
    """How long the step took."""
    expires_at: float
    """Of an exported token by itself, in wall seconds; -1.0: no end. 0.0 for every other event."""


class WorkflowRecord(NamedTuple):
    """A workflow opened or ended."""

    time: float
    event: str
    """opened, closing, closed."""
    workflow: str
    agent: str
    name: str
    reason: str
    trace_id: str
    flows: int
    leases: int
    dropped_ms: float
    revoked_ms: float
