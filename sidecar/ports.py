"""The few Protocols: where two real implementations exist, or siblings meet that must not import each other."""

from typing import Protocol

from sidecar.model.lease import Credential, IssuerOutcome, RevocationRecord
from sidecar.model.policy import Action, Permit
from sidecar.model.tool import Tool
from sidecar.model.workflow import Workflow
from sidecar.secret import Secret


class SvidSource(Protocol):
    """The identities of the declared agents. Real: `identity.source.WorkloadSvids`; in tests a fake, same contract."""

    def require_identity(self, agent: str) -> None:
        """Raises `IdentityError` unless `agent` has an unexpired identity now. Sync: asked before each injection."""
        ...

    async def jwt_svid(self, agent: str, audience: str, *, revoking: bool = False) -> Secret:
        """A JWT-SVID of `agent` for exactly `audience`, unexpired. Raises `IdentityError`.

        `revoking`: it will only take access away, so one that is held still will do when the identity has been withdrawn.
        """
        ...


class Exchanger(Protocol):
    """Turns an identity into a credential at one issuer, and takes it back.

    Real: `credentials.exchangers.token_exchange` (RFC 8693) and `credentials.exchangers.static`.
    """

    issuer: str
    server: str
    """Which server stands behind the issuer's name: what it minted is shown to no other."""

    async def exchange(
        self, workflow: Workflow, tool: Tool, scopes: tuple[str, ...], ttl: float, minted: list[RevocationRecord]
    ) -> Credential:
        """A new credential. Raises `IssuerError` or `IdentityError`. `ttl`: seconds it should live at most.

        Whatever the issuer mints is appended to `minted` at once, so that it is revoked even when a later step fails.
        """
        ...

    async def introspect(self, record: RevocationRecord, tool: Tool) -> bool | None:
        """RFC 7662 `active`, or None when no trustworthy look-up is possible. Raises `IssuerError` on failure."""
        ...

    async def revoke(self, record: RevocationRecord) -> IssuerOutcome:
        """RFC 7009, once: ACKNOWLEDGED or LOCAL_ONLY. On `IssuerError`, `IdentityError` the revoker tries again."""
        ...

    async def aclose(self) -> None: ...


class LeaseDecider(Protocol):
    """What the broker asks of policy at issue, renewal and exchange. Real: `policy.decider.Decider`."""

    def decide_lease(self, action: Action, workflow: Workflow, tool: Tool, scopes: tuple[str, ...]) -> Permit:
        """Raises `Denied`. The permit's scopes are `scopes`, narrowed."""
        ...


class AuditSink(Protocol):
    """Where encoded audit lines go. Real: `audit.sinks.FileSink` and `audit.sinks.StdoutSink`."""

    def write(self, lines: bytes) -> None:
        """Whole lines of JSON, each ended by a newline. May raise OSError: the log counts it and says so."""
        ...

    def reopen(self) -> None:
        """A reload: a file is opened anew, so that a rotation takes effect. May raise OSError."""
        ...

    def close(self) -> None: ...
