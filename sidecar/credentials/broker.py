"""The way of a credential: SVID → exchanger → lease → injected → renewed → dropped → revoked.

One lease for each key (every input that changes the token); whoever asks while its exchange is under way waits for the
same one. The exchange runs in a task of its own: a caller that goes away cancels only its own wait. A drop is synchronous
and total: when it returns, no code path can put the value on a request, and only the revoker can reach it. A workflow that
closes while its exchange is in flight is a transition of its own: the value that then arrives goes straight to the revoker.

The steps: `minting` (one exchange), `header` (the value as a header), `renewer`, `ending` (what happens after a drop),
`revoker` (one token and its issuer), `handles`.
"""

import asyncio
import random
import secrets
from collections.abc import Callable, Iterable, Mapping

from sidecar.clock import Clock
from sidecar.credentials.config import CredentialsConfig
from sidecar.credentials.ending import Endings
from sidecar.credentials.events import LeaseEvents, OnEvent
from sidecar.credentials.handles import Handles
from sidecar.credentials.held import Held, LiveLeases
from sidecar.credentials.minting import SKEW, Mint
from sidecar.credentials.revoker import Revoker
from sidecar.errors import CallerError, Denied, Reason, SpanlockError
from sidecar.machine import step
from sidecar.model.lease import (
    LEASE_TABLE,
    USABLE,
    CloseReport,
    Credential,
    Lease,
    LeaseEnd,
    LeaseEvent,
    LeaseKey,
    LeaseState,
)
from sidecar.model.policy import Action, Permit
from sidecar.model.tool import Tool
from sidecar.model.workflow import Workflow
from sidecar.ports import Exchanger, LeaseDecider, SvidSource
from sidecar.secret import Secret
from sidecar.tasks import Background

_RENEW_AT = (0.6, 0.7)
"""The part of its life after which a used credential is renewed; drawn once for each, from the injected source."""


