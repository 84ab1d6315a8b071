"""What the sections of the configuration are made of: their base, names, and files.

A relative file is beside the configuration, whatever directory the daemon runs in.
"""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo


class Section(BaseModel):
    """A key that nobody reads is an error, since it is a mistyped one; what was read is never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""What an agent, issuer or tool is called: safe in paths, URLs, policies and metrics as it stands."""


def _beside(value: str, info: ValidationInfo) -> str:
    if value == "-":
        return value  # a standard stream
    return str(Path((info.context or {}).get("directory", ""), value))


ConfigFile = Annotated[str, AfterValidator(_beside)]
"""A field of a section. Validated with the context `directory`: that of the configuration file."""
