"""The way of a credential: SVID → exchanger → lease → injected → renewed → dropped → revoked.

One lease for each key (every input that changes the token); whoever asks while its exchange is under way waits for the
same one. The exchange runs in a task of its own: a caller that goes away cancels only its own wait. `drop` is synchronous
and total: when it returns, no code path can put the value on a request, and only the revoker can reach it. A workflow that
closes while its exchange is in flight is a transition of its own: the value that then arrives goes straight to the revoker.
"""

import asyncio
import math
import random
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from sidecar.clock import Clock
from sidecar.credentials.config import CredentialsConfig
from sidecar.credentials.handles import Handles
from sidecar.credentials.header import render
from sidecar.credentials.revoker import Ended, Revoker, worst
from sidecar.errors import AnswerLost, CallerError, Denied, IssuerError, Reason, SpanlockError
from sidecar.machine import step
from sidecar.model.audit import LeaseRecord
from sidecar.model.lease import (
    LEASE_TABLE,
    USABLE,
    CloseReport,
    Credential,
    IssuerOutcome,
    Lease,
    LeaseEnd,
    LeaseEvent,
    LeaseKey,
    LeaseState,
    RevocationRecord,
    TokenCheck,
)
from sidecar.model.policy import Action, Permit
from sidecar.model.tool import Tool
from sidecar.model.workflow import Workflow
from sidecar.ports import Exchanger, LeaseDecider, SvidSource
from sidecar.secret import Secret
from sidecar.tasks import Background

_SKEW = 2.0
"""Seconds before expiry at which a credential is no longer used: it must still be good when it arrives."""
_RENEW_AT = (0.6, 0.7)
"""The part of its life after which a used credential is renewed; drawn once for each, from the injected source."""


Call = tuple[str, str, tuple[str, ...]]
"""(workflow, tool, scopes): the inputs of a lease's key that differ between calls; the others are the tool's."""


@dataclass(slots=True, eq=False)
class Held:
    """A lease with what the broker needs of it."""

    lease: Lease
    workflow: Workflow
    tool: Tool
    call: Call
    exchanging: asyncio.Task[None] | None = None
    issued_at: float = 0.0
    """Monotonic seconds."""
    renew_at: float = 0.0
    used_since_issue: bool = False
    superseded: list[RevocationRecord] = field(default_factory=list)
    """Of earlier credentials, not yet revoked."""
    doomed: list[RevocationRecord] = field(default_factory=list)
    """Reachable to the revoker alone."""
    revoking: list[asyncio.Task[Ended]] = field(default_factory=list)
    """One for each token that the issuer is being told about, or was."""
    expires_at: float = 0.0
    """Wall seconds: of the last token minted."""
    lost_answer: bool = False
    ending: asyncio.Task[LeaseEnd] | None = None
    dropped_at: float = 0.0


