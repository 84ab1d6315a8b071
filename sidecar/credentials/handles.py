"""What the agent sees instead of a value: 128 random bits, bound to workflow, agent and tool, dead with its lease."""

import secrets

from sidecar.errors import CallerError, Reason
from sidecar.model.lease import Lease

PREFIX = "slh_"


class Handles:
    """All live CredentialHandles. Only the broker adds and drops."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._by_lease: dict[str, str] = {}

    def issue(self, lease: Lease) -> str:
        """The handle of `lease`: one for its whole life, however often its owner asks, so that asking costs no memory."""
        value = self._by_lease.get(lease.id)
        if value is None:
            value = self._by_lease[lease.id] = PREFIX + secrets.token_hex(16)
            self._leases[value] = lease
        return value

    def resolve(self, value: str, agents: frozenset[str], tool: str | None) -> Lease:
        """The lease of a handle that this caller may use at this tool. Raises `CallerError` (handle_invalid)."""
        lease = self._leases.get(value)
        if lease is None or lease.key.agent not in agents or (tool is not None and lease.key.tool != tool):
            raise CallerError(
                Reason.HANDLE_INVALID, "the credential handle is unknown, dead, or another caller's or tool's"
            )
        return lease

    def drop(self, lease: Lease) -> None:
        """The handle of `lease`, if it has one, is worthless from now on."""
        value = self._by_lease.pop(lease.id, None)
        if value is not None:
            del self._leases[value]
