"""What the sections of the configuration are made of: their base, names, and files.

A relative file is beside the configuration, whatever directory the daemon runs in.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

_NUMBERS = (int, float, int | None, float | None)


class Section(BaseModel):
    """A key that nobody reads is an error, since it is a mistyped one; what was read is never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, raw: Any) -> Any:
        """`uid: yes` would be uid 1: as text it is refused in its own place."""
        if not isinstance(raw, dict):
            return raw
        numbers = [k for k, f in cls.model_fields.items() if f.annotation in _NUMBERS and isinstance(raw.get(k), bool)]
        return raw | {key: str(raw[key]) for key in numbers}


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
"""What an agent, issuer or tool is called: safe in paths, URLs, policies and metrics as it stands."""


def path_text(value: str) -> str:
    """`value`, if it can be the name of a file. Raises ValueError."""
    if "\0" in value or not value.isprintable():
        raise ValueError("has characters that no file's name should have")
    return value


def _beside(value: str, info: ValidationInfo) -> str:
    if value == "-":
        return value  # a standard stream
    path_text(value)
    return str(Path((info.context or {}).get("directory", ""), value))


ConfigFile = Annotated[str, AfterValidator(_beside)]
"""A field of a section. Validated with the context `directory`: that of the configuration file."""