class Broker:
    """The only writer of `Lease`'s changing fields, with `held`. `credentials.renewer` drives renewal."""

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
        on_event: OnEvent,
        on_drop: Callable[[Workflow, Lease], None],
    ) -> None:
        self.revoker = Revoker(exchangers, clock, rng, config.revoke_parallel)
        self.live = LiveLeases()
        self._clock = clock
        self._rng = rng
        self._svids = svids
        self._decider = decider
        self._config = config
        self._background = background
        self._on_drop = on_drop
        self._events = LeaseEvents(clock, on_event)
        self._mint = Mint(self.revoker.exchangers, clock, config.exchange_deadline)
        self.revoker.on_answer = self._mint.answered
        self._endings = Endings(self.revoker, clock, config, background, self._events)
        self._handles = Handles()
        self._uses: dict[str, dict[str, int]] = {}
        """Requests by workflow and tool."""
        self._barred: dict[str, set[str | None]] = {}
        """Tools by workflow that an operator withdrew; None: all of them."""

    # -- lease --------------------------------------------------------------------------------------------------

    def active(self, workflow: Workflow, tool: Tool, permit: Permit) -> Lease | None:
        """The lease that this call may use now, without waiting; None when it must be asked for by `lease`."""
        held = self.live.for_call((workflow.id, tool.name, permit.scopes, permit.ttl))
        if held is None or held.tool is not tool or held.lease.state not in USABLE:
            return None
        if self._clock.monotonic() >= held.lease.usable_until:
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
        if {tool.name, None} & self._barred.get(workflow.id, set()):
            raise CallerError(Reason.LEASE_GONE, f"an operator withdrew tool {tool.name} from this workflow")
        call = (workflow.id, tool.name, permit.scopes, permit.ttl)
        held = self.live.for_call(call)
        if held is not None and held.lease.state is LeaseState.PENDING and held.tool is tool:
            return held
        if held is not None:
            usable = held.lease.state in USABLE
            self._drop(
                held, LeaseEvent.EXPIRED if usable else LeaseEvent.WITHDRAWN, "expired" if usable else "tool_changed"
            )
        config = self._config
        if len(self.live) >= config.max_leases or self.live.of_agent(workflow.agent) >= config.max_leases_per_agent:
            raise CallerError(Reason.TOO_MANY_LEASES, "the limit of leases is reached")
        decided = self._decider.decide_lease(Action.LEASE_ISSUE, workflow, tool, permit.scopes)
        key = LeaseKey(
            workflow.id, workflow.agent, tool.name, tool.issuer, tool.audience, tool.resource, decided.scopes
        )
        ttl = min(permit.ttl, decided.ttl, tool.max_ttl)
        lease = Lease("ls_" + secrets.token_hex(8), key, ttl, policy_ids=decided.policy_ids)
        held = Held(lease, workflow, tool, call)
        self.live.add(held)
        held.exchanging = self._background.spawn(self._issue(held), f"exchange {tool.name}")
        return held

    async def _issue(self, held: Held) -> None:
        """The first exchange of a lease."""
        started = self._clock.monotonic()
        lease = held.lease
        try:
            if lease.state is not LeaseState.PENDING:
                raise CallerError(Reason.LEASE_GONE, "the lease was dropped before its exchange began")
            credential, header = await self._mint.credential(held, lease.ttl)
        except SpanlockError as error:
            self._events.tell(held, "issue_failed", reason=str(error.reason), since=started)
            if lease.state is LeaseState.PENDING:
                if held.doomed or held.lost_answer:
                    self._drop(held, LeaseEvent.WITHDRAWN, "issue_failed")  # something may live at the issuer
                self.live.remove(held)
            lease.state = step(LEASE_TABLE, lease.state, LeaseEvent.ISSUE_FAILED)
            raise
        finally:
            held.exchanging = None
        state = step(LEASE_TABLE, lease.state, LeaseEvent.ISSUED)
        self._arrived(held, credential, header, lease.ttl, state)
        self._events.tell(held, "issued", since=started)

    def _arrived(self, held: Held, credential: Credential, header: bytes, ttl: float, state: LeaseState) -> None:
        """A credential came: it is used from now on, or, when the lease was dropped meanwhile, revoked and never used."""
        held.lease.state = state
        if state is LeaseState.REVOKING:
            held.doom(credential.records)
            return
        now = self._clock.monotonic()
        life = min(credential.expires_at - self._clock.now(), ttl)
        held.install(credential, header)
        held.lease.usable_until = now + life - min(SKEW, life / 10)
        held.lease.ends_at = self._clock.now() + life
        low, high = _RENEW_AT
        held.renew_at = now + life * (low + (high - low) * self._rng.random())

    # -- use ----------------------------------------------------------------------------------------------------

    def use(self, lease: Lease, workflow: Workflow, counted: bool = False) -> bytes:
        """The header's full value, for the write that follows without an await. THE last liveness check.

        `counted`: a second try of a call whose use has been counted.
        Raises `CallerError` (workflow_closed, lease_gone, uses_exhausted) or `IdentityError`.
        """
        if not workflow.is_open:
            raise CallerError(Reason.WORKFLOW_CLOSED, "the workflow is closed")
        credential = lease.credential
        if lease.state not in USABLE or credential is None or lease.key.workflow != workflow.id:
            raise CallerError(Reason.LEASE_GONE, "the lease was dropped before the request was written")
        now = self._clock.monotonic()
        if now >= lease.usable_until or self._clock.now() >= credential.expires_at:
            lease.usable_until = now  # by whichever clock: the next call leases anew
            raise CallerError(Reason.LEASE_GONE, "the credential has expired")
        self._svids.require_identity(workflow.agent)
        held = self.live.of(lease)
        if not counted:
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

    def handle(self, lease: Lease) -> str:
        """The CredentialHandle of a live lease: one for its whole life. Raises `CallerError` (lease_gone)."""
        if lease.state not in USABLE:
            raise CallerError(Reason.LEASE_GONE, "the lease was dropped")
        return self._handles.issue(lease)

    def export(self, lease: Lease, workflow: Workflow, tool: Tool) -> Secret:
        """The real token, where the tool allows it; it is the agent's until `lease.ends_at` and not renewed. Each time is told.

        Raises `CallerError` (export_refused) and what `use` raises.
        """
        if not tool.export:
            raise CallerError(Reason.EXPORT_REFUSED, f"tool {tool.name} does not allow export")
        self.use(lease, workflow)
        if lease.credential is None:
            raise CallerError(Reason.LEASE_GONE, "the lease was dropped")
        held = self.live.of(lease)
        held.exported = True
        self._events.tell(held, "exported", expires_at=lease.credential.expires_at)
        return lease.credential.value

    def resolve_handle(self, value: str, agents: frozenset[str], tool: str | None) -> Lease:
        """The lease of a CredentialHandle. Raises `CallerError` (handle_invalid)."""
        return self._handles.resolve(value, agents, tool)

    async def release(self, agent: str, *, token: str | None = None, lease_id: str | None = None) -> LeaseEnd:
        """Drops and revokes one lease of `agent`. `token`: its CredentialHandle, or the real token that it exported.

        Raises `CallerError` (handle_invalid, lease_gone).
        """
        if token is not None:
            lease = self._exported(agent, Secret(token)) or self._handles.resolve(token, frozenset({agent}), None)
            lease_id = lease.id
        held = next((h for h in self.live.matching(agent=agent) if h.lease.id == lease_id), None)
        if held is None:
            raise CallerError(Reason.LEASE_GONE, "no such lease of this agent")
        self._drop(held, LeaseEvent.WITHDRAWN, "released")
        (end,) = await self._endings.ends([held])
        return end

    def _exported(self, agent: str, token: Secret) -> Lease | None:
        """The lease of a token that `agent` was given."""
        for held in self.live.matching(agent=agent):
            credential = held.lease.credential
            if held.exported and credential is not None and credential.value == token:
                return held.lease
        return None

    # -- end ----------------------------------------------------------------------------------------------------

    def close_workflow(self, workflow: Workflow) -> asyncio.Task[CloseReport]:
        """Everything of `workflow` is dropped before this returns; the task revokes, and reports within the deadline."""
        started = self._clock.monotonic()
        self._drop_all(self.live.matching(workflow=workflow.id), LeaseEvent.WORKFLOW_CLOSED, str(workflow.close_reason))
        helds = self._endings.take(workflow.id)
        self._uses.pop(workflow.id, None)
        self._barred.pop(workflow.id, None)
        dropped_ms = (self._clock.monotonic() - started) * 1000
        return self._background.spawn(self._report(workflow, helds, started, dropped_ms), f"settle {workflow.id}")

    async def _report(self, workflow: Workflow, helds: list[Held], started: float, dropped_ms: float) -> CloseReport:
        ends = await self._endings.ends(helds)
        revoked_ms = (self._clock.monotonic() - started) * 1000 if ends else 0.0
        return CloseReport(workflow.id, workflow.agent, str(workflow.close_reason), tuple(ends), dropped_ms, revoked_ms)

    async def withdraw(
        self,
        *,
        workflow: str | None = None,
        agent: str | None = None,
        tool: str | None = None,
        bar: Iterable[Workflow] = (),
    ) -> list[LeaseEnd]:
        """Drops and revokes every matching lease (all, when nothing is named); the next use exchanges anew.

        `bar`: open workflows that can lease that tool (any, when none is named) no more.
        """
        for barred in bar:
            self._barred.setdefault(barred.id, set()).add(tool)
        return await self._endings.ends(self.drop(workflow, agent, tool))

    def drop(self, workflow: str | None = None, agent: str | None = None, tool: str | None = None) -> list[Held]:
        """Every matching lease, before this returns; what they minted is revoked in the background."""
        matching = self.live.matching(workflow, agent, tool)
        self._drop_all(matching, LeaseEvent.WITHDRAWN, "withdrawn")
        return matching

    def expire(self, held: Held) -> None:
        """The credential's time is over and nobody renewed it."""
        if held.lease.state in USABLE:
            self._drop(held, LeaseEvent.EXPIRED, "expired")

    def _drop(self, held: Held, event: LeaseEvent, reason: str) -> None:
        self._drop_all([held], event, reason)

    def _drop_all(self, helds: list[Held], event: LeaseEvent, reason: str) -> None:
        """Unusable by any flow, at once. What was minted is reachable to the revoker alone from here on.

        All are dropped before anybody is told: whatever goes wrong in the telling, none is left behind.
        """
        for held in helds:
            held.lease.state = step(LEASE_TABLE, held.lease.state, event)
            held.strip()
            self.live.remove(held)
            self._handles.drop(held.lease)
            self._endings.begin(held, reason)
        for held in helds:
            self._on_drop(held.workflow, held.lease)
            self._events.tell(held, "dropped", reason=reason)

    # -- renewal (driven by `credentials.renewer`) --------------------------------------------------------------

    def renew(self, held: Held) -> None:
        """Begins a renewal in a task that a drop waits for."""
        held.exchanging = self._background.spawn(self._renewing(held), f"renew {held.lease.id}")

    async def _renewing(self, held: Held) -> None:
        try:
            if held.lease.state in USABLE:
                await self._renew(held)
        finally:
            held.exchanging = None

    async def _renew(self, held: Held) -> None:
        """One try: decided by policy again; the old token serves until the new one is there, and is then revoked."""
        started = self._clock.monotonic()
        lease = held.lease
        try:
            permit = self._decider.decide_lease(Action.LEASE_RENEW, held.workflow, held.tool, lease.key.scopes)
            if permit.scopes != lease.key.scopes:
                raise Denied(Reason.POLICY_DENIED, "policy narrows the scopes now; the next use is leased anew")
            ttl = min(permit.ttl, lease.ttl)
            credential, header = await self._mint.credential(held, ttl)
        except Denied:
            if lease.state in USABLE:
                self._drop(held, LeaseEvent.WITHDRAWN, "policy")
            return
        except SpanlockError as error:
            lease.state = step(LEASE_TABLE, lease.state, LeaseEvent.RENEW_FAILED)
            if lease.state in USABLE:
                self._endings.revoke_doomed(held)
            self._events.tell(held, "renew_failed", reason=str(error.reason), since=started)
            return
        state = step(LEASE_TABLE, lease.state, LeaseEvent.RENEWED)
        self._arrived(held, credential, header, ttl, state)
        if state is not LeaseState.REVOKING:
            self._events.tell(held, "renewed", since=started)
            self._background.spawn(self._endings.retire(held), f"supersede {lease.id}")

    # -- for status and operators -------------------------------------------------------------------------------

    def leases(self, workflow: str | None = None, agent: str | None = None, tool: str | None = None) -> list[Lease]:
        """Live leases that match."""
        return [held.lease for held in self.live.matching(workflow, agent, tool)]

    def needs_identity(self, agent: str) -> bool:
        """Whether `agent` has anything that may need its identity: a live lease, or a token still to be revoked."""
        return self.revoker.backlog > 0 or bool(self.live.matching(agent=agent))

    def health(self) -> list[dict[str, object]]:
        """One row for each issuer that was asked."""
        return self._mint.health(self.revoker.failing)

    def replace(self, exchangers: Mapping[str, Exchanger]) -> None:
        """A reload: new exchanges use these; an issuer that is gone stays for what it minted."""
        self.revoker.replace(exchangers)

    async def drain(self, seconds: float) -> list[LeaseEnd]:
        """Waits for revocations under way, at most `seconds`. Returns how those leases stand that have not ended."""
        return await self._endings.drain(seconds)
