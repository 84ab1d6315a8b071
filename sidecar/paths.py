"""Files that the configuration names: a relative one is beside the configuration, whatever directory the daemon runs in."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo


def _beside(value: str, info: ValidationInfo) -> str:
    if value == "-":
        return value  # a standard stream
    return str(Path((info.context or {}).get("directory", ""), value))


ConfigFile = Annotated[str, AfterValidator(_beside)]
"""A field of a section. Validated with the context `directory`: that of the configuration file."""
