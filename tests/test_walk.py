"""Every interleaving of one workflow and one lease, over the shipped tables: no usable credential outlives its workflow."""

from collections import deque
from dataclasses import dataclass, replace

from sidecar.machine import IllegalTransition, step
from sidecar.model.lease import LEASE_TABLE, USABLE, LeaseEvent, LeaseState
from sidecar.model.workflow import WORKFLOW_TABLE, WorkflowEvent, WorkflowState


@dataclass(frozen=True)
class Joint:
    """One joint state: the two tables' states, whether an exchange is in flight, and what lives at the issuer."""

    workflow: WorkflowState = WorkflowState.OPEN
    lease: LeaseState = LeaseState.PENDING
    in_flight: bool = True
    held: bool = False
    """A credential that flows may use."""
    doomed: bool = False
    """A credential that only the revoker has."""
    reported: bool = False
    """The lease's end is in the report, as what it is."""


def lease_step(joint: Joint, event: LeaseEvent) -> Joint | None:
    try:
        return replace(joint, lease=step(LEASE_TABLE, joint.lease, event))
    except IllegalTransition:
        return None


def drop(joint: Joint, event: LeaseEvent) -> Joint | None:
    after = lease_step(joint, event)
    return after and replace(after, held=False, doomed=joint.doomed or joint.held)


def arrive(joint: Joint, event: LeaseEvent) -> Joint | None:
    """A value arrives: installed while the lease is usable, else straight to the revoker."""
    after = lease_step(joint, event)
    if after is None:
        return None
    usable = after.lease in USABLE
    return replace(after, in_flight=False, held=usable, doomed=joint.doomed or joint.held or not usable)


def moves(joint: Joint) -> list[Joint | None]:
    found: list[Joint | None] = []
    if joint.in_flight:
        renewing = joint.held or joint.lease is LeaseState.REVOKING
        found += [arrive(joint, LeaseEvent.RENEWED if renewing and joint.held else LeaseEvent.ISSUED)]
        failed = lease_step(joint, LeaseEvent.RENEW_FAILED if joint.held else LeaseEvent.ISSUE_FAILED)
        found += [failed and replace(failed, in_flight=False)]
    elif joint.lease in USABLE:
        found += [replace(joint, in_flight=True)]  # a renewal begins
    if joint.lease in USABLE:
        found += [drop(joint, LeaseEvent.EXPIRED)]
    if joint.lease is not LeaseState.GONE:
        found += [drop(joint, LeaseEvent.WITHDRAWN)]
    closing = step(WORKFLOW_TABLE, joint.workflow, WorkflowEvent.CLOSE)
    if joint.lease is LeaseState.GONE:
        found += [replace(joint, workflow=closing)]
    else:
        dropped = drop(joint, LeaseEvent.WORKFLOW_CLOSED)
        found += [dropped and replace(dropped, workflow=closing)]
    if joint.lease is LeaseState.REVOKING and not joint.in_flight:
        done = lease_step(joint, LeaseEvent.REVOKE_DONE)
        found += [done and replace(done, doomed=False, reported=True)]
    if joint.workflow is WorkflowState.CLOSING:
        settled = step(WORKFLOW_TABLE, joint.workflow, WorkflowEvent.SETTLED)
        found += [replace(joint, workflow=settled, reported=True)]  # finished, or reported as `failed` at the deadline
    return found


def test_no_reachable_state_has_a_usable_credential_beyond_its_workflow() -> None:
    seen: set[Joint] = set()
    queue = deque([Joint(), Joint(lease=LeaseState.PENDING, in_flight=True)])
    while queue:
        joint = queue.popleft()
        if joint in seen:
            continue
        seen.add(joint)
        if joint.workflow is not WorkflowState.OPEN:
            assert not joint.held and joint.lease not in USABLE, joint
        if joint.workflow is WorkflowState.CLOSED and (joint.doomed or joint.in_flight):
            assert joint.reported, joint
        if joint.lease is LeaseState.GONE:
            assert not joint.held and not joint.doomed and not joint.in_flight, joint
        queue.extend(after for after in moves(joint) if after is not None)
    assert {joint.lease for joint in seen} == set(LeaseState)
    assert {joint.workflow for joint in seen} == set(WorkflowState)
    print(f"the walk of the workflow and lease tables saw {len(seen)} joint states")


def test_every_lease_state_is_left_and_nothing_leaves_the_end() -> None:
    left = {state for state, _ in LEASE_TABLE}
    assert left == set(LeaseState) - {LeaseState.GONE}
    assert set(LEASE_TABLE.values()) == set(LeaseState) - {LeaseState.PENDING}
