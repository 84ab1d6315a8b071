"""The `audit:` section."""

from pydantic import Field

from sidecar.section import ConfigFile, Section


class AuditConfig(Section):
    """Where the record goes."""

    file: ConfigFile = Field(
        default="-", description="Path of a JSON Lines file (made with mode 0600), or - for standard output."
    )
