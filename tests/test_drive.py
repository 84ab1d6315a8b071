"""The real broker, renewer and registry through every short interleaving of what may happen to one workflow's leases.

A scripted issuer answers each exchange and each revocation when the driver says so, and time moves when it says so. After
each step: nothing of a workflow that is not open can be used, and whatever lives at the issuer is usable within an open
workflow, or with the revoker, or told in the end of its lease. From each new state the rest is let go its way: then all is
dead, and the report is true. States that differ in nothing that matters are looked at once (`Drive.look`).
"""

import asyncio
import random
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from sidecar.credentials import broker as broker_module
from sidecar.credentials import ending as ending_module
from sidecar.credentials.broker import Broker
from sidecar.credentials.config import CredentialsConfig
from sidecar.credentials.held import Held
from sidecar.credentials.renewer import Renewer
from sidecar.errors import AnswerLost, CallerError, Denied, IssuerError, Reason, SpanlockError
from sidecar.model.lease import (
    LEASE_TABLE,
    USABLE,
    CloseReport,
    Credential,
    IssuerOutcome,
    LeaseState,
    RevocationRecord,
    TokenCheck,
)
from sidecar.model.policy import Action, Permit, Question
from sidecar.model.tool import Authority, Tool
from sidecar.model.workflow import WORKFLOW_TABLE, CloseReason, Workflow, WorkflowState
from sidecar.secret import Secret
from sidecar.tasks import Background
from sidecar.telemetry.logging import configure
from sidecar.workflows import registry as registry_module
from sidecar.workflows.config import WorkflowsConfig
from sidecar.workflows.registry import Registry
from tests.fakes.clock import FakeClock
from tests.test_walk import NEVER_TAKEN, ROWS, Recorded, Row, name_of

DEPTHS = {("t",): 6, ("t", "u"): 5}
"""Tools, and steps from the beginning: enough for each row of the tables to be taken."""
MOST = {"begin": 3, "renew": 2, "later": 2, "withdraw": 1, "bar": 1, "release": 1, "policy": 1, "fails": 1}
"""How often at most in one interleaving."""
LIFE = 100.0
CREDENTIALS, WORKFLOWS = CredentialsConfig(), WorkflowsConfig(max_age=86_400, idle=86_400)
PERMIT = Permit(Question("agent", Action.HTTP_REQUEST, "t"), ("a",), float("inf"), ("p",), 1)


@dataclass(eq=False)
class Token:
    """One that the issuer minted."""

    name: str
    held: Held
    record: RevocationRecord | None
    """None: the answer was lost, so that nobody can name it."""
    expires_at: float
    told: bool = False
    """The revoker has asked the issuer about it."""


