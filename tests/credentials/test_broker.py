"""The broker with scripted neighbours and a clock turned by hand: every order of issue, renewal, withdrawal and close."""

import asyncio
import dataclasses
import random
from typing import Any

import pytest

from sidecar.credentials.broker import Broker
from sidecar.credentials.config import CredentialsConfig
from sidecar.credentials.renewer import Renewer
from sidecar.errors import AnswerLost, CallerError, Denied, IdentityError, IssuerError, Reason
from sidecar.model.audit import LeaseRecord
from sidecar.model.lease import CloseReport, Credential, IssuerOutcome, Lease, LeaseState, RevocationRecord, TokenCheck
from sidecar.model.policy import Action, Permit, Question
from sidecar.model.tool import Authority, Tool
from sidecar.model.workflow import CloseReason, Workflow, WorkflowState
from sidecar.secret import Secret
from sidecar.tasks import Background
from sidecar.telemetry.logging import configure
from tests.fakes.clock import FakeClock

TOOL = Tool(
    name="t",
    scheme="https",
    authority=Authority("t.test", 443),
    issuer="i",
    scopes=("a",),
    token_check=TokenCheck.INTROSPECTION,
)
INF = float("inf")


def permit(scopes: tuple[str, ...] = ("a",), ttl: float = INF) -> Permit:
    return Permit(Question("agent", Action.HTTP_REQUEST, "t"), scopes, ttl, ("p",), 1)


class World:
    """Scripted SvidSource, LeaseDecider and Exchanger in one, with the broker between them."""

    issuer = "i"
    server = ""

    def __init__(self, **config: float) -> None:
        self.clock = FakeClock()
        self.failures: list[tuple[str, BaseException]] = []
        self.background = Background(lambda name, error: self.failures.append((name, error)))
        self.events: list[LeaseRecord] = []
        self.dropped: list[str] = []
        self.gate: asyncio.Event | None = None
        self.error: BaseException | None = None
        self.second_step: Exception | None = None
        """Raised after a first token was minted."""
        self.identity = True
        self.permitted = True
        self.forbidden: Action | None = None
        self.decided_ttl = INF
        """What policy says of a lease, as `permit` has what it says of a call."""
        self.same_token = ""
        """What the issuer gives each time, if it does."""
        self.life = 100.0
        self.minted: list[str] = []
        self.alive: set[str] = set()
        self.revoke_error: BaseException | None = None
        self.can_look = True
        self.broker = Broker(
            clock=self.clock, rng=random.Random(1), svids=self, exchangers={"i": self}, decider=self,
            config=CredentialsConfig(**config), background=self.background, on_event=self.events.append,
            on_drop=lambda workflow, lease: self.dropped.append(lease.id),
        )  # fmt: skip
        self.workflow = Workflow("wf_1", "agent", "w", Secret("h"), 0.0, INF, INF)

    def require_identity(self, agent: str) -> None:
        if not self.identity:
            raise IdentityError(Reason.NO_IDENTITY, "gone")

    async def jwt_svid(self, agent: str, audience: str, *, revoking: bool = False) -> Secret:
        return Secret("svid")

    def decide_lease(self, action: Action, workflow: Workflow, tool: Tool, scopes: tuple[str, ...]) -> Permit:
        if not self.permitted or action is self.forbidden:
            raise Denied(Reason.POLICY_DENIED, "no")
        return permit(scopes, self.decided_ttl)

    async def exchange(
        self, workflow: Workflow, tool: Tool, scopes: tuple[str, ...], ttl: float, minted: list[RevocationRecord]
    ) -> Credential:
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        token = self.same_token or f"token-{len(self.minted)}"
        self.minted.append(token)
        self.alive.add(token)
        now = self.clock.now()
        record = RevocationRecord("i", tool.name, Secret(token), now + self.life, workflow.agent, minted_at=self.server)
        minted.append(record)
        if self.second_step is not None:
            raise self.second_step
        return Credential(Secret(token), now, now + self.life, (record,), scopes)

    async def introspect(self, record: RevocationRecord, tool: Tool) -> bool | None:
        return record.token.reveal() in self.alive if self.can_look else False

    async def revoke(self, record: RevocationRecord) -> IssuerOutcome:
        if self.revoke_error is not None:
            raise self.revoke_error
        self.alive.discard(record.token.reveal())
        return IssuerOutcome.ACKNOWLEDGED

    async def aclose(self) -> None: ...

    def close(self) -> asyncio.Task[CloseReport]:
        self.workflow.state = WorkflowState.CLOSING
        self.workflow.close_reason = CloseReason.CLOSED
        return self.broker.close_workflow(self.workflow)

    async def lease(self, **kwargs: Any) -> Lease:
        return await self.broker.lease(self.workflow, TOOL, permit(**kwargs))


