"""A lease: the right to use one credential until its workflow closes. Its life is the table below."""

from dataclasses import dataclass, field
from enum import Enum, StrEnum

from sidecar.secret import Secret


class LeaseState(Enum):
    PENDING = "pending"
    """The exchange is under way."""
    ACTIVE = "active"
    STALE = "stale"
    """Renewal failed; the credential is served until its own expiry."""
    REVOKING = "revoking"
    """Unusable here; the issuer is being told, or an exchange in flight is awaited to be revoked."""
    GONE = "gone"


class LeaseEvent(Enum):
    ISSUED = "issued"
    ISSUE_FAILED = "issue_failed"
    RENEWED = "renewed"
    RENEW_FAILED = "renew_failed"
    EXPIRED = "expired"
    WORKFLOW_CLOSED = "workflow_closed"
    WITHDRAWN = "withdrawn"
    """By operator, trigger, policy, or release by the agent."""
    REVOKE_DONE = "revoke_done"
    """The revocation has its final outcome."""


_P, _A, _S, _R, _G = LeaseState
LEASE_TABLE: dict[tuple[LeaseState, LeaseEvent], LeaseState] = {
    (_P, LeaseEvent.ISSUED): _A,
    (_P, LeaseEvent.ISSUE_FAILED): _G,
    # Closed while the exchange is in flight: the value that arrives is revoked and never used.
    (_P, LeaseEvent.WORKFLOW_CLOSED): _R,
    (_P, LeaseEvent.WITHDRAWN): _R,
    (_A, LeaseEvent.RENEWED): _A,
    (_A, LeaseEvent.RENEW_FAILED): _S,
    (_A, LeaseEvent.EXPIRED): _R,
    (_A, LeaseEvent.WORKFLOW_CLOSED): _R,
    (_A, LeaseEvent.WITHDRAWN): _R,
    (_S, LeaseEvent.RENEWED): _A,
    (_S, LeaseEvent.RENEW_FAILED): _S,
    (_S, LeaseEvent.EXPIRED): _R,
    (_S, LeaseEvent.WORKFLOW_CLOSED): _R,
    (_S, LeaseEvent.WITHDRAWN): _R,
    # A value that arrives now is handed to the revoker.
    (_R, LeaseEvent.ISSUED): _R,
    (_R, LeaseEvent.ISSUE_FAILED): _R,
    (_R, LeaseEvent.RENEWED): _R,
    (_R, LeaseEvent.RENEW_FAILED): _R,
    (_R, LeaseEvent.EXPIRED): _R,
    (_R, LeaseEvent.WORKFLOW_CLOSED): _R,
    (_R, LeaseEvent.WITHDRAWN): _R,
    (_R, LeaseEvent.REVOKE_DONE): _G,
}

USABLE = (LeaseState.ACTIVE, LeaseState.STALE)  # a tuple: looked through by identity, where a set would hash
"""The states in which the credential may be put on a request."""


class IssuerOutcome(StrEnum):
    """What became of a credential at its issuer: the first of the two facts that a lease ends with."""

    CONFIRMED = "confirmed"
    """The same look-up said active before the revocation and inactive after it."""
    ACKNOWLEDGED = "acknowledged"
    """The issuer answered 2xx, and no look-up with a positive control was possible."""
    LOCAL_ONLY = "local_only"
    """It cannot be revoked; dropped here."""
    EXPIRED = "expired"
    """Its own expiry passed before a revocation succeeded."""
    FAILED = "failed"
    """Not revoked at the deadline, and still being tried."""
    NOT_ISSUED = "not_issued"
    """The exchange never gave a credential."""
    MINT_UNKNOWN = "mint_unknown"
    """The exchange's answer was never seen; the credential may exist for its maximum life."""


class TokenCheck(StrEnum):
    """How the tool checks a token; decides the second fact, what is left of its life at the tool."""

    INTROSPECTION = "introspection"
    OFFLINE = "offline"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class LeaseKey:
    """Every input that changes the token. Two calls share a lease only when all of it is equal."""

    workflow: str
    agent: str
    tool: str
    issuer: str
    audience: str | None
    resource: str | None
    scopes: tuple[str, ...]
    """Sorted."""
    binding: str | None = None
    """Thumbprint of the proof-of-possession key; None for bearer tokens."""


@dataclass(frozen=True, slots=True)
class RevocationRecord:
    """What revoking one issued token needs. For RFC 7009 the token itself; reachable only to the revoker."""

    issuer: str
    tool: str
    token: Secret
    expires_at: float
    """Wall seconds; when the issuer does not say, later rather than earlier."""
    agent: str
    revocable: bool = True
    """False for a credential that its issuer cannot revoke singly (a static secret)."""
    minted_at: str = ""
    """The server that gave it, and the only one that it is ever shown to: a reload may give the issuer's name another."""


@dataclass(frozen=True, slots=True)
class Credential:
    """A value with its times, as an exchanger gave it. `records` revoke it and all that was minted on the way."""

    value: Secret
    issued_at: float
    """Wall seconds."""
    expires_at: float
    """Wall seconds; `inf` for a static secret."""
    records: tuple[RevocationRecord, ...]
    scopes: tuple[str, ...] = ()
    """As granted."""


@dataclass(slots=True, eq=False)
class Lease:
    """Fields below the line change; only `credentials.broker` changes them."""

    id: str
    """Public: `ls_` and 16 hex digits."""
    key: LeaseKey
    ttl: float
    """Seconds that any credential of it is used at most, renewed ones too."""
    # ---
    state: LeaseState = LeaseState.PENDING
    credential: Credential | None = None
    """None while pending and from the drop on."""
    header: bytes = field(default=b"", repr=False)
    """The rendered header value; emptied at the drop. A secret: never printed."""
    epoch: int = 0
    """Raised at each renewal and re-issue."""
    uses: int = 0
    last_used: float = 0.0
    """Monotonic seconds."""
    usable_until: float = 0.0
    """Monotonic seconds; checked right before the write."""
    ends_at: float = 0.0
    """The same in wall seconds, for people: it is revoked then unless it is renewed."""
    policy_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeaseEnd:
    """The two facts that a lease ends with. A lease that minted several tokens reports the worst of them."""

    lease: str
    workflow: str
    agent: str
    tool: str
    at_issuer: IssuerOutcome
    residual_seconds: float
    """At most this long the token may still be accepted at the tool; 0.0: dead there; -1.0: no end (a static secret)."""
    token_check: TokenCheck
    uses: int = 0
    detail: str = ""
    issuer: str = ""


@dataclass(frozen=True, slots=True)
class CloseReport:
    """How a workflow ended: one `LeaseEnd` for each lease it ever held."""

    workflow: str
    agent: str
    reason: str
    ends: tuple[LeaseEnd, ...] = field(default=())
    dropped_ms: float = 0.0
    revoked_ms: float = 0.0
    """Until the last final outcome, or the deadline."""
    refused: tuple[tuple[str, int], ...] = ()
    """Reasons for which calls of the workflow were refused, and how often."""
