"""When a credential is renewed: at 60–70 % of its life if it was used since it was issued; else it ends with its time.

One task looks at every live lease each second; with 5,000 leases that is a few milliseconds, and a heap would have to be
kept in step with every drop and re-issue.
"""

from sidecar.clock import Clock
from sidecar.credentials.broker import Broker
from sidecar.model.lease import USABLE

_INTERVAL = 1.0
_RETRY = 5.0
"""Seconds after a failed renewal."""


class Renewer:
    """Drives `Broker.renew` and `Broker.expire`."""

    def __init__(self, broker: Broker, clock: Clock) -> None:
        self._broker = broker
        self._clock = clock

    async def run(self) -> None:
        """For ever."""
        while True:
            await self._clock.sleep(_INTERVAL)
            self.tick()

    def tick(self) -> None:
        """Begins every renewal that is due and ends what has run out."""
        now = self._clock.monotonic()
        for held in self._broker.live.matching():
            if held.lease.state not in USABLE:
                continue
            if now >= held.lease.usable_until:
                self._broker.expire(held)
            elif now >= held.renew_at and held.used_since_issue and not held.exported and held.exchanging is None:
                held.renew_at = now + _RETRY
                self._broker.renew(held)