async def spin() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_close_confirms_with_the_positive_control() -> None:
    world = World()
    lease = await world.lease()
    assert world.broker.use(lease, world.workflow) == b"Bearer token-0"
    report = await world.close()
    assert [e.at_issuer for e in report.ends] == [IssuerOutcome.CONFIRMED] and report.ends[0].residual_seconds == 0
    assert not world.alive and lease.header == b"" and lease.credential is None
    with pytest.raises(CallerError):
        world.broker.use(lease, world.workflow)


async def test_confirmed_is_never_written_without_the_positive_control() -> None:
    world = World()
    world.can_look = False  # this issuer says inactive to whoever asks
    await world.lease()
    report = await world.close()
    assert [e.at_issuer for e in report.ends] == [IssuerOutcome.ACKNOWLEDGED]


async def test_a_close_during_the_exchange_revokes_what_arrives_and_never_uses_it() -> None:
    world = World()
    world.gate = asyncio.Event()
    waiting = asyncio.create_task(world.lease())
    await spin()
    closing = world.close()
    world.gate.set()
    report = await closing
    with pytest.raises(CallerError):
        await waiting
    assert world.minted == ["token-0"] and not world.alive
    assert [e.at_issuer for e in report.ends] == [IssuerOutcome.CONFIRMED]


async def test_many_callers_share_one_exchange_and_one_that_leaves_cancels_nobody() -> None:
    world = World()
    world.gate = asyncio.Event()
    callers = [asyncio.create_task(world.lease()) for _ in range(5)]
    await spin()
    callers[0].cancel()
    world.gate.set()
    gone, *leases = await asyncio.gather(*callers, return_exceptions=True)
    assert isinstance(gone, asyncio.CancelledError)
    assert isinstance(leases[0], Lease) and all(lease is leases[0] for lease in leases) and len(world.minted) == 1


async def test_other_scopes_are_another_lease() -> None:
    world = World()
    first, second = await world.lease(scopes=("a",)), await world.lease(scopes=("b",))
    assert first is not second and first.key != second.key


async def test_a_path_that_wants_a_younger_credential_gets_its_own_and_ends_nobodys() -> None:
    """A call with a short ttl must not drop the lease that another call is streaming with."""
    world = World()
    long = await world.lease()
    short = await world.broker.lease(world.workflow, TOOL, permit(ttl=30.0))
    assert short is not long
    await world.clock.advance(40)
    assert await world.lease() is long and await world.broker.lease(world.workflow, TOOL, permit(ttl=30.0)) is not short
    assert short.id in world.dropped and long.id not in world.dropped


async def test_a_renewed_credential_is_used_no_longer_than_the_first() -> None:
    """The policy for renewals says nothing of a ttl; that of the calls does, and no call may have to end the lease for it."""
    world = World()
    lease = await world.broker.lease(world.workflow, TOOL, permit(ttl=30.0))
    renewer = asyncio.ensure_future(Renewer(world.broker, world.clock).run())
    for _ in range(80):
        assert await world.broker.lease(world.workflow, TOOL, permit(ttl=30.0)) is lease
        world.broker.use(lease, world.workflow)
        await world.clock.advance(1)
    assert lease.epoch >= 3 and world.dropped == []
    renewer.cancel()


@pytest.mark.parametrize("whose", ["the tool's", "that of the lease", "that of the call", "the issuer's"])
async def test_the_shortest_life_is_the_leases(whose: str) -> None:
    world, tool, asked = World(), TOOL, permit()
    if whose == "the tool's":
        tool = dataclasses.replace(TOOL, max_ttl=30.0)
    elif whose == "that of the lease":
        world.decided_ttl = 30.0
    elif whose == "that of the call":
        asked = permit(ttl=30.0)
    else:
        world.life = 30.0
    lease = await world.broker.lease(world.workflow, tool, asked)
    assert lease.ends_at == world.clock.now() + 30.0
    await world.clock.advance(27.0)
    assert world.broker.use(lease, world.workflow)
    await world.clock.advance(3.0)
    with pytest.raises(CallerError):
        world.broker.use(lease, world.workflow)


