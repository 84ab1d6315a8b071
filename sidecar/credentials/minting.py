"""One exchange: within its deadline, checked, with the issuer's health noted, and nothing minted ever lost sight of."""

import asyncio
from collections.abc import Mapping

from sidecar.clock import Clock
from sidecar.credentials.header import render
from sidecar.credentials.held import Held
from sidecar.errors import AnswerLost, IssuerError, Reason, SpanlockError
from sidecar.model.lease import Credential, RevocationRecord
from sidecar.ports import Exchanger
from sidecar.tasks import told_to_end
from sidecar.telemetry.logging import logger

SKEW = 2.0
"""Seconds before expiry at which a credential is no longer used: it must still be good when it arrives."""


class Mint:
    """Asks the issuers. `exchangers` is shared with the revoker; a reload changes it in place."""

    def __init__(self, exchangers: Mapping[str, Exchanger], clock: Clock, deadline: float) -> None:
        self._exchangers = exchangers
        self._clock = clock
        self._deadline = deadline
        self._issuers: dict[str, tuple[SpanlockError | None, float]] = {}
        """Issuer to what its last exchange failed with, and in wall seconds since when it is well, or is not."""
        self._log = logger("mint")

    async def credential(self, held: Held, ttl: float) -> tuple[Credential, bytes]:
        """A new credential for `held` and its header's full value. Raises `SpanlockError`; what had been minted by then
        is doomed, and an answer that was never seen is noted."""
        minted: list[RevocationRecord] = []
        try:
            credential = await self._exchange(held, ttl, minted)
            if credential.expires_at - self._clock.now() <= SKEW:
                raise IssuerError(Reason.CREDENTIAL_UNUSABLE, "the issuer gave a credential that expires at once")
            return credential, render(held.tool, credential.value)
        except BaseException as error:
            held.doom(minted)
            held.lost_answer = held.lost_answer or isinstance(error, AnswerLost)
            raise

    async def _exchange(self, held: Held, ttl: float, minted: list[RevocationRecord]) -> Credential:
        issuer = held.lease.key.issuer
        exchanger = self._exchangers[issuer]
        try:
            async with asyncio.timeout(self._deadline):
                credential = await exchanger.exchange(held.workflow, held.tool, held.lease.key.scopes, ttl, minted)
        except TimeoutError:
            error = AnswerLost(Reason.ISSUER_UNAVAILABLE, f"issuer {issuer}: no answer within the exchange deadline")
            self._note(issuer, error)
            raise error from None
        except IssuerError as refused:
            self._note(issuer, refused)
            raise
        except SpanlockError:
            raise
        except (Exception, asyncio.CancelledError) as bug:
            if told_to_end():
                raise
            # Nobody knows how far it came: it is refused like any other, so that the next call tries anew.
            self._log.error("exchange_failed", issuer=issuer, exc_info=bug)
            raise AnswerLost(Reason.INTERNAL, f"issuer {issuer}: a bug in the exchange; the log has it") from None
        self._note(issuer, None)
        return credential

    def answered(self, issuer: str) -> None:
        """It took a token back, so it is there again, whatever the last exchange said."""
        error, _ = self._issuers.get(issuer, (None, 0.0))
        if error is not None and error.reason is Reason.ISSUER_UNAVAILABLE:
            self._note(issuer, None)

    def _note(self, issuer: str, error: SpanlockError | None) -> None:
        """Logs each change, the first answer too: well, or for which other reason not."""
        known = issuer in self._issuers
        before, since = self._issuers.get(issuer, (None, 0.0))
        if not known or (before is None) is not (error is None):
            since = self._clock.now()
        self._issuers[issuer] = (error, since)
        url = self._exchangers[issuer].server
        if error is None:
            if not known or before is not None:
                self._log.info("issuer_up", issuer=issuer, url=url)
        elif before is None or before.reason is not error.reason:
            why = {"reason": str(error.reason), "detail": error.detail, "effect": _effect(False, False)}
            self._log.warning("issuer_down", issuer=issuer, url=url, **why)

    def health(self, failing: Mapping[str, str]) -> list[dict[str, object]]:
        """One row for each issuer. `failing`: those that do not revoke, and why. One that nobody asked yet is no failure."""
        return [self._row(issuer, failing.get(issuer)) for issuer in self._exchangers]

    def _row(self, issuer: str, revokes_not: str | None) -> dict[str, object]:
        error, since = self._issuers.get(issuer, (None, None))
        ok = error is None and revokes_not is None
        state = "not asked yet" if ok and since is None else "ok" if ok else "down"
        return {
            "name": f"issuer {issuer}",
            "ok": ok,
            "state": state,
            "since": since,
            "last_error": error.detail if error is not None else revokes_not or "",
            "next_try": None,
            "effect": _effect(error is None, revokes_not is not None),
        }


def _effect(issues: bool, revokes_not: bool) -> str:
    if not issues:
        return (
            "calls that need a new credential fail, and the next one asks again; active leases serve until they expire"
        )
    return "dropped credentials live on at the issuer; they are revoked until they expire" if revokes_not else ""
