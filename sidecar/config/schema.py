"""The root of spanlock.yaml: one section model a package, and what must hold between sections."""

import os
from collections import Counter
from collections.abc import Iterable

from pydantic import Field, model_validator

from sidecar.address import HostPort
from sidecar.audit.config import AuditConfig
from sidecar.credentials.config import CredentialsConfig, IssuerConfig
from sidecar.identity.config import AgentConfig, SpiffeConfig
from sidecar.policy.config import PolicyConfig
from sidecar.proxy.config import LimitsConfig, ListenersConfig
from sidecar.section import Section
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
    run_dir: str = Field(
        default_factory=lambda: os.environ.get("SPANLOCK_RUN_DIR", "/run/spanlock"),
        description="Directory of the agents' and the operator's sockets.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        problems = [
            *_twice("agents", (a.name for a in self.agents)),
            *_twice("issuers", (i.name for i in self.issuers)),
            *_twice("tools", (t.name for t in self.tools)),
            *_twice("tools (url)", (str(t.build().authority) for t in self.tools)),
        ]
        issuers = {issuer.name for issuer in self.issuers}
        for index, tool in enumerate(self.tools):
            if tool.issuer not in issuers:
                problems.append(f"tools[{index}].issuer: {tool.issuer} is not the name of an entry in issuers")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def _twice(section: str, names: Iterable[str]) -> list[str]:
    return [f"{section}: {name} is there twice" for name, count in Counter(names).items() if count > 1]