@pytest.mark.parametrize("forbidden", [Action.LEASE_ISSUE, Action.LEASE_RENEW])
async def test_policy_is_asked_about_the_issue_and_about_the_renewal(forbidden: Action) -> None:
    world = World()
    world.forbidden = forbidden
    if forbidden is Action.LEASE_ISSUE:
        with pytest.raises(Denied):
            await world.lease()
        assert not world.minted
        return
    lease = await world.lease()
    world.broker.use(lease, world.workflow)
    await world.clock.advance(71.0)
    Renewer(world.broker, world.clock).tick()
    await spin()
    assert lease.state is LeaseState.GONE and len(world.minted) == 1


async def test_the_number_of_all_leases_is_bounded() -> None:
    world = World(max_leases=1)
    await world.lease()
    other = Workflow("wf_2", "another", "w", Secret("h"), 0.0, INF, INF)
    with pytest.raises(CallerError) as caught:
        await world.broker.lease(other, TOOL, permit())
    assert caught.value.reason is Reason.TOO_MANY_LEASES and len(world.minted) == 1


async def test_a_credential_that_expires_at_once_is_not_used() -> None:
    """It would not be good any more when it arrives."""
    world = World()
    world.life = 1.0
    with pytest.raises(IssuerError) as caught:
        await world.lease()
    await spin()
    assert caught.value.reason is Reason.CREDENTIAL_UNUSABLE and not world.alive, "and what was minted is taken back"


async def test_an_answer_never_seen_is_reported_as_mint_unknown() -> None:
    world = World()
    world.error = AnswerLost(Reason.ISSUER_UNAVAILABLE, "lost")
    with pytest.raises(IssuerError):
        await world.lease()
    report = await world.close()
    assert [e.at_issuer for e in report.ends] == [IssuerOutcome.MINT_UNKNOWN]
    assert report.ends[0].residual_seconds == TOOL.max_ttl


async def test_a_refused_exchange_leaves_nothing_behind() -> None:
    world = World()
    world.error = IssuerError(Reason.ISSUER_REFUSED, "no")
    with pytest.raises(IssuerError):
        await world.lease()
    assert len(world.broker.live) == 0
    assert (await world.close()).ends == ()


async def test_a_first_token_whose_exchange_then_fails_is_revoked_however_long_it_takes() -> None:
    world = World()
    world.second_step = IssuerError(Reason.ISSUER_REFUSED, "the second step failed")
    world.revoke_error = IssuerError(Reason.ISSUER_UNAVAILABLE, "down")
    with pytest.raises(IssuerError):
        await world.lease()
    await spin()
    assert world.alive == {"token-0"} and world.broker.revoker.backlog == 1, "reported, and tried on"
    world.revoke_error = None
    await world.clock.advance(1)
    await spin()
    assert not world.alive
    report = await world.close()
    assert [e.at_issuer for e in report.ends] == [IssuerOutcome.CONFIRMED]


async def test_a_renewal_that_fails_half_way_revokes_its_first_token_and_keeps_the_lease() -> None:
    world = World()
    lease = await world.lease()
    world.broker.use(lease, world.workflow)
    await world.clock.advance(71)
    world.second_step = IssuerError(Reason.ISSUER_REFUSED, "the second step failed")
    Renewer(world.broker, world.clock).tick()
    await spin()
    assert world.alive == {"token-0"} and lease.state is LeaseState.STALE
    assert world.broker.use(lease, world.workflow) == b"Bearer token-0"


async def test_what_a_workflow_remembers_of_its_ended_leases_is_bounded() -> None:
    world = World()
    for _ in range(1005):
        await world.lease()
        await world.broker.withdraw(tool="t")
    assert len((await world.close()).ends) == 1000 and not world.alive


