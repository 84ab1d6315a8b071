"""The `policy:` section."""

from pydantic import Field

from sidecar.section import ConfigFile, Section


class PolicyConfig(Section):
    """Which Cedar policies decide, and in which environment."""

    files: tuple[ConfigFile, ...] = Field(
        min_length=1, description="Cedar files, relative to the configuration file. Default deny."
    )
    environment: str = Field(
        default="production", pattern=r"^[a-z0-9-]{1,63}$", description="context.environment in policies."
    )