class Issuer:
    """Exchanges and revocations wait here until the driver answers them."""

    issuer = "i"
    server = ""

    def __init__(self, drive: "Drive") -> None:
        self.drive = drive
        self.exchanges: list[tuple[str, asyncio.Future[str]]] = []
        self.revocations: list[tuple[Token, asyncio.Future[str]]] = []
        self.tokens: list[Token] = []
        self.alive: set[str] = set()
        self.at_once = False
        """No waiting any more: exchanges succeed, and so do revocations."""

    async def exchange(
        self, workflow: Workflow, tool: Tool, scopes: tuple[str, ...], ttl: float, minted: list[RevocationRecord]
    ) -> Credential:
        (held,) = (h for h in self.drive.helds if h.exchanging is asyncio.current_task())
        answer = "ok" if self.at_once else await self._wait(self.exchanges, tool.name)
        if answer == "refused":
            raise IssuerError(Reason.ISSUER_REFUSED, "no")
        now = self.drive.clock.now()
        name = f"token-{len(self.tokens)}"
        record = RevocationRecord("i", tool.name, Secret(name), now + LIFE, workflow.agent)
        lost = answer == "lost"
        self.tokens.append(Token(name, held, None if lost else record, record.expires_at))
        self.alive.add(name)
        if lost:
            raise AnswerLost(Reason.ISSUER_UNAVAILABLE, "lost")
        minted.append(record)
        if answer == "half":
            raise IssuerError(Reason.ISSUER_REFUSED, "the second step failed")
        return Credential(Secret(name), now, now + LIFE, (record,), scopes)

    async def introspect(self, record: RevocationRecord, tool: Tool) -> bool | None:
        self._of(record).told = True
        return record.token.reveal() in self.alive

    async def revoke(self, record: RevocationRecord) -> IssuerOutcome:
        token = self._of(record)
        if not self.at_once and await self._wait(self.revocations, token) == "fails":
            raise IssuerError(Reason.ISSUER_UNAVAILABLE, "down")
        self.alive.discard(token.name)
        return IssuerOutcome.ACKNOWLEDGED

    async def aclose(self) -> None: ...

    async def _wait(self, waiting: list[tuple[Any, asyncio.Future[str]]], what: Any) -> str:
        entry: tuple[Any, asyncio.Future[str]] = (what, asyncio.get_running_loop().create_future())
        waiting.append(entry)
        answer: str = await entry[1]
        waiting.remove(entry)
        return answer

    def _of(self, record: RevocationRecord) -> Token:
        return next(token for token in self.tokens if token.record is record)


