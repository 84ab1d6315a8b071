"""What the issuer is told when a credential ends, and the truth about it.

For each token: look it up (was it active?), revoke it, look it up again. `confirmed` needs both look-ups: an issuer that
answers `active: false` to whoever asks proves nothing. A failed revocation is tried again until the token's own expiry.
"""

import asyncio
import random
from collections.abc import Mapping
from dataclasses import dataclass

from sidecar.backoff import delays
from sidecar.clock import Clock
from sidecar.errors import SpanlockError
from sidecar.model.lease import IssuerOutcome, RevocationRecord
from sidecar.model.tool import Tool
from sidecar.ports import Exchanger
from sidecar.telemetry.logging import logger

_LOOK_SECONDS = 1.0
"""The look-up before must not hold the revocation up for longer."""
_FIRST, _CAP = 0.5, 30.0

_BADNESS = (
    IssuerOutcome.NOT_ISSUED,
    IssuerOutcome.CONFIRMED,
    IssuerOutcome.EXPIRED,
    IssuerOutcome.ACKNOWLEDGED,
    IssuerOutcome.LOCAL_ONLY,
    IssuerOutcome.MINT_UNKNOWN,
    IssuerOutcome.FAILED,
)


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of one token."""

    record: RevocationRecord
    outcome: IssuerOutcome
    at: float
    """Monotonic seconds at which the issuer had taken it back; before the look-up after."""


def worst(outcomes: list[IssuerOutcome]) -> IssuerOutcome:
    """A lease that minted several tokens is as dead as the one that is least so."""
    return max(outcomes, key=_BADNESS.index, default=IssuerOutcome.NOT_ISSUED)


class Revoker:
    """Bounded per issuer, so that a burst of closes does not overrun it."""

    def __init__(self, exchangers: Mapping[str, Exchanger], clock: Clock, rng: random.Random, parallel: int) -> None:
        self.exchangers = dict(exchangers)
        self._clock = clock
        self._rng = rng
        self._parallel = parallel
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._log = logger("revoker")
        self.failing: dict[str, str] = {}
        """Issuer to the last reason why it does not revoke; empty when all do."""
        self.backlog = 0
        """Tokens that are still to be revoked."""

    async def end(self, record: RevocationRecord, tool: Tool) -> Ended:
        """Revokes one token; returns at the final outcome, which may be its own expiry. Never raises an issuer's error."""
        if not record.revocable:
            return Ended(record, IssuerOutcome.LOCAL_ONLY, self._clock.monotonic())
        self.backlog += 1
        try:
            return await self._end(record, tool)
        finally:
            self.backlog -= 1

    async def _end(self, record: RevocationRecord, tool: Tool) -> Ended:
        gate = self._gates.setdefault(record.issuer, asyncio.Semaphore(self._parallel))
        before: bool | None = None
        for number, wait in enumerate(delays(_FIRST, _CAP, self._rng)):
            if record.expires_at <= self._clock.now():
                return Ended(record, IssuerOutcome.EXPIRED, self._clock.monotonic())
            async with gate:
                exchanger = self.exchangers[record.issuer]  # a reload may have mended it
                if number == 0:
                    before = await self._look(exchanger, record, tool)
                outcome = await self._try(exchanger, record)
                if outcome is not None:
                    at = self._clock.monotonic()
                    after = await self._look(exchanger, record, tool) if outcome is IssuerOutcome.ACKNOWLEDGED else None
                    if after is not True:
                        return Ended(record, _proved(outcome, before, after), at)
                    self.failing[record.issuer] = "a revoked token is still active"
            await self._clock.sleep(min(wait, max(record.expires_at - self._clock.now(), 0.0)))
        raise AssertionError("delays never end")

    async def _try(self, exchanger: Exchanger, record: RevocationRecord) -> IssuerOutcome | None:
        try:
            outcome = await exchanger.revoke(record)
        except SpanlockError as error:
            if record.issuer not in self.failing:
                self._log.warning(
                    "revocation_failed", issuer=record.issuer, reason=str(error.reason), detail=error.detail
                )
            self.failing[record.issuer] = str(error.reason)
            return None
        if self.failing.pop(record.issuer, None) is not None:
            self._log.info("revocation_recovered", issuer=record.issuer)
        return outcome

    async def _look(self, exchanger: Exchanger, record: RevocationRecord, tool: Tool) -> bool | None:
        """The look-up; None when it cannot be had in time."""
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                return await exchanger.introspect(record, tool)
        except (SpanlockError, TimeoutError):
            return None


def _proved(outcome: IssuerOutcome, before: bool | None, after: bool | None) -> IssuerOutcome:
    if outcome is IssuerOutcome.ACKNOWLEDGED and before is True and after is False:
        return IssuerOutcome.CONFIRMED
    return outcome
