"""The root of spanlock.yaml: one section model a package, and what must hold between sections."""

import os
from collections.abc import Iterable, Iterator

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from sidecar.address import HostPort
from sidecar.audit.config import AuditConfig
from sidecar.credentials.config import CredentialsConfig, IssuerConfig
from sidecar.identity.config import AgentConfig, SpiffeConfig
from sidecar.policy.config import PolicyConfig
from sidecar.proxy.config import LimitsConfig, ListenersConfig
from sidecar.section import ConfigFile, Section
from sidecar.telemetry.config import TelemetryConfig
from sidecar.tools.config import ToolConfig
from sidecar.triggers.config import OtlpConfig
from sidecar.workflows.config import WorkflowsConfig


class Settings(Section):
    """Everything that an operator may say. Unknown keys are errors."""

    spiffe: SpiffeConfig = SpiffeConfig()
    agents: tuple[AgentConfig, ...] = Field(min_length=1, description="The AI agents beside this sidecar.")
    issuers: tuple[IssuerConfig, ...] = Field(default=(), description="Who mints credentials.")
    tools: tuple[ToolConfig, ...] = Field(default=(), description="What agents may use; empty: nothing.")
    policy: PolicyConfig
    workflows: WorkflowsConfig = WorkflowsConfig()
    credentials: CredentialsConfig = CredentialsConfig()
    listeners: ListenersConfig = ListenersConfig()
    otlp: OtlpConfig = OtlpConfig()
    health: HostPort | None = Field(default="0.0.0.0:17091", description="/healthz, /readyz, /metrics; null: off.")  # noqa: S104
    limits: LimitsConfig = LimitsConfig()
    audit: AuditConfig = AuditConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    run_dir: ConfigFile = Field(
        default_factory=lambda: os.environ.get("SPANLOCK_RUN_DIR") or "/run/spanlock",
        description="Directory of the agents' and the operator's sockets. Default: SPANLOCK_RUN_DIR, then /run/spanlock.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        """Each problem is an error with a key of its own: one ValueError for all would be one line without any."""
        problems = [
            *_twice("agents", "name", (a.name for a in self.agents)),
            *_twice("issuers", "name", (i.name for i in self.issuers)),
            *_twice("tools", "name", (t.name for t in self.tools)),
            *_twice("tools", "url", (str(t.build().authority) for t in self.tools)),
            *self._unknown_issuers(),
        ]
        if problems:
            raise ValidationError.from_exception_data("Settings", problems)
        return self

    def _unknown_issuers(self) -> Iterator[InitErrorDetails]:
        issuers = {issuer.name for issuer in self.issuers}
        for index, tool in enumerate(self.tools):
            if tool.issuer not in issuers:
                yield _problem(("tools", index, "issuer"), tool.issuer, "is not the name of an entry in issuers")


def _twice(section: str, key: str, values: Iterable[str]) -> Iterator[InitErrorDetails]:
    seen: set[str] = set()
    for index, value in enumerate(values):
        if value in seen:
            yield _problem((section, index, key), value, "is there twice")
        seen.add(value)


def _problem(key: tuple[str | int, ...], value: str, what: str) -> InitErrorDetails:
    error = PydanticCustomError("between_sections", "{value} {what}", {"value": value, "what": what})
    return InitErrorDetails(type=error, loc=key, input=value)
