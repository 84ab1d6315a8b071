"""The `workflows:` section."""

from pydantic import Field

from sidecar.section import Section


class WorkflowsConfig(Section):
    """How long work may last, and how calls may be bound to it."""

    max_open: int = Field(default=10_000, ge=1, description="Open workflows altogether.")
    max_open_per_agent: int = Field(default=2_000, ge=1)
    max_age: float = Field(default=3600.0, gt=0, description="Seconds; an agent may ask for less, never for more.")
    idle: float = Field(default=900.0, gt=0, description="Seconds without a call or a renewal.")
    bind_only_open: bool = Field(
        default=False, description="A call that names no workflow belongs to the caller's only open one."
    )
