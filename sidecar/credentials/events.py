"""Tells the audit log and the metrics what happened to a lease."""

import math
from collections.abc import Callable

from sidecar.clock import Clock
from sidecar.credentials.held import Held
from sidecar.model.audit import LeaseRecord
from sidecar.model.lease import IssuerOutcome

OnEvent = Callable[[LeaseRecord], None]
"""Must not raise."""


class LeaseEvents:
    """One record an event."""

    def __init__(self, clock: Clock, on_event: OnEvent) -> None:
        self._clock = clock
        self._on_event = on_event

    def tell(
        self,
        held: Held,
        event: str,
        *,
        reason: str = "",
        outcome: IssuerOutcome | None = None,
        residual: float = 0.0,
        since: float | None = None,
        expires_at: float = 0.0,
    ) -> None:
        """`residual`: seconds that the token may live on at the tool; `since`: monotonic seconds at which the step began;
        `expires_at`: wall seconds until which a token that left may be used, `inf` when there is no end."""
        key = held.lease.key
        self._on_event(
            LeaseRecord(
                time=self._clock.now(), event=event, lease=held.lease.id, workflow=key.workflow, agent=key.agent, tool=key.tool,
                issuer=key.issuer, scopes=key.scopes, outcome=str(outcome or ""), residual_seconds=residual, reason=reason,
                policy_ids=held.lease.policy_ids, seconds=self._clock.monotonic() - since if since is not None else 0.0,
                expires_at=expires_at if expires_at < math.inf else -1.0,
            )
        )  # fmt: skip
