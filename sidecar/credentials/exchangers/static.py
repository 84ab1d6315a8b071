"""A legacy shared secret from a file or a variable: leased and dropped like any credential, but `local_only`."""

import math
import os
from pathlib import Path

from sidecar.clock import Clock
from sidecar.credentials.config import StaticConfig
from sidecar.errors import IssuerError, Reason
from sidecar.model.lease import Credential, IssuerOutcome, RevocationRecord
from sidecar.model.tool import Tool
from sidecar.model.workflow import Workflow
from sidecar.ports import SvidSource
from sidecar.secret import Secret

_MAX_SECRET = 16 * 1024


class StaticExchanger:
    """`ports.Exchanger`. Needs the agent's identity all the same: no identity, no credential."""

    def __init__(self, config: StaticConfig, svids: SvidSource, clock: Clock) -> None:
        self.issuer = config.name
        self.server = ""
        self._config = config
        self._svids = svids
        self._clock = clock

    async def exchange(
        self, workflow: Workflow, tool: Tool, scopes: tuple[str, ...], ttl: float, minted: list[RevocationRecord]
    ) -> Credential:
        """Reads the secret again each time, so that a rotated file is picked up."""
        self._svids.require_identity(workflow.agent)
        value = Secret(self._read())
        record = RevocationRecord(self.issuer, tool.name, value, math.inf, workflow.agent, revocable=False)
        minted.append(record)
        return Credential(value, self._clock.now(), math.inf, (record,), scopes)

    def _read(self) -> str:
        config = self._config
        if config.secret_env is not None:
            value, source = os.environ.get(config.secret_env, ""), f"variable {config.secret_env}"
        else:
            source = f"file {config.secret_file}"
            try:
                value = Path(config.secret_file or "").read_text(encoding="utf-8")
            except (OSError, UnicodeError):
                value = ""
        value = value.strip()
        if not value or len(value) > _MAX_SECRET:
            raise IssuerError(
                Reason.SECRET_UNAVAILABLE, f"issuer {self.issuer}: {source} is missing, empty or too long"
            )
        return value

    async def introspect(self, record: RevocationRecord, tool: Tool) -> bool | None:
        """Nobody can be asked."""
        return None

    async def revoke(self, record: RevocationRecord) -> IssuerOutcome:
        """It cannot be revoked; it is dropped here."""
        return IssuerOutcome.LOCAL_ONLY

    async def aclose(self) -> None:
        """Nothing is open."""
