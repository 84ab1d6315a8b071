"""The `telemetry:` section."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from sidecar.section import Section


class TelemetryConfig(Section):
    """How the sidecar speaks about itself."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["console", "json"] = "json"
    otlp_endpoint: str | None = Field(
        default=None, description="Base URL of an OTLP/HTTP collector for the sidecar's spans."
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _otlp_endpoint(cls, value: str | None) -> str | None:
        if value is not None and not _is_url(value):
            raise ValueError("write http://HOST:PORT or https://HOST:PORT of the collector")
        return value


def _is_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
