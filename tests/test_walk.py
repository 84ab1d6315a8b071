"""Every interleaving of one workflow and two leases over the shipped tables: no usable credential outlives its workflow.

The walk fires in each state exactly the events that the broker, its renewer, its endings and the registry fire there, and
asks the shipped tables where that leads: an event without a row is a failure, as it is a bug in the daemon. Beside the
tables' states it keeps what is so in the world whatever a table says: which exchange is in flight, what lives at the
issuer, whether the broker has dropped the lease, whether the report is out. What must hold ties the two together, so a row
that is missing or leads astray shows. `tests/test_drive.py` walks the real broker and registry, and finds the same rows.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from sidecar.machine import IllegalTransition, step
from sidecar.model.lease import LEASE_TABLE, USABLE, LeaseEvent, LeaseState
from sidecar.model.workflow import WORKFLOW_TABLE, WorkflowEvent, WorkflowState

Row = tuple[Any, Any]
"""(state, event) of either table."""

_DROPPED = "a dropped lease is out of the broker's index at once, and the broker drops only what it finds there"
_CLOSED = "the registry gives whoever comes later the first one's task, and asks no table"
NEVER_TAKEN: dict[Row, str] = {
    (LeaseState.REVOKING, LeaseEvent.EXPIRED): _DROPPED,
    (LeaseState.REVOKING, LeaseEvent.WORKFLOW_CLOSED): _DROPPED,
    (LeaseState.REVOKING, LeaseEvent.WITHDRAWN): _DROPPED,
    (WorkflowState.CLOSING, WorkflowEvent.CLOSE): _CLOSED,
    (WorkflowState.CLOSED, WorkflowEvent.CLOSE): _CLOSED,
}
"""Rows that say that a second end of the same thing does no harm, and which today's code does not need: with the reason."""
ROWS: list[Row] = [*LEASE_TABLE, *WORKFLOW_TABLE]


def name_of(row: Row) -> str:
    return f"{row[0].value}-{row[1].value}"


class Recorded(dict[Any, Any]):
    """A table that notes which of its rows are taken."""

    def __init__(self, rows: Any) -> None:
        super().__init__(rows)
        self.taken: set[Row] = set()

    def __getitem__(self, row: Row) -> Any:
        self.taken.add(row)
        return super().__getitem__(row)


@dataclass(frozen=True)
class One:
    """One lease: its state, which only the table changes, and what is so whatever the table says."""

    state: LeaseState = LeaseState.PENDING
    place: str = "live"
    """"live": in the broker's index; "ending": dropped, its ending under way; "over": nothing will happen to it any more."""
    exchange: str = "first"
    """In flight: "first", "renewal" or ""."""
    installed: bool = False
    """Its credential lives at the issuer, and so may a superseded one."""
    doomed: bool = False
    """What was minted lives at the issuer, and only the revoker has it."""


@dataclass(frozen=True)
class Joint:
    """Two leases (None: not begun) and their workflow: its state by the table, and what has been done to it."""

    leases: tuple[One | None, One | None] = (None, None)
    workflow: WorkflowState = WorkflowState.OPEN
    done: str = "nothing"
    """"nothing", "closed" (every lease was dropped) or "reported" (each lease's end was told, as what it is)."""


@dataclass
class Walk:
    """Goes through all that can happen, over its own copies of the tables."""

    lease_table: Recorded = field(default_factory=lambda: Recorded(LEASE_TABLE))
    workflow_table: Recorded = field(default_factory=lambda: Recorded(WORKFLOW_TABLE))
    seen: set[Joint] = field(default_factory=set)

    def run(self) -> "Walk":
        """Raises `AssertionError` where a property fails, and `IllegalTransition` where the tables have no row."""
        queue = deque([Joint()])
        while queue:
            joint = queue.popleft()
            if joint not in self.seen:
                self.seen.add(joint)
                check(joint)
                queue.extend(self.moves(joint))
        return self

    def moves(self, joint: Joint) -> Iterator[Joint]:
        for index, lease in enumerate(joint.leases):
            for after in self.of_lease(lease, joint.done == "nothing"):
                pair = (after, joint.leases[1]) if index == 0 else (joint.leases[0], after)
                yield replace(joint, leases=pair)
        if joint.done == "nothing":
            one, other = (
                self.drop(x, LeaseEvent.WORKFLOW_CLOSED) if x and x.place == "live" else x for x in joint.leases
            )
            closing = step(self.workflow_table, joint.workflow, WorkflowEvent.CLOSE)
            yield Joint((one, other), closing, "closed")
        elif joint.done == "closed":  # every end has come, or the deadline has
            yield replace(
                joint, workflow=step(self.workflow_table, joint.workflow, WorkflowEvent.SETTLED), done="reported"
            )

    def of_lease(self, lease: One | None, may_begin: bool) -> Iterator[One]:
        """All that can happen to one lease next, but for its workflow's close."""
        if lease is None or lease.place == "over":
            if may_begin:
                yield One()
            return
        if lease.exchange == "first":
            yield from self.of_first_exchange(lease)
        elif lease.exchange == "renewal":
            yield from self.of_renewal(lease)
        if lease.place == "live":
            yield self.drop(
                lease, LeaseEvent.WITHDRAWN
            )  # by operator or release; pending, when a reload changed the tool
            if lease.state in USABLE:
                yield self.drop(lease, LeaseEvent.EXPIRED)
                if not lease.exchange:
                    yield replace(lease, exchange="renewal")
                if lease.doomed:
                    yield replace(lease, doomed=False)  # a superseded or half-minted token was revoked
                else:
                    yield replace(
                        lease, doomed=True
                    )  # a superseded one, after its grace (more often than there is one)
        elif not lease.exchange:
            yield replace(lease, state=self.step(lease, LeaseEvent.REVOKE_DONE), place="over", doomed=False)

    def of_first_exchange(self, lease: One) -> Iterator[One]:
        lease = replace(lease, exchange="")
        yield self.arrive(lease, LeaseEvent.ISSUED)
        if lease.place == "live":  # refused: with nothing minted it is over, else it ends like any other
            yield replace(lease, state=self.step(lease, LeaseEvent.ISSUE_FAILED), place="over")
            dropped = replace(self.drop(lease, LeaseEvent.WITHDRAWN), doomed=True)
            yield replace(dropped, state=self.step(dropped, LeaseEvent.ISSUE_FAILED))
        else:
            failed = replace(lease, state=self.step(lease, LeaseEvent.ISSUE_FAILED))
            yield from (failed, replace(failed, doomed=True))

    def of_renewal(self, lease: One) -> Iterator[One]:
        lease = replace(lease, exchange="")
        yield self.arrive(lease, LeaseEvent.RENEWED)
        failed = replace(lease, state=self.step(lease, LeaseEvent.RENEW_FAILED))
        yield from (failed, replace(failed, doomed=True))
        yield self.drop(lease, LeaseEvent.WITHDRAWN) if lease.state in USABLE else lease  # policy says no

    def arrive(self, lease: One, event: LeaseEvent) -> One:
        """A credential comes: installed, unless the lease is being revoked."""
        state = self.step(lease, event)
        revoked = state is LeaseState.REVOKING
        return replace(lease, state=state, installed=lease.installed or not revoked, doomed=lease.doomed or revoked)

    def drop(self, lease: One, event: LeaseEvent) -> One:
        doomed = lease.doomed or lease.installed
        return replace(lease, state=self.step(lease, event), place="ending", installed=False, doomed=doomed)

    def step(self, lease: One, event: LeaseEvent) -> LeaseState:
        state: LeaseState = step(self.lease_table, lease.state, event)
        return state