class Drive:
    """One run: the broker and the registry as `app.py` wires them, and what the driver may do next."""

    def __init__(self, tools: tuple[str, ...]) -> None:
        self.clock = FakeClock()
        self.bugs: list[BaseException] = []
        self.background = Background(lambda name, error: self._note(error))
        self.issuer = Issuer(self)
        self.helds: list[Held] = []
        self.report: CloseReport | None = None
        self.permitted = True
        self.left = dict(MOST)
        self.calls: list[asyncio.Task[Any]] = []
        self.tools = {name: Tool(name, "https", Authority(f"{name}.test", 443), "i", scopes=("a",),
                                 token_check=TokenCheck.INTROSPECTION) for name in tools}  # fmt: skip
        self.broker = Broker(
            clock=self.clock, rng=random.Random(1), svids=self, exchangers={"i": self.issuer}, decider=self,
            config=CREDENTIALS, background=self.background, on_event=lambda record: None,
            on_drop=lambda workflow, lease: None,
        )  # fmt: skip
        self.renewer = Renewer(self.broker, self.clock)
        self.registry = Registry(
            self.clock, WORKFLOWS, self.broker.close_workflow, self._changed, self.background
        )  # fmt: skip
        self.workflow = self.registry.open("agent", name="w")

    # -- the neighbours -----------------------------------------------------------------------------------------

    def require_identity(self, agent: str) -> None: ...

    async def jwt_svid(self, agent: str, audience: str, *, revoking: bool = False) -> Secret:
        return Secret("svid")

    def decide_lease(self, action: Action, workflow: Workflow, tool: Tool, scopes: tuple[str, ...]) -> Permit:
        if not self.permitted and action is Action.LEASE_RENEW:
            raise Denied(Reason.POLICY_DENIED, "no")
        return Permit(Question("agent", action, tool.name), scopes, float("inf"), ("p",), 1)

    def _changed(self, workflow: Workflow, report: CloseReport | None) -> None:
        self.report = report or self.report

    def _ended(self, call: asyncio.Task[Any]) -> None:
        if not call.cancelled() and (error := call.exception()) is not None:
            self._note(error)

    def _note(self, error: BaseException) -> None:
        if not isinstance(error, SpanlockError):
            self.bugs.append(error)

    # -- what may happen ----------------------------------------------------------------------------------------

    def may(self) -> list[str]:
        """All that can happen next, each alone, and each with a close or withdrawal right behind it, before anybody runs."""
        alone = [name for name in self._alone() if self.left.get(name.split()[0], 1) > 0]
        if not self.workflow.is_open:
            return alone
        ends = [name for name in alone if name.split()[0] in ("close", "withdraw")]
        return alone + [
            f"{first}, {end}" for first in alone for end in ends if first.split()[0] not in ("close", "withdraw")
        ]

    def _alone(self) -> list[str]:
        found = []
        for index, _ in enumerate(self.issuer.exchanges):
            found += [f"answer {index} {how}" for how in ("ok", "refused", "half", "lost")]
        for index, _ in enumerate(self.issuer.revocations):
            found += [f"revoked {index}", f"fails {index}"]
        live = self.broker.live.matching()
        if any(h.lease.state in USABLE and h.exchanging is None for h in live):
            found += ["renew"]
        if any(h.lease.state in USABLE for h in live):
            found += ["expire"]
        if live or self.issuer.revocations or self.broker.revoker.backlog:
            found += ["later"]
        if self.workflow.is_open:
            idle = [name for name in self.tools if not self.broker.live.matching(tool=name)]
            found += ["close", *(f"begin {name}" for name in idle)]
            for held in live:
                tool = held.tool.name
                found += [f"withdraw {tool}", f"bar {tool}", f"release {tool}"]
            if live and self.permitted:
                found += ["policy"]
        return found

    async def do(self, names: str) -> None:
        for name in names.split(", "):
            words = name.split()
            if words[0] in self.left:
                self.left[words[0]] -= 1
            waits = getattr(self, f"_{words[0]}")(*words[1:])
            if waits is not None:
                await waits
            self.helds += [held for held in self.broker.live.matching() if held not in self.helds]
        await self._settle()
        for held in self.helds:
            self.used(held)  # what is used is renewed

    async def _begin(self, tool: str) -> None:
        await self._call(self.broker.lease(self.workflow, self.tools[tool], PERMIT))

    def _answer(self, index: str, how: str) -> None:
        self.issuer.exchanges[int(index)][1].set_result(how)

    def _revoked(self, index: str) -> None:
        self.issuer.revocations[int(index)][1].set_result("ok")

    def _fails(self, index: str) -> None:
        self.issuer.revocations[int(index)][1].set_result("fails")

    async def _renew(self) -> None:
        """Up to the first renewal that is due."""
        live = [h for h in self.broker.live.matching() if h.lease.state in USABLE and h.exchanging is None]
        await self._forward(min(h.renew_at for h in live) - self.clock.monotonic())

    async def _expire(self) -> None:
        """Up to the first expiry of a credential."""
        live = [h for h in self.broker.live.matching() if h.lease.state in USABLE]
        await self._forward(min(h.lease.usable_until for h in live) - self.clock.monotonic())

    async def _later(self) -> None:
        """Longer than the grace of superseded tokens, the deadline of a report and the first wait of a revocation."""
        await self._forward(6.0)

    async def _forward(self, seconds: float) -> None:
        await self.clock.advance(max(seconds, 0.0))
        self.renewer.tick()

    def _policy(self) -> None:
        self.permitted = False

    async def _withdraw(self, tool: str) -> None:
        await self._call(self.broker.withdraw(workflow=self.workflow.id, tool=tool))

    async def _bar(self, tool: str) -> None:
        await self._call(self.broker.withdraw(workflow=self.workflow.id, tool=tool, bar=[self.workflow]))

    async def _release(self, tool: str) -> None:
        (held,) = self.broker.live.matching(tool=tool)
        await self._call(self.broker.release("agent", lease_id=held.lease.id))

    def _close(self) -> None:
        self.registry.close(self.workflow, CloseReason.CLOSED)

    async def _call(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs up to its first wait; what it has spawned has not run then."""
        task = asyncio.get_running_loop().create_task(work)
        self.calls.append(task)
        task.add_done_callback(self._ended)
        await asyncio.sleep(0)

    async def _settle(self) -> None:
        """Until everybody waits: nothing is ready to run, and there is no I/O. uvloop would not say."""
        ready = asyncio.get_running_loop()._ready  # type: ignore[attr-defined]
        while ready:
            await asyncio.sleep(0)

    # -- what must hold -----------------------------------------------------------------------------------------

    def used(self, held: Held) -> bytes:
        """What a call would carry now; empty when the broker refuses."""
        try:
            return self.broker.use(held.lease, self.workflow)
        except CallerError:
            return b""

    def check(self) -> None:
        assert not self.bugs, self.bugs
        now_open = self.workflow.is_open
        for held in self.helds:
            carried, lease = self.used(held), held.lease
            assert not (carried and not now_open), "used beyond its workflow"
            if not now_open or held.ending is not None:
                assert lease.state not in USABLE and lease.credential is None and not lease.header, "not dropped"
                assert held not in self.broker.live.matching()
            if lease.state in USABLE:
                assert now_open and lease.credential is not None and held in self.broker.live.matching()
        for token in self.issuer.tokens:
            if token.name in self.issuer.alive and token.expires_at > self.clock.now():
                assert self.accounted(token), f"{token.name} lives, and nobody knows"

    def accounted(self, token: Token) -> bool:
        """Usable within an open workflow, or with the revoker, or told in the end of its lease."""
        held, ending = token.held, token.held.ending
        if self.workflow.is_open and held in self.broker.live.matching():
            if self.used(held) == f"Bearer {token.name}".encode() or token.record in held.superseded:
                return True  # a superseded one is there for calls already sent
            if token.record is None and held.lost_answer:
                return True
        if ending is not None and not ending.done():
            return token.told or token.record in held.doomed or (token.record is None and held.lost_answer)
        if ending is not None:
            return ending.result().at_issuer in (IssuerOutcome.MINT_UNKNOWN, IssuerOutcome.FAILED)
        return token.told and self.broker.revoker.backlog > 0  # half minted by a renewal that failed

    async def finish(self) -> None:
        """Lets the rest go its way, and looks at what has become of everything."""
        self.issuer.at_once = True
        for _, future in (*self.issuer.exchanges, *self.issuer.revocations):
            future.set_result("ok")
        self.registry.close(self.workflow, CloseReason.CLOSED)
        for tool in self.tools.values():
            with pytest.raises(CallerError):
                await self.broker.lease(self.workflow, tool, PERMIT)
        await self._settle()
        self.check()
        for _ in range(3):
            await self.clock.advance(31)
            await self._settle()
        self.check()
        assert self.workflow.state is WorkflowState.CLOSED and self.report is not None
        assert self.broker.revoker.backlog == 0 and not self.broker.live.matching()
        ended = {held.lease.id for held in self.helds if held.ending is not None}
        assert {end.lease for end in self.report.ends} == ended, "one end for each lease that ever had something to end"
        outcomes = {end.lease: end.at_issuer for end in self.report.ends}
        for held in self.helds:
            assert held.lease.state is LeaseState.GONE
        for token in self.issuer.tokens:
            if token.record is None:
                assert outcomes[token.held.lease.id] in (IssuerOutcome.MINT_UNKNOWN, IssuerOutcome.FAILED)
            elif token.name in self.issuer.alive:
                assert outcomes[token.held.lease.id] is not IssuerOutcome.CONFIRMED
                assert token.expires_at <= self.clock.now(), "nobody revoked it"

    def look(self) -> object:
        """All that matters of this state: two runs that look the same may go on in the same ways. Tools are alike."""
        now = self.clock.monotonic()
        leases: dict[str, list[object]] = {name: [] for name in self.tools}
        for held in self.helds:
            until = held.lease.usable_until - now if held.lease.state in USABLE else 0.0
            due = held.renew_at - now if held.lease.state in USABLE else 0.0
            ending = None if held.ending is None else held.ending.done() and str(held.ending.result().at_issuer)
            leases[held.tool.name].append((
                held.lease.state.value, held.exchanging is not None, len(held.superseded), len(held.doomed),
                sum(t.done() for t in held.revoking), len(held.revoking), held.lost_answer, ending,
                until > 0, until // 40, due > 0,
            ))  # fmt: skip
        for name, kind in (
            *((tool, "exchange") for tool, _ in self.issuer.exchanges),
            *((token.held.tool.name, "revocation") for token, _ in self.issuer.revocations),
        ):
            leases[name].append((kind,))
        for name in self.tools:
            if name in self.broker._barred.get(self.workflow.id, ()):
                leases[name].append(("barred",))
        alike = tuple(sorted(repr(each) for each in leases.values()))
        told = None if self.report is None else tuple(sorted(str(end.at_issuer) for end in self.report.ends))
        return alike, self.workflow.state.value, told, self.permitted, self.broker.revoker.backlog

    async def aclose(self) -> None:
        for task in self.calls:
            task.cancel()
        await self.background.aclose()
        await asyncio.gather(*self.calls, return_exceptions=True)


async def drive(tools: tuple[str, ...], depth: int) -> int:
    """Every interleaving of at most `depth` steps. Returns how many states were seen; raises at the first that is wrong."""
    seen: set[object] = set()
    queue: deque[tuple[str, ...]] = deque([()])
    while queue:
        path = queue.popleft()
        run = Drive(tools)
        try:
            for names in path:
                await run.do(names)
            run.check()  # all before the last step was looked at when it was the last
            look = run.look()
            if look in seen:
                continue
            seen.add(look)
            if len(path) < depth:
                queue.extend((*path, names) for names in run.may())
            await run.finish()
        except Exception as error:
            raise AssertionError(f"after {path}") from error
        finally:
            await run.aclose()
    return len(seen)


def drive_all(tools: tuple[str, ...], depth: int) -> int:
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(drive(tools, depth))


@pytest.fixture
def lease_table(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    """The broker's table for this test, which a test may change."""
    table = Recorded(LEASE_TABLE)
    for module in (broker_module, ending_module):
        monkeypatch.setattr(module, "LEASE_TABLE", table)
    return table


@pytest.fixture
def workflow_table(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    table = Recorded(WORKFLOW_TABLE)
    monkeypatch.setattr(registry_module, "WORKFLOW_TABLE", table)
    return table


@pytest.fixture(autouse=True)
def quiet() -> None:
    """A revocation that fails is logged, and here thousands do."""
    configure("error", "console")


@pytest.mark.timeout(300)  # four seconds of work, and the machine may be busy
def test_nothing_usable_outlives_its_workflow_in_any_order(
    lease_table: Recorded, workflow_table: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    """One lease after another deeply, and two at once; together they take the rows that the walk of the tables takes."""
    seen = {tools: drive_all(tools, depth) for tools, depth in DEPTHS.items()}
    assert lease_table.taken | workflow_table.taken == set(ROWS) - set(NEVER_TAKEN)
    with capsys.disabled():
        print(f"\nthe drive of the real broker and registry saw {sum(seen.values())} states")


@pytest.mark.parametrize("row", [row for row in ROWS if row not in NEVER_TAKEN], ids=name_of)
def test_the_drive_fails_without_any_row_that_is_taken(
    row: Row, lease_table: Recorded, workflow_table: Recorded
) -> None:
    for table in (lease_table, workflow_table):
        table.pop(row, None)
    with pytest.raises(AssertionError, match="after "):
        drive_all(("t",), DEPTHS["t",])


@pytest.mark.parametrize("steps", [("begin t", "answer 0 ok", "renew, close"), ("begin t, close",)])
def test_no_token_is_minted_for_a_workflow_that_is_closed(steps: tuple[str, ...]) -> None:
    async def run() -> list[Any]:
        drive = Drive(("t",))
        for names in steps:
            await drive.do(names)
        asked = list(drive.issuer.exchanges)
        await drive.aclose()
        return asked

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        assert runner.run(run()) == [], "the issuer was asked after the close"
