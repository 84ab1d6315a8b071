"""The `audit:` section."""

from pydantic import BaseModel, ConfigDict, Field

from sidecar.paths import ConfigFile


class AuditConfig(BaseModel):
    """Where the record goes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    file: ConfigFile = Field(
        default="-", description="Path of a JSON Lines file (made with mode 0600), or - for standard output."
    )