async def test_renewal_swaps_and_the_old_token_is_revoked() -> None:
    world = World()
    lease = await world.lease()
    world.broker.use(lease, world.workflow)
    await world.clock.advance(71)
    Renewer(world.broker, world.clock).tick()
    await spin()
    assert lease.epoch == 2 and world.broker.use(lease, world.workflow) == b"Bearer token-1"
    await world.clock.advance(6)
    await spin()
    assert world.alive == {"token-1"}
    report = await world.close()
    assert not world.alive and [e.at_issuer for e in report.ends] == [IssuerOutcome.CONFIRMED]


async def test_an_unused_lease_is_not_renewed_and_ends_with_its_time() -> None:
    world = World()
    lease = await world.lease()
    renewer = Renewer(world.broker, world.clock)
    await world.clock.advance(80)
    renewer.tick()
    await world.clock.advance(30)
    renewer.tick()
    await spin()
    assert len(world.minted) == 1 and lease.state is LeaseState.GONE


async def test_a_failed_renewal_is_stale_and_serves_until_expiry() -> None:
    world = World()
    lease = await world.lease()
    world.broker.use(lease, world.workflow)
    world.error = IssuerError(Reason.ISSUER_UNAVAILABLE, "down")
    await world.clock.advance(71)
    Renewer(world.broker, world.clock).tick()
    await spin()
    assert lease.state is LeaseState.STALE and world.broker.use(lease, world.workflow)
    await world.clock.advance(28)
    with pytest.raises(CallerError):
        world.broker.use(lease, world.workflow)


async def test_a_close_during_a_renewal_revokes_both_tokens() -> None:
    world = World()
    lease = await world.lease()
    world.broker.use(lease, world.workflow)
    await world.clock.advance(71)
    world.gate = asyncio.Event()
    Renewer(world.broker, world.clock).tick()
    await spin()
    closing = world.close()
    world.gate.set()
    report = await closing
    assert len(world.minted) == 2 and not world.alive
    assert [e.at_issuer for e in report.ends] == [IssuerOutcome.CONFIRMED]


async def test_policy_that_changed_its_mind_withdraws_at_renewal() -> None:
    world = World()
    lease = await world.lease()
    world.broker.use(lease, world.workflow)
    world.permitted = False
    await world.clock.advance(71)
    Renewer(world.broker, world.clock).tick()
    await spin()
    assert lease.state is LeaseState.GONE and not world.alive


async def test_a_revocation_that_fails_is_failed_at_the_deadline_and_goes_on_until_it_works() -> None:
    world = World(revoke_deadline=5.0)
    await world.lease()
    world.revoke_error = IssuerError(Reason.ISSUER_UNAVAILABLE, "down")
    closing = world.close()
    await world.clock.advance(6, sleepers=2)
    report = await closing
    assert [e.at_issuer for e in report.ends] == [IssuerOutcome.FAILED] and report.ends[0].residual_seconds > 80
    assert world.broker.revoker.backlog == 1
    world.revoke_error = None
    await world.clock.advance(30)
    await spin()
    assert world.broker.revoker.backlog == 0 and not world.alive
    assert world.events[-1].outcome == IssuerOutcome.CONFIRMED


async def test_a_wall_clock_jump_makes_no_expired_credential_usable() -> None:
    world = World()
    lease = await world.lease()
    world.clock.jump_wall(200)
    with pytest.raises(CallerError):
        world.broker.use(lease, world.workflow)


async def test_no_identity_no_injection() -> None:
    world = World()
    lease = await world.lease()
    world.identity = False
    with pytest.raises(IdentityError):
        world.broker.use(lease, world.workflow)


async def test_uses_are_capped_across_leases() -> None:
    world = World()
    capped = Tool(name="t", scheme="https", authority=Authority("t.test", 443), issuer="i", scopes=("a",), max_uses=2)
    lease = await world.broker.lease(world.workflow, capped, permit())
    world.broker.use(lease, world.workflow)
    await world.broker.withdraw(tool="t")
    lease = await world.broker.lease(world.workflow, capped, permit())
    world.broker.use(lease, world.workflow)
    with pytest.raises(CallerError) as caught:
        world.broker.use(lease, world.workflow)
    assert caught.value.reason is Reason.USES_EXHAUSTED


