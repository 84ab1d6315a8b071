"""What the credentials package knows of each lease besides the lease itself, and the index of all live ones."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sidecar.model.lease import Credential, IssuerOutcome, Lease, LeaseEnd, RevocationRecord
from sidecar.model.tool import Tool
from sidecar.model.workflow import Workflow

Call = tuple[str, str, tuple[str, ...], float]
"""(workflow, tool, scopes, ttl): what differs between calls; the rest of a lease's key is the tool's. By `ttl` as well, so that
a path whose policy wants a younger credential gets its own, and ends nobody's."""


@dataclass(slots=True, eq=False)
class Held:
    """A lease with what ends it. Only this package changes it."""

    lease: Lease
    workflow: Workflow
    tool: Tool
    call: Call
    exchanging: asyncio.Task[None] | None = None
    """The exchange or renewal under way."""
    renew_at: float = 0.0
    """Monotonic seconds."""
    used_since_issue: bool = False
    exported: bool = False
    """The agent has the token itself, until the time that it was told: a renewal would revoke it under its hands."""
    superseded: list[RevocationRecord] = field(default_factory=list)
    """Of earlier credentials, not yet revoked."""
    doomed: list[RevocationRecord] = field(default_factory=list)
    """Reachable to the revoker alone."""
    revoking: list[asyncio.Task[IssuerOutcome]] = field(default_factory=list)
    """One for each token that the issuer is being told about, or was."""
    expires_at: float = 0.0
    """Wall seconds: of the last token minted."""
    lost_answer: bool = False
    """An exchange's answer was never seen: something may live at the issuer that we cannot name."""
    ending: asyncio.Task[LeaseEnd] | None = None

    def minted(self, records: Sequence[RevocationRecord]) -> None:
        """Notes how long what was minted may live."""
        self.expires_at = max(self.expires_at, *(record.expires_at for record in records))

    def doom(self, records: Sequence[RevocationRecord]) -> None:
        """Hands tokens that nobody may use any more to the revoker."""
        if records:
            self.doomed.extend(self._not_in_use(records))
            self.minted(records)

    def _not_in_use(self, records: Sequence[RevocationRecord]) -> list[RevocationRecord]:
        """Some issuers give the same token again while it is good."""
        credential = self.lease.credential
        used = [record.token for record in credential.records] if credential is not None else []
        return [record for record in records if record.token not in used]

    def install(self, credential: Credential, header: bytes) -> None:
        """The lease's credential from now on; the one before is superseded."""
        before, self.lease.credential, self.lease.header = self.lease.credential, credential, header
        if before is not None:
            self.superseded.extend(self._not_in_use(before.records))
        self.lease.epoch += 1
        self.minted(credential.records)
        self.used_since_issue = False

    def strip(self) -> None:
        """Takes the credential away: what was minted is doomed, and nothing usable is left."""
        credential, self.lease.credential, self.lease.header = self.lease.credential, None, b""
        if credential is not None:
            self.doom(credential.records)
        self.doom(self.superseded)
        self.superseded.clear()


class LiveLeases:
    """Every lease that is not dropped, by what a call needs and by workflow."""

    def __init__(self) -> None:
        self._calls: dict[Call, Held] = {}
        self._by_workflow: dict[str, dict[str, Held]] = {}
        self._by_agent: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._calls)

    def of_agent(self, agent: str) -> int:
        """How many one agent has."""
        return self._by_agent[agent]

    def add(self, held: Held) -> None:
        self._calls[held.call] = held
        self._by_workflow.setdefault(held.workflow.id, {})[held.lease.id] = held
        self._by_agent[held.workflow.agent] += 1

    def remove(self, held: Held) -> None:
        """Out of every index: no look-up finds it again. One that is not there is fine."""
        if self._calls.get(held.call) is held:
            del self._calls[held.call]
        leases = self._by_workflow.get(held.workflow.id, {})
        if leases.pop(held.lease.id, None) is not None:
            self._by_agent[held.workflow.agent] -= 1
        if not leases:
            self._by_workflow.pop(held.workflow.id, None)

    def for_call(self, call: Call) -> Held | None:
        return self._calls.get(call)

    def of(self, lease: Lease) -> Held:
        """Raises KeyError when the lease is not live."""
        return self._by_workflow[lease.key.workflow][lease.id]

    def matching(self, workflow: str | None = None, agent: str | None = None, tool: str | None = None) -> list[Held]:
        """Those of a workflow, an agent, a tool; all when nothing is named. With a workflow, others cost nothing."""
        if workflow is not None:
            found = list(self._by_workflow.get(workflow, {}).values())
        else:
            found = [held for leases in self._by_workflow.values() for held in leases.values()]
        return [h for h in found if agent in (None, h.lease.key.agent) and tool in (None, h.lease.key.tool)]
