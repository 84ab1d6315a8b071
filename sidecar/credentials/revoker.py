"""What the issuer is told when a credential ends, and the truth about it.

For each token: look it up (was it active?), revoke it, look it up again. `confirmed` needs both look-ups: an issuer that
answers `active: false` to whoever asks proves nothing. A failed revocation is tried again until the token's own expiry.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping

from sidecar.backoff import delays
from sidecar.clock import Clock
from sidecar.errors import Reason, SpanlockError
from sidecar.model.lease import IssuerOutcome, RevocationRecord
from sidecar.model.tool import Tool
from sidecar.ports import Exchanger
from sidecar.tasks import told_to_end
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


def worst(outcomes: list[IssuerOutcome]) -> IssuerOutcome:
    """A lease that minted several tokens is as dead as the one that is least so."""
    return max(outcomes, key=_BADNESS.index, default=IssuerOutcome.NOT_ISSUED)


class Revoker:
    """Bounded per issuer, so that a burst of closes does not overrun it."""

    def __init__(self, exchangers: Mapping[str, Exchanger], clock: Clock, rng: random.Random, parallel: int) -> None:
        self.exchangers = dict(exchangers)
        self._replaced: dict[tuple[str, str], Exchanger] = {}
        self._clock = clock
        self._rng = rng
        self._parallel = parallel
        self._gates: dict[str, asyncio.Semaphore] = {}
        self._log = logger("revoker")
        self.failing: dict[str, str] = {}
        """Issuer to the last reason why it does not revoke; empty when all do."""
        self.waiting: Counter[str] = Counter()
        """Issuer to how many tokens are still to be revoked there."""
        self.unproven: dict[tuple[str, str], str] = {}
        """(issuer, tool) to why its last revocation could not be confirmed."""
        self.on_answer: Callable[[str], None] = lambda issuer: None
        """Told the name of an issuer that took a token back: it is there."""

    @property
    def backlog(self) -> int:
        """Tokens that are still to be revoked."""
        return self.waiting.total()

    def replace(self, exchangers: Mapping[str, Exchanger]) -> None:
        """A reload: new ones, or mended ones. One that is another server from now on stays for what it minted."""
        for name, exchanger in exchangers.items():
            before = self.exchangers.get(name)
            if before is not None and before.server != exchanger.server:
                self._replaced[name, before.server] = before
            self.exchangers[name] = exchanger

    def _exchanger(self, record: RevocationRecord) -> Exchanger:
        """The one of the server that minted it, as the last reload left it."""
        exchanger = self.exchangers[record.issuer]
        return exchanger if exchanger.server == record.minted_at else self._replaced[record.issuer, record.minted_at]

    async def end(self, record: RevocationRecord, tool: Tool) -> IssuerOutcome:
        """Revokes one token; returns at the final outcome, which may be its own expiry. Never raises an issuer's error."""
        if not record.revocable:
            return IssuerOutcome.LOCAL_ONLY
        issuer = record.issuer
        self.waiting[issuer] += 1
        try:
            return await self._end(record, tool)
        finally:
            self.waiting[issuer] -= 1
            if not self.waiting[issuer]:
                del self.waiting[issuer]
                self.failing.pop(issuer, None)  # what it did not revoke has expired

    async def _end(self, record: RevocationRecord, tool: Tool) -> IssuerOutcome:
        gate = self._gates.setdefault(record.issuer, asyncio.Semaphore(self._parallel))
        before: bool | None = None
        for number, wait in enumerate(delays(_FIRST, _CAP, self._rng)):
            if (
                number and record.expires_at <= self._clock.now()
            ):  # once at least: our clock may be the one that is wrong
                return IssuerOutcome.EXPIRED
            async with gate:
                exchanger = self._exchanger(record)
                if number == 0:
                    before = await self._look(exchanger, record, tool)
                outcome = await self._try(exchanger, record, tool, before)
            if outcome is not None:
                return outcome
            await self._clock.sleep(min(wait, max(record.expires_at - self._clock.now(), 0.0)))
        raise AssertionError("delays never end")

    async def _try(
        self, exchanger: Exchanger, record: RevocationRecord, tool: Tool, before: bool | None
    ) -> IssuerOutcome | None:
        """One try, and the look-up after it. None: it is not revoked."""
        try:
            outcome = await exchanger.revoke(record)
        except (Exception, asyncio.CancelledError) as error:
            # Whatever it is, a bug of ours too: the token is still out there and is tried again.
            if told_to_end():
                raise
            self._failed(record.issuer, error)
            return None
        self.on_answer(record.issuer)
        after = await self._look(exchanger, record, tool) if outcome is IssuerOutcome.ACKNOWLEDGED else None
        if after is True:
            self._note(record.issuer, "a revoked token is still active")
            return None
        if self.failing.pop(record.issuer, None) is not None:
            self._log.info("revocation_recovered", issuer=record.issuer)
        if outcome is IssuerOutcome.ACKNOWLEDGED and before is False:
            why = "the look-up said inactive before the revocation, too: is its client in the token's audience?"
            self._blind(record, tool, why)
        return self._proved(record, tool, before, after) if outcome is IssuerOutcome.ACKNOWLEDGED else outcome

    def _proved(self, record: RevocationRecord, tool: Tool, before: bool | None, after: bool | None) -> IssuerOutcome:
        """Confirmed by both look-ups, or only acknowledged."""
        if before is not True or after is not False:
            return IssuerOutcome.ACKNOWLEDGED
        if self.unproven.pop((record.issuer, tool.name), None) is not None:
            self._log.info("revocation_is_proved_again", issuer=record.issuer, tool=tool.name)
        return IssuerOutcome.CONFIRMED

    def _blind(self, record: RevocationRecord, tool: Tool, why: str) -> None:
        """Says once why a revocation of this tool's tokens cannot be proved."""
        if self.unproven.get((record.issuer, tool.name)) != why:
            self._log.warning("revocation_not_proved", issuer=record.issuer, tool=tool.name, detail=why)
        self.unproven[record.issuer, tool.name] = why

    def _failed(self, issuer: str, error: BaseException) -> None:
        if isinstance(error, SpanlockError):
            self._note(issuer, str(error.reason), error.detail)
        else:
            self._note(issuer, str(Reason.INTERNAL), "a bug in the revocation", error)

    def _note(self, issuer: str, why: str, detail: str = "", bug: BaseException | None = None) -> None:
        """Logs the first failure of a row of them."""
        if issuer not in self.failing:
            more = {"exc_info": bug} if bug is not None else {}
            self._log.warning("revocation_failed", issuer=issuer, reason=why, detail=detail, **more)
        self.failing[issuer] = why

    async def _look(self, exchanger: Exchanger, record: RevocationRecord, tool: Tool) -> bool | None:
        """The look-up; None when it cannot be had, or not in time."""
        try:
            async with asyncio.timeout(_LOOK_SECONDS):
                active = await exchanger.introspect(record, tool)
            if active is None:
                self._blind(record, tool, "the issuer has no introspection endpoint")
            return active
        except SpanlockError as error:
            self._blind(record, tool, error.detail)
        except TimeoutError:
            self._blind(record, tool, f"the look-up took over {_LOOK_SECONDS:g} s")
        except (Exception, asyncio.CancelledError) as bug:
            if told_to_end():
                raise
            self._log.error("introspection_failed", issuer=record.issuer, exc_info=bug)
            self._blind(record, tool, "a bug in the look-up; the log has it")
        return None
