"""The `telemetry:` section."""

from typing import Literal

from pydantic import Field

from sidecar.section import Section


class TelemetryConfig(Section):
    """How the sidecar speaks about itself."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "json"
    otlp_endpoint: str | None = Field(
        default=None, description="Base URL of an OTLP/HTTP collector for the sidecar's spans."
    )
