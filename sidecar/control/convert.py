"""Nouns to messages, and nothing else."""

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from sidecar.model.lease import CloseReport, Lease, LeaseEnd
from sidecar.model.workflow import Workflow
from sidecar.wire.spanlock.v1 import admin_pb2, workflows_pb2

UNBOUNDED = 315_576_000_000
"""The largest Duration there is, in seconds: a residual life without end."""


def timestamp(seconds: float | None) -> Timestamp | None:
    """Wall seconds; None stays None, infinity is left out."""
    if seconds is None or seconds == float("inf"):
        return None
    stamp = Timestamp()
    stamp.FromNanoseconds(int(seconds * 1e9))
    return stamp


def duration(seconds: float) -> Duration:
    """Seconds; -1.0 (no end) as the largest there is."""
    message = Duration()
    message.FromNanoseconds(int(seconds * 1e9)) if seconds >= 0 else message.FromSeconds(UNBOUNDED)
    return message


def workflow(noun: Workflow, expires_at: float, leases: int) -> workflows_pb2.Workflow:
    """`expires_at`: wall seconds of the maximum age."""
    return workflows_pb2.Workflow(
        id=noun.id,
        agent=noun.agent,
        name=noun.name,
        state=noun.state.value,
        opened_at=timestamp(noun.opened_at),
        expires_at=timestamp(expires_at),
        trace_id=noun.trace_id or "",
        close_reason=str(noun.close_reason or ""),
        flows=noun.flow_count,
        leases=leases,
    )


def lease_end(end: LeaseEnd) -> workflows_pb2.LeaseEnd:
    return workflows_pb2.LeaseEnd(
        lease_id=end.lease,
        tool=end.tool,
        at_issuer=str(end.at_issuer),
        residual=duration(end.residual_seconds),
        token_check=str(end.token_check),
        uses=end.uses,
        detail=end.detail,
    )


def close_report(report: CloseReport) -> workflows_pb2.CloseResponse:
    return workflows_pb2.CloseResponse(
        workflow_id=report.workflow,
        reason=report.reason,
        leases=[lease_end(end) for end in report.ends],
        dropped_after=duration(report.dropped_ms / 1000),
        revoked_after=duration(report.revoked_ms / 1000),
        refused=dict(report.refused),
    )


def lease(noun: Lease) -> admin_pb2.Lease:
    return admin_pb2.Lease(
        id=noun.id,
        workflow_id=noun.key.workflow,
        agent=noun.key.agent,
        tool=noun.key.tool,
        issuer=noun.key.issuer,
        audience=noun.key.audience or "",
        scopes=noun.key.scopes,
        state=noun.state.value,
        expires_at=timestamp(noun.ends_at) if noun.credential is not None else None,
        uses=noun.uses,
        epoch=noun.epoch,
    )