def check(joint: Joint) -> None:
    """What must hold in each joint state."""
    for lease in filter(None, joint.leases):
        usable = lease.state in USABLE
        assert not (usable and joint.workflow is not WorkflowState.OPEN), f"usable beyond its workflow: {joint}"
        assert not (usable and joint.done != "nothing"), f"usable after the close: {joint}"
        assert not (usable and not (lease.place == "live" and lease.installed)), f"usable without a credential: {joint}"
        lives = lease.installed or lease.doomed or lease.exchange
        assert not (lease.state is LeaseState.GONE and lives), f"gone, while something of it lives: {joint}"
        assert not (joint.done == "reported" and lives and lease.state is not LeaseState.REVOKING), (
            f"unreported: {joint}"
        )
        assert lease.state is not LeaseState.PENDING or (lease.exchange and lease.place == "live"), f"for ever: {joint}"
        assert (lease.state is LeaseState.REVOKING) is (lease.place == "ending"), f"not what the report says: {joint}"
        assert (lease.state is LeaseState.GONE) is (lease.place == "over"), f"not what the report says: {joint}"
    done = {WorkflowState.OPEN: "nothing", WorkflowState.CLOSING: "closed", WorkflowState.CLOSED: "reported"}
    assert joint.done == done[joint.workflow], f"the workflow's state is not what became of it: {joint}"


def test_no_reachable_state_has_a_usable_credential_beyond_its_workflow(capsys: pytest.CaptureFixture[str]) -> None:
    walk = Walk().run()
    states = {lease.state for joint in walk.seen for lease in joint.leases if lease is not None}
    assert states == set(LeaseState) and {joint.workflow for joint in walk.seen} == set(WorkflowState)
    assert walk.lease_table.taken | walk.workflow_table.taken == set(ROWS) - set(NEVER_TAKEN)
    with capsys.disabled():
        print(f"\nthe walk of the workflow and lease tables saw {len(walk.seen)} joint states")


@pytest.mark.parametrize("row", [row for row in ROWS if row not in NEVER_TAKEN], ids=name_of)
def test_the_walk_fails_without_any_row_that_is_taken(row: Row) -> None:
    walk = Walk()
    for table in (walk.lease_table, walk.workflow_table):
        table.pop(row, None)
    with pytest.raises(IllegalTransition):
        walk.run()


SAME = (set(USABLE),)
"""States between which a row may choose without harm: both are usable, and tell only whether the last renewal worked."""


@pytest.mark.parametrize("row", [row for row in ROWS if row not in NEVER_TAKEN], ids=name_of)
def test_the_walk_fails_when_any_row_leads_astray(row: Row) -> None:
    """A table that has all its rows is not yet right: each row, led to each state that it must not lead to, is found out."""
    for table in ("lease_table", "workflow_table"):
        right = getattr(Walk(), table).get(row)
        for wrong in type(right) if right is not None else ():
            if wrong is right or any({wrong, right} <= same for same in SAME):
                continue
            walk = Walk()
            getattr(walk, table)[row] = wrong
            with pytest.raises((AssertionError, IllegalTransition)):
                walk.run()


def test_every_lease_state_is_left_and_nothing_leaves_the_end() -> None:
    left = {state for state, _ in LEASE_TABLE}
    assert left == set(LeaseState) - {LeaseState.GONE}
    assert set(LEASE_TABLE.values()) == set(LeaseState) - {LeaseState.PENDING}