class Broker:
    """The only writer of `Lease`'s changing fields. `credentials.renewer` drives renewal."""

    def __init__(
        self,
        *,
        clock: Clock,
        rng: random.Random,
        svids: SvidSource,
        exchangers: Mapping[str, Exchanger],
        decider: LeaseDecider,
        config: CredentialsConfig,
        background: Background,
        on_event: Callable[[LeaseRecord], None],
        on_drop: Callable[[Workflow, Lease], None],
    ) -> None:
        self.config = config
        self.decider = decider
        self.revoker = Revoker(exchangers, clock, rng, config.revoke_parallel)
        self._clock = clock
        self._rng = rng
        self._svids = svids
        self._background = background
        self._on_event = on_event
        self._on_drop = on_drop
        self._handles = Handles()
        self._calls: dict[Call, Held] = {}
        self._by_workflow: dict[str, dict[str, Held]] = {}
        self._ended: dict[str, list[Held]] = {}
        """Dropped leases by workflow, for its report."""
        self._ending: set[asyncio.Task[LeaseEnd]] = set()
        self._uses: dict[str, dict[str, int]] = {}
        """Requests by workflow and tool."""
        self._barred: dict[str, set[str]] = {}
        """Tools by workflow that an operator withdrew."""
        self._issuers: dict[str, tuple[bool, float, str]] = {}
        """Issuer to (ok, since in wall seconds, last error)."""

    # -- lease --------------------------------------------------------------------------------------------------

    def active(self, workflow: Workflow, tool: Tool, permit: Permit) -> Lease | None:
        """The lease that this call may use now, without waiting; None when it must be asked for by `lease`."""
        held = self._calls.get((workflow.id, tool.name, permit.scopes))
        if held is None or held.tool is not tool or held.lease.state not in USABLE:
            return None
        now = self._clock.monotonic()
        if now >= held.lease.usable_until or now - held.issued_at >= permit.ttl:
            return None
        return held.lease

    async def lease(self, workflow: Workflow, tool: Tool, permit: Permit) -> Lease:
        """An active lease for this call, exchanged if there is none. Raises the family of `SpanlockError`."""
        found = self.active(workflow, tool, permit)
        if found is not None:
            return found
        held = self._begin(workflow, tool, permit)
        if held.exchanging is not None:
            await asyncio.shield(held.exchanging)
        if held.lease.state not in USABLE:
            raise CallerError(Reason.LEASE_GONE, "the lease ended while its credential was being exchanged")
        return held.lease

    def _begin(self, workflow: Workflow, tool: Tool, permit: Permit) -> Held:
        """The pending lease of this key, or a new one whose exchange has begun."""
        if not workflow.is_open:
            raise CallerError(Reason.WORKFLOW_CLOSED, "the workflow is closed")
        if tool.name in self._barred.get(workflow.id, ()):
            raise CallerError(Reason.LEASE_GONE, f"an operator withdrew tool {tool.name} from this workflow")
        call = (workflow.id, tool.name, permit.scopes)
        held = self._calls.get(call)
        if held is not None and held.lease.state is LeaseState.PENDING and held.tool is tool:
            return held
        if held is not None:
            self._drop(held, LeaseEvent.EXPIRED if held.lease.state in USABLE else LeaseEvent.WITHDRAWN, "expired")
        if self.live_count >= self.config.max_leases:
            raise CallerError(Reason.TOO_MANY_LEASES, "the limit of leases is reached")
        decided = self.decider.decide_lease(Action.LEASE_ISSUE, workflow, tool, permit.scopes)
        key = LeaseKey(
            workflow.id, workflow.agent, tool.name, tool.issuer, tool.audience, tool.resource, decided.scopes
        )
        held = Held(Lease("ls_" + secrets.token_hex(8), key, policy_ids=decided.policy_ids), workflow, tool, call)
        self._calls[call] = held
        self._by_workflow.setdefault(workflow.id, {})[held.lease.id] = held
        ttl = min(permit.ttl, decided.ttl, tool.max_ttl)
        held.exchanging = self._background.spawn(self._issue(held, ttl), f"exchange {tool.name}")
        return held

    async def _issue(self, held: Held, ttl: float) -> None:
        """The first exchange of a lease."""
        started = self._clock.monotonic()
        try:
            credential = await self._exchange(held, ttl)
            header = self._rendered(held, credential)
        except SpanlockError as error:
            held.lost_answer = isinstance(error, AnswerLost)
            self._emit(held, "issue_failed", reason=str(error.reason), seconds=self._clock.monotonic() - started)
            if held.lease.state is LeaseState.PENDING:
                if held.doomed or held.lost_answer:
                    self._drop(held, LeaseEvent.WITHDRAWN, "issue_failed")  # something may live at the issuer
                self._forget(held)
            held.lease.state = step(LEASE_TABLE, held.lease.state, LeaseEvent.ISSUE_FAILED)
            raise
        finally:
            held.exchanging = None
        state = step(LEASE_TABLE, held.lease.state, LeaseEvent.ISSUED)
        if state is LeaseState.REVOKING:
            self._doom(held, credential)  # closed meanwhile: revoked, never used
        else:
            self._install(held, credential, header, ttl)
        held.lease.state = state
        self._emit(held, "issued", seconds=self._clock.monotonic() - started)

    async def _exchange(self, held: Held, ttl: float) -> Credential:
        """One exchange within the deadline. The issuer's health is what the last one found."""
        issuer = held.lease.key.issuer
        exchanger = self.revoker.exchangers[issuer]
        try:
            async with asyncio.timeout(self.config.exchange_deadline):
                credential = await exchanger.exchange(held.workflow, held.tool, held.lease.key.scopes, ttl)
        except TimeoutError:
            error = AnswerLost(Reason.ISSUER_UNAVAILABLE, f"issuer {issuer}: no answer within the exchange deadline")
            self._note_issuer(issuer, error.detail)
            raise error from None
        except IssuerError as error:
            self._note_issuer(issuer, error.detail)
            raise
        self._note_issuer(issuer, "")
        return credential

    def _note_issuer(self, issuer: str, error: str) -> None:
        previous = self._issuers.get(issuer)
        since = previous[1] if previous is not None and previous[0] is (not error) else self._clock.now()
        self._issuers[issuer] = (not error, since, error)

    def _rendered(self, held: Held, credential: Credential) -> bytes:
        """The header; a credential that cannot be used is revoked all the same."""
        try:
            if credential.expires_at - self._clock.now() <= _SKEW:
                raise IssuerError(Reason.CREDENTIAL_UNUSABLE, "the issuer gave a credential that expires at once")
            return render(held.tool, credential.value)
        except IssuerError:
            self._doom(held, credential)
            raise

    def _doom(self, held: Held, credential: Credential) -> None:
        held.doomed.extend(credential.records)
        held.expires_at = max(held.expires_at, *(record.expires_at for record in credential.records))

    def _install(self, held: Held, credential: Credential, header: bytes, ttl: float) -> None:
        now = self._clock.monotonic()
        life = min(credential.expires_at - self._clock.now(), ttl)
        lease = held.lease
        lease.credential, lease.header = credential, header
        lease.usable_until = now + life - min(_SKEW, life / 10)
        lease.epoch += 1
        held.expires_at = max(held.expires_at, *(record.expires_at for record in credential.records))
        held.issued_at, held.used_since_issue = now, False
        low, high = _RENEW_AT
        held.renew_at = now + life * (low + (high - low) * self._rng.random())

    # -- use ----------------------------------------------------------------------------------------------------

    def use(self, lease: Lease, workflow: Workflow) -> bytes:
        """The header's full value, for the write that follows without an await. THE last liveness check.

        Raises `CallerError` (workflow_closed, lease_gone, uses_exhausted) or `IdentityError`.
        """
        if not workflow.is_open:
            raise CallerError(Reason.WORKFLOW_CLOSED, "the workflow is closed")
        credential = lease.credential
        if lease.state not in USABLE or credential is None or lease.key.workflow != workflow.id:
            raise CallerError(Reason.LEASE_GONE, "the lease was dropped before the request was written")
        now = self._clock.monotonic()
        if now >= lease.usable_until or self._clock.now() >= credential.expires_at:
            raise CallerError(Reason.LEASE_GONE, "the credential has expired")
        self._svids.require_identity(workflow.agent)
        held = self._by_workflow[workflow.id][lease.id]
        if held.tool.max_uses:
            self._count_use(held)
        lease.uses += 1
        lease.last_used = now
        held.used_since_issue = True
        return lease.header

    def _count_use(self, held: Held) -> None:
        cap = held.tool.max_uses
        uses = self._uses.setdefault(held.workflow.id, {})
        used = uses.get(held.tool.name, 0)
        if used >= cap:
            raise CallerError(Reason.USES_EXHAUSTED, f"tool {held.tool.name} may be used {cap} times in a workflow")
        uses[held.tool.name] = used + 1

    # -- exchange by gRPC ---------------------------------------------------------------------------------------

    async def exchange(self, workflow: Workflow, tool: Tool, permit: Permit) -> tuple[Lease, str]:
        """A lease and a new CredentialHandle for it."""
        lease = await self.lease(workflow, tool, permit)
        return lease, self._handles.issue(lease)

    def export(self, lease: Lease, workflow: Workflow, tool: Tool) -> Secret:
        """The real token, where the tool allows it. Raises `CallerError` (export_refused) and what `use` raises."""
        if not tool.export:
            raise CallerError(Reason.EXPORT_REFUSED, f"tool {tool.name} does not allow export")
        self.use(lease, workflow)
        if lease.credential is None:
            raise CallerError(Reason.LEASE_GONE, "the lease was dropped")
        return lease.credential.value

    def resolve_handle(self, value: str, agents: frozenset[str], tool: str | None) -> Lease:
        """The lease of a CredentialHandle. Raises `CallerError` (handle_invalid)."""
        return self._handles.resolve(value, agents, tool)

    async def release(self, agent: str, *, handle: str | None = None, lease_id: str | None = None) -> LeaseEnd:
        """Drops and revokes one lease of `agent`. Raises `CallerError` (handle_invalid, lease_gone)."""
        if handle is not None:
            lease_id = self._handles.resolve(handle, frozenset({agent}), None).id
        held = next((h for h in self._all() if h.lease.id == lease_id and h.lease.key.agent == agent), None)
        if held is None:
            raise CallerError(Reason.LEASE_GONE, "no such lease of this agent")
        self._drop(held, LeaseEvent.WITHDRAWN, "released")
        (end,) = await self._ends([held])
        return end

    # -- end ----------------------------------------------------------------------------------------------------

    def close_workflow(self, workflow: Workflow) -> asyncio.Task[CloseReport]:
        """Everything of `workflow` is dropped before this returns; the task revokes, and reports within the deadline."""
        started = self._clock.monotonic()
        for held in list(self._by_workflow.get(workflow.id, {}).values()):
            self._drop(held, LeaseEvent.WORKFLOW_CLOSED, str(workflow.close_reason))
        helds = self._ended.pop(workflow.id, [])
        self._uses.pop(workflow.id, None)
        self._barred.pop(workflow.id, None)
        dropped_ms = (self._clock.monotonic() - started) * 1000
        return self._background.spawn(self._report(workflow, helds, started, dropped_ms), f"settle {workflow.id}")

    async def _report(self, workflow: Workflow, helds: list[Held], started: float, dropped_ms: float) -> CloseReport:
        ends = await self._ends(helds)
        revoked_ms = (self._clock.monotonic() - started) * 1000 if ends else 0.0
        return CloseReport(workflow.id, workflow.agent, str(workflow.close_reason), tuple(ends), dropped_ms, revoked_ms)

    async def _ends(self, helds: list[Held]) -> list[LeaseEnd]:
        """How each of these dropped leases ended, or that it has not yet at the deadline."""
        await self._wait([held.ending for held in helds if held.ending is not None], self.config.revoke_deadline)
        return [
            held.ending.result()
            if held.ending is not None and held.ending.done()
            else self._end_of(held, IssuerOutcome.FAILED, "not revoked yet; it is tried until the token expires")
            for held in helds
        ]

    async def withdraw(
        self, *, workflow: str | None = None, agent: str | None = None, tool: str | None = None, reissue: bool
    ) -> list[LeaseEnd]:
        """Drops and revokes every matching lease (all, when nothing is named).

        With `reissue` the next use exchanges anew; without, the workflow can lease that tool no more.
        """
        matching = [
            held
            for held in self._all()
            if workflow in (None, held.lease.key.workflow)
            and agent in (None, held.lease.key.agent)
            and tool in (None, held.lease.key.tool)
        ]
        for held in matching:
            if not reissue:
                self._barred.setdefault(held.lease.key.workflow, set()).add(held.lease.key.tool)
            self._drop(held, LeaseEvent.WITHDRAWN, "withdrawn")
        return await self._ends(matching)

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

    def _drop(self, held: Held, event: LeaseEvent, reason: str) -> None:
        """Unusable by any flow, at once. What was minted is reachable to the revoker alone from here on."""
        lease = held.lease
        lease.state = step(LEASE_TABLE, lease.state, event)
        credential, lease.credential, lease.header = lease.credential, None, b""
        if credential is not None:
            held.doomed.extend(credential.records)
        held.doomed.extend(held.superseded)
        held.superseded.clear()
        self._forget(held)
        self._handles.drop(lease)
        self._on_drop(held.workflow, lease)
        self._emit(held, "dropped", reason=reason)
        self._start_ending(held, reason)

    def _forget(self, held: Held) -> None:
        """Out of every index: no look-up finds it again."""
        if self._calls.get(held.call) is held:
            del self._calls[held.call]
        workflow = held.lease.key.workflow
        leases = self._by_workflow.get(workflow, {})
        leases.pop(held.lease.id, None)
        if not leases:
            self._by_workflow.pop(workflow, None)

    def _start_ending(self, held: Held, reason: str) -> None:
        held.dropped_at = self._clock.monotonic()
        held.ending = self._background.spawn(self._end(held, reason), f"revoke {held.lease.id}")
        self._ending.add(held.ending)
        held.ending.add_done_callback(self._ending.discard)
        self._ended.setdefault(held.lease.key.workflow, []).append(held)

    async def _end(self, held: Held, reason: str) -> LeaseEnd:
        """Waits for an exchange in flight, then revokes all that the lease ever minted."""
        if held.exchanging is not None:
            await asyncio.wait({held.exchanging})
        records, held.doomed = held.doomed, []
        self._revoke(held, records)
        if held.revoking:
            await asyncio.wait(held.revoking)
        outcomes = [task.result().outcome for task in held.revoking]
        if held.lost_answer:
            outcomes.append(IssuerOutcome.MINT_UNKNOWN)
        outcome = worst(outcomes)
        held.lease.state = step(LEASE_TABLE, held.lease.state, LeaseEvent.REVOKE_DONE)
        end = self._end_of(held, outcome, "")
        self._emit(held, "revoked", reason=reason, outcome=outcome, residual=end.residual_seconds)
        return end

    def _revoke(self, held: Held, records: list[RevocationRecord]) -> None:
        held.revoking += [
            self._background.spawn(self.revoker.end(record, held.tool), "revoke token") for record in records
        ]

    def _end_of(self, held: Held, outcome: IssuerOutcome, detail: str) -> LeaseEnd:
        """The two facts."""
        left = -1.0 if math.isinf(held.expires_at) else max(held.expires_at - self._clock.now(), 0.0)
        dead = outcome in (IssuerOutcome.CONFIRMED, IssuerOutcome.ACKNOWLEDGED)
        if held.lost_answer and not dead:
            left = max(left, held.tool.max_ttl)
        if outcome is IssuerOutcome.NOT_ISSUED or (dead and held.tool.token_check is TokenCheck.INTROSPECTION):
            left = 0.0
        at = max((task.result().at for task in held.revoking if task.done()), default=None)
        revoked = outcome in (IssuerOutcome.CONFIRMED, IssuerOutcome.ACKNOWLEDGED) and at is not None
        key = held.lease.key
        return LeaseEnd(
            lease=held.lease.id, workflow=key.workflow, agent=key.agent, tool=key.tool, at_issuer=outcome,
            residual_seconds=left, token_check=held.tool.token_check, uses=held.lease.uses,
            revoked_ms=(at - held.dropped_at) * 1000 if revoked and at is not None else None, detail=detail,
        )  # fmt: skip

    # -- renewal (driven by `credentials.renewer`) --------------------------------------------------------------

    async def renew(self, held: Held) -> None:
        """One try: decided by policy again; the old token serves until the new one is there, and is then revoked."""
        started = self._clock.monotonic()
        lease = held.lease
        try:
            permit = self.decider.decide_lease(Action.LEASE_RENEW, held.workflow, held.tool, lease.key.scopes)
            if permit.scopes != lease.key.scopes:
                raise Denied(Reason.POLICY_DENIED, "policy narrows the scopes now; the next use is leased anew")
            ttl = min(permit.ttl, held.tool.max_ttl)
            credential = await self._exchange(held, ttl)
            header = self._rendered(held, credential)
        except Denied:
            if lease.state in USABLE:
                self._drop(held, LeaseEvent.WITHDRAWN, "policy")
            return
        except SpanlockError as error:
            held.lost_answer = held.lost_answer or isinstance(error, AnswerLost)
            lease.state = step(LEASE_TABLE, lease.state, LeaseEvent.RENEW_FAILED)
            self._emit(held, "renew_failed", reason=str(error.reason), seconds=self._clock.monotonic() - started)
            return
        state = step(LEASE_TABLE, lease.state, LeaseEvent.RENEWED)
        if state is LeaseState.REVOKING:
            self._doom(held, credential)
            return
        if lease.credential is not None:
            held.superseded.extend(lease.credential.records)
        self._install(held, credential, header, ttl)
        lease.state = state
        self._emit(held, "renewed", seconds=self._clock.monotonic() - started)
        self._background.spawn(self._retire(held), f"supersede {lease.id}")

    async def _retire(self, held: Held) -> None:
        """Revokes superseded tokens after the grace for calls already sent; a close takes them over at once."""
        await self._clock.sleep(self.config.supersede_grace)
        records, held.superseded[:] = list(held.superseded), []
        self._revoke(held, records)

    def start_renewal(self, held: Held) -> None:
        """Begins `renew` in a task that a close waits for."""
        held.exchanging = self._background.spawn(self._renewing(held), f"renew {held.lease.id}")

    async def _renewing(self, held: Held) -> None:
        try:
            await self.renew(held)
        finally:
            held.exchanging = None

    def expire(self, held: Held) -> None:
        """The credential's time is over and nobody renewed it."""
        if held.lease.state in USABLE:
            self._drop(held, LeaseEvent.EXPIRED, "expired")

    # -- for status and operators -------------------------------------------------------------------------------

    def _all(self) -> list[Held]:
        return [held for leases in self._by_workflow.values() for held in leases.values()]

    def held(self) -> list[Held]:
        """Every live lease, for the renewer."""
        return self._all()

    def leases(self, workflow: str | None = None, agent: str | None = None, tool: str | None = None) -> list[Lease]:
        """Live leases that match."""
        return [
            h.lease
            for h in self._all()
            if workflow in (None, h.lease.key.workflow)
            and agent in (None, h.lease.key.agent)
            and tool in (None, h.lease.key.tool)
        ]

    @property
    def live_count(self) -> int:
        return len(self._calls)

    def live_leases(self, agent: str) -> bool:
        """Whether `agent` has anything that may need its identity: a live lease, or a token still to be revoked."""
        return self.revoker.backlog > 0 or any(h.lease.key.agent == agent for h in self._all())

    def health(self) -> list[dict[str, object]]:
        """One row for each issuer that was asked."""
        return [
            {
                "name": f"issuer {issuer}",
                "ok": ok and issuer not in self.revoker.failing,
                "since": since,
                "last_error": error or self.revoker.failing.get(issuer, ""),
                "next_try": None,
                "effect": "" if ok else "calls that need a new credential fail; active leases serve until they expire",
            }
            for issuer, (ok, since, error) in self._issuers.items()
        ]

    def replace(self, exchangers: Mapping[str, Exchanger]) -> None:
        """A reload: new exchanges use these; an issuer that is gone stays for what it minted."""
        self.revoker.exchangers.update(exchangers)

    async def drain(self, seconds: float) -> int:
        """Waits for revocations under way, at most `seconds`. Returns how many tokens could not be revoked."""
        await self._wait(list(self._ending), seconds)
        return self.revoker.backlog

    def _emit(
        self,
        held: Held,
        event: str,
        *,
        reason: str = "",
        outcome: IssuerOutcome | None = None,
        residual: float = 0.0,
        seconds: float = 0.0,
    ) -> None:
        key = held.lease.key
        self._on_event(
            LeaseRecord(
                time=self._clock.now(), event=event, lease=held.lease.id, workflow=key.workflow, agent=key.agent, tool=key.tool,
                issuer=key.issuer, scopes=key.scopes, outcome=str(outcome or ""), residual_seconds=residual, reason=reason,
                policy_ids=held.lease.policy_ids, seconds=seconds,
            )
        )  # fmt: skip
