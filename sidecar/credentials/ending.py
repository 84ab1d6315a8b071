"""How dropped leases end: all that each ever minted is revoked, and the two facts are told.

A drop is over when `begin` is called; what follows may take as long as the issuer takes. Waiting has a deadline, trying
has not: a lease that is reported `failed` is tried on until its token expires.
"""

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from typing import TypeVar

from sidecar.clock import Clock
from sidecar.credentials.config import CredentialsConfig
from sidecar.credentials.events import LeaseEvents
from sidecar.credentials.held import Held
from sidecar.credentials.revoker import Revoker, worst
from sidecar.machine import step
from sidecar.model.lease import LEASE_TABLE, IssuerOutcome, LeaseEnd, LeaseEvent, TokenCheck
from sidecar.tasks import Background

T = TypeVar("T")

_KEPT = 1000
"""Ended leases kept for one workflow's report; the audit log has all of them."""


class Endings:
    """Every lease that was dropped and whose workflow has not been reported yet."""

    def __init__(
        self, revoker: Revoker, clock: Clock, config: CredentialsConfig, background: Background, events: LeaseEvents
    ) -> None:
        self._revoker = revoker
        self._clock = clock
        self._config = config
        self._background = background
        self._events = events
        self._by_workflow: dict[str, deque[Held]] = {}
        self._under_way: dict[asyncio.Task[LeaseEnd], Held] = {}

    def begin(self, held: Held, reason: str) -> None:
        """Revokes all that `held` ever minted, in the background. Its credential has been stripped already."""
        held.ending = self._background.spawn(self._end(held, reason), f"revoke {held.lease.id}")
        self._under_way[held.ending] = held
        held.ending.add_done_callback(self._under_way.pop)
        self._by_workflow.setdefault(held.workflow.id, deque(maxlen=_KEPT)).append(held)

    def take(self, workflow_id: str) -> list[Held]:
        """The ended leases of a workflow, for its report; forgotten here."""
        return list(self._by_workflow.pop(workflow_id, ()))

    async def ends(self, helds: list[Held]) -> list[LeaseEnd]:
        """How each of these ended, or that it has not yet at the deadline."""
        await self._wait([h.ending for h in helds if h.ending is not None], self._config.revoke_deadline)
        return [
            _result(held.ending)
            or self._facts(held, IssuerOutcome.FAILED, "not revoked yet; it is tried until the token expires")
            for held in helds
        ]

    async def retire(self, held: Held) -> None:
        """Revokes superseded tokens after the grace for calls already sent; a drop takes them over at once."""
        await self._clock.sleep(self._config.supersede_grace)
        records, held.superseded[:] = list(held.superseded), []
        held.doomed.extend(records)
        self.revoke_doomed(held)

    def revoke_doomed(self, held: Held) -> None:
        """Tells the issuer of each doomed token; the lease itself may live on."""
        records, held.doomed = held.doomed, []
        held.revoking += [self._background.spawn(self._revoker.end(r, held.tool), "revoke token") for r in records]

    async def drain(self, seconds: float) -> list[LeaseEnd]:
        """Waits for revocations under way, at most `seconds`. Returns, and tells, how those stand that are left."""
        await self._wait(list(self._under_way), seconds)
        left: list[LeaseEnd] = []
        for held in self._under_way.values():
            end = self._facts(held, IssuerOutcome.FAILED, "not revoked when the sidecar stopped")
            self._events.tell(held, "revoked", reason="shutdown", outcome=end.at_issuer, residual=end.residual_seconds)
            left.append(end)
        return left

    async def _end(self, held: Held, reason: str) -> LeaseEnd:
        """Waits for an exchange in flight, then revokes all that the lease ever minted."""
        if held.exchanging is not None:
            await asyncio.wait({held.exchanging})
        self.revoke_doomed(held)
        if held.revoking:
            await asyncio.wait(held.revoking)
        outcomes = [_result(task) or IssuerOutcome.FAILED for task in held.revoking]
        if held.lost_answer:
            outcomes.append(IssuerOutcome.MINT_UNKNOWN)
        outcome = worst(outcomes)
        held.lease.state = step(LEASE_TABLE, held.lease.state, LeaseEvent.REVOKE_DONE)
        proof = (held.lease.key.issuer, held.tool.name)
        end = self._facts(
            held, outcome, self._revoker.unproven.get(proof, "") if outcome is IssuerOutcome.ACKNOWLEDGED else ""
        )
        self._events.tell(held, "revoked", reason=reason, outcome=outcome, residual=end.residual_seconds)
        return end

    def _facts(self, held: Held, outcome: IssuerOutcome, detail: str) -> LeaseEnd:
        """The two facts: at the issuer, and what is left at the tool."""
        left = -1.0 if math.isinf(held.expires_at) else max(held.expires_at - self._clock.now(), 0.0)
        dead = outcome in (IssuerOutcome.CONFIRMED, IssuerOutcome.ACKNOWLEDGED)
        if (held.lost_answer or held.exchanging is not None) and not dead:
            left = max(left, held.tool.max_ttl)
        if outcome is IssuerOutcome.NOT_ISSUED or (dead and held.tool.token_check is TokenCheck.INTROSPECTION):
            left = 0.0
        key = held.lease.key
        return LeaseEnd(
            lease=held.lease.id, workflow=key.workflow, agent=key.agent, tool=key.tool, at_issuer=outcome,
            residual_seconds=left, token_check=held.tool.token_check, uses=held.lease.uses, detail=detail,
            issuer=key.issuer,
        )  # fmt: skip

    async def _wait(self, tasks: Iterable[asyncio.Task[LeaseEnd]], seconds: float) -> None:
        """Waits for all of `tasks`, at most `seconds` by the injected clock."""
        pending: set[asyncio.Task[LeaseEnd]] = {task for task in tasks if not task.done()}
        if not pending:
            return
        deadline = self._background.spawn(self._clock.sleep(seconds), "revoke deadline")
        try:
            while pending and not deadline.done():
                await asyncio.wait({*pending, deadline}, return_when=asyncio.FIRST_COMPLETED)
                pending = {task for task in pending if not task.done()}
        finally:
            deadline.cancel()


def _result(task: "asyncio.Task[T] | None") -> T | None:
    """What a task returned; None while it runs, and when it failed: whoever owns it logs that."""
    if task is None or not task.done() or task.cancelled() or task.exception() is not None:
        return None
    return task.result()