async def test_handles_die_with_their_lease_and_are_bound_to_caller_and_tool() -> None:
    world = World()
    lease = await world.lease()
    handle = world.broker.handle(lease)
    assert world.broker.resolve_handle(handle, frozenset({"agent"}), "t") is lease
    for agents, tool in ((frozenset({"other"}), "t"), (frozenset({"agent"}), "u")):
        with pytest.raises(CallerError):
            world.broker.resolve_handle(handle, agents, tool)
    end = await world.broker.release("agent", token=handle)
    assert end.at_issuer is IssuerOutcome.CONFIRMED
    with pytest.raises(CallerError):
        world.broker.resolve_handle(handle, frozenset({"agent"}), "t")


async def test_a_thousand_workflows_close_without_touching_each_other() -> None:
    world = World()
    await world.lease()
    other = Workflow("wf_2", "agent", "w", Secret("h2"), 0.0, INF, INF)
    kept = await world.broker.lease(other, TOOL, permit())
    await world.close()
    assert world.broker.use(kept, other) == b"Bearer token-1"


async def test_whatever_goes_wrong_in_the_telling_every_lease_is_dropped_and_revoked() -> None:
    world = World()
    for name in ("one", "two"):
        await world.broker.lease(world.workflow, dataclasses.replace(TOOL, name=name), permit())
    assert len(world.alive) == 2

    def broken(workflow: Workflow, lease: Lease) -> None:
        raise RuntimeError("a bug of ours")

    world.broker._on_drop = broken
    with pytest.raises(RuntimeError):
        world.close()
    await spin()
    assert not world.broker.leases() and not world.alive


@pytest.mark.parametrize("bug", [TypeError("unhashable"), asyncio.CancelledError()], ids=["exception", "cancellation"])
async def test_a_bug_in_an_exchange_is_a_refusal_and_the_next_call_tries_anew(bug: BaseException) -> None:
    """A lease that stays pending with nobody at work on it would refuse every later call of its workflow."""
    world = World()
    world.error = bug
    with pytest.raises(IssuerError) as caught:
        await world.lease()
    assert caught.value.reason is Reason.INTERNAL
    world.error = None
    lease = await world.lease()
    assert world.broker.use(lease, world.workflow)
    report = await world.close()
    assert sorted(str(end.at_issuer) for end in report.ends) == ["confirmed", "mint_unknown"]


@pytest.mark.parametrize("bug", [TypeError("unhashable"), asyncio.CancelledError()], ids=["exception", "cancellation"])
async def test_a_bug_in_a_revocation_is_reported_and_tried_again(bug: BaseException) -> None:
    world = World(revoke_deadline=5.0)
    await world.lease()
    world.revoke_error = bug
    closing = world.close()
    await world.clock.advance(5.0, sleepers=2)
    report = await closing
    assert [end.at_issuer for end in report.ends] == [IssuerOutcome.FAILED]
    assert world.broker.revoker.waiting == {"i": 1} and world.alive
    world.revoke_error = None
    await world.clock.advance(60.0)
    assert not world.alive and not world.broker.revoker.waiting and not world.broker.revoker.failing


async def test_an_issuer_whose_tokens_have_all_expired_is_not_said_to_fail_any_more() -> None:
    world = World(revoke_deadline=5.0)
    await world.lease()
    world.revoke_error = IssuerError(Reason.ISSUER_UNAVAILABLE, "down")
    world.close()
    await spin()
    assert world.broker.revoker.failing == {"i": "issuer_unavailable"}
    assert [row["effect"] for row in world.broker.health()] == [
        "dropped credentials live on at the issuer; they are revoked until they expire"
    ]
    await world.clock.advance(200.0)
    assert not world.broker.revoker.failing and all(row["ok"] for row in world.broker.health())


