"""The `policy:` section."""

from pydantic import BaseModel, ConfigDict, Field

from sidecar.paths import ConfigFile


class PolicyConfig(BaseModel):
    """Which Cedar policies decide, and in which environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    files: tuple[ConfigFile, ...] = Field(
        min_length=1, description="Cedar files, relative to the configuration file. Default deny."
    )
    environment: str = Field(
        default="production", pattern=r"^[a-z0-9-]{1,63}$", description="context.environment in policies."
    )