async def test_a_token_that_stays_active_after_its_revocation_is_no_recovery(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("info", "console")  # to what stands for standard error here
    world = World(revoke_deadline=5.0)
    await world.lease()

    async def still_there(record: RevocationRecord) -> IssuerOutcome:
        return IssuerOutcome.ACKNOWLEDGED

    world.revoke = still_there  # type: ignore[method-assign]
    closing = world.close()
    for _ in range(5):
        await world.clock.advance(10.0)
    assert [str(end.at_issuer) for end in (await closing).ends] == ["failed"]
    assert world.broker.revoker.failing == {"i": "a revoked token is still active"}
    logged = capsys.readouterr().err
    assert logged.count("revocation_failed") == 1 and "recovered" not in logged


async def test_a_renewal_that_brings_the_same_token_again_does_not_revoke_it() -> None:
    """Some issuers cache: it is in use, and superseded by nothing."""
    world = World()
    world.same_token = "cached"
    lease = await world.lease()
    world.broker.use(lease, world.workflow)
    await world.clock.advance(71.0)
    Renewer(world.broker, world.clock).tick()
    await spin()
    assert lease.epoch == 2
    await world.clock.advance(20.0)
    assert world.alive == {"cached"} and world.broker.use(lease, world.workflow)
    assert [end.at_issuer for end in (await world.close()).ends] == [IssuerOutcome.CONFIRMED]


async def test_an_exported_token_lives_until_the_time_that_was_told() -> None:
    """A renewal would revoke under the agent's hands what it was given."""
    world = World()
    tool = dataclasses.replace(TOOL, export=True)
    lease = await world.broker.lease(world.workflow, tool, permit())
    world.broker.export(lease, world.workflow, tool)
    told = lease.ends_at
    renewer = Renewer(world.broker, world.clock)
    while world.clock.now() < told - 3:
        await world.clock.advance(1.0)
        renewer.tick()
        assert world.alive == {"token-0"}
    await world.clock.advance(3.0)
    renewer.tick()
    await spin()
    assert not world.alive and lease.state is LeaseState.GONE


@pytest.mark.parametrize(("life", "expires"), [(100.0, 1_800_000_100.0), (INF, -1.0)])
async def test_each_export_of_a_token_is_told(life: float, expires: float) -> None:
    world = World()
    world.life = life
    tool = dataclasses.replace(TOOL, export=True)
    lease = await world.broker.lease(world.workflow, tool, permit())
    world.broker.handle(lease)
    assert [event.event for event in world.events] == ["issued"], "a handle is no token"
    for _ in range(2):
        world.broker.export(lease, world.workflow, tool)
    (one, two) = [event for event in world.events if event.event == "exported"]
    assert (one.agent, one.tool, one.workflow, one.lease, one.expires_at) == ("agent", "t", "wf_1", lease.id, expires)
    assert one == two and {event.expires_at for event in world.events if event.event != "exported"} == {0.0}


async def test_a_token_that_was_not_exported_is_not_told() -> None:
    world = World()
    lease = await world.lease()
    with pytest.raises(CallerError):
        world.broker.export(lease, world.workflow, TOOL)
    world.close()
    with pytest.raises(CallerError):
        world.broker.export(lease, world.workflow, dataclasses.replace(TOOL, export=True))
    assert "exported" not in [event.event for event in world.events]


async def test_a_release_by_value_finds_exported_tokens_of_that_agent_only() -> None:
    world = World()
    tool = dataclasses.replace(TOOL, export=True)
    lease = await world.broker.lease(world.workflow, tool, permit())
    (token,) = world.minted
    for agent, value in (("agent", token), ("other", token), ("agent", "")):
        with pytest.raises(CallerError) as refused:
            await world.broker.release(agent, token=value)
        assert refused.value.reason is Reason.HANDLE_INVALID
    world.broker.export(lease, world.workflow, tool)
    with pytest.raises(CallerError):
        await world.broker.release("other", token=token)
    assert world.alive == {token}
    end = await world.broker.release("agent", token=token)
    assert (end.lease, end.at_issuer) == (lease.id, IssuerOutcome.CONFIRMED) and not world.alive
    with pytest.raises(CallerError):
        await world.broker.release("agent", token=token)


async def test_a_token_that_our_clock_calls_expired_is_revoked_all_the_same() -> None:
    """The clock that is wrong may be ours."""
    world = World()
    lease = await world.lease()
    world.clock.jump_wall(1000.0)
    with pytest.raises(CallerError):
        world.broker.use(lease, world.workflow)
    again = await world.lease()
    assert again is not lease and world.broker.use(again, world.workflow), "a jump costs one call, not the workflow"
    report = await world.close()
    assert [str(end.at_issuer) for end in report.ends] == ["confirmed", "confirmed"] and not world.alive


async def test_what_may_still_be_minted_at_the_deadline_has_a_residual_life() -> None:
    world = World(revoke_deadline=5.0)
    world.gate = asyncio.Event()
    waiting = asyncio.ensure_future(world.lease())
    await spin()
    closing = world.close()
    await world.clock.advance(5.0, sleepers=1)
    (end,) = (await closing).ends
    assert end.at_issuer is IssuerOutcome.FAILED and end.residual_seconds == TOOL.max_ttl
    draining = asyncio.ensure_future(world.broker.drain(1.0))
    await world.clock.advance(1.0, sleepers=1)
    left = await draining
    assert [(e.lease, str(e.at_issuer)) for e in left] == [(end.lease, "failed")], "and the shutdown names it"
    assert world.events[-1].event == "revoked" and world.events[-1].outcome == "failed"
    world.gate.set()
    with pytest.raises(CallerError):
        await waiting
    await spin()
    assert not world.alive and not await world.broker.drain(1.0)


async def test_one_agents_leases_leave_room_for_others() -> None:
    world = World(max_leases_per_agent=2)
    await world.lease(scopes=("a",))
    await world.lease(scopes=("a", "b"))
    with pytest.raises(CallerError) as caught:
        await world.lease(scopes=("b",))
    assert caught.value.reason is Reason.TOO_MANY_LEASES
    other = Workflow("wf_2", "another", "w", Secret("h"), 0.0, INF, INF)
    assert await world.broker.lease(other, TOOL, permit())
    await world.broker.withdraw(agent="agent")
    assert await world.lease(scopes=("b",)), "what has ended counts no more"


async def test_a_withdrawal_without_reissue_bars_the_workflows_that_had_no_lease_yet() -> None:
    world = World()
    for tool, refused in (("t", True), (None, True), ("other", False)):
        world.workflow = Workflow(f"wf_{tool}", "agent", "w", Secret("h"), 0.0, INF, INF)
        await world.broker.withdraw(tool=tool, bar=[world.workflow])
        if refused:
            with pytest.raises(CallerError) as caught:
                await world.lease()
            assert caught.value.reason is Reason.LEASE_GONE
        else:
            assert await world.lease()


async def test_a_record_is_shown_to_the_server_that_minted_it_alone() -> None:
    """A reload may give an issuer's name to another server: a token of the first is none of its business."""
    world, second = World(), World()
    world.server, second.server = "https://first.test", "https://second.test"
    record = RevocationRecord("i", "t", Secret("token"), world.clock.now() + 60, "agent", minted_at=world.server)
    world.alive.add("token")
    world.broker.replace({"i": second})
    assert await world.broker.revoker.end(record, TOOL) is IssuerOutcome.CONFIRMED
    assert not world.alive
    mended = World()
    mended.server = "https://first.test"
    mended.alive.add("token")
    world.broker.replace({"i": mended})
    assert await world.broker.revoker.end(record, TOOL) is IssuerOutcome.CONFIRMED and not mended.alive


async def test_what_cannot_be_proved_says_why_and_recovers(capsys: pytest.CaptureFixture[str]) -> None:
    configure("info", "console")
    world = World()
    world.can_look = False
    await world.lease()
    (end,) = (await world.close()).ends
    assert end.at_issuer is IssuerOutcome.ACKNOWLEDGED and "is its client in the token's audience?" in end.detail
    again = World()
    again.broker.revoker.unproven = world.broker.revoker.unproven
    await again.lease()
    (end,) = (await again.close()).ends
    assert end.at_issuer is IssuerOutcome.CONFIRMED and not end.detail and not again.broker.revoker.unproven
    logged = capsys.readouterr().err
    assert logged.count("revocation_not_proved") == 1 and logged.count("revocation_is_proved_again") == 1


async def test_an_issuer_that_takes_a_token_back_is_there_again() -> None:
    world = World()
    await world.lease()
    world.error = IssuerError(Reason.ISSUER_UNAVAILABLE, "down")
    with pytest.raises(IssuerError):
        await world.lease(scopes=("a", "b"))
    assert [row["ok"] for row in world.broker.health()] == [False]
    await world.close()
    assert [row["ok"] for row in world.broker.health()] == [True]
