"""The listeners and limits of the data plane."""

from pydantic import Field

from sidecar.address import LoopbackHostPort
from sidecar.section import Section


class ListenersConfig(Section):
    """Addresses as "host:port"; null switches a listener off. Both must be loopback: the caller is known by its uid."""

    explicit: LoopbackHostPort | None = Field(
        default="127.0.0.1:17001", description="Explicit HTTP proxy (HTTP_PROXY, HTTPS_PROXY)."
    )
    reverse: LoopbackHostPort | None = Field(
        default="127.0.0.1:17002", description="Base URLs: http://HOST:PORT/<tool>/…"
    )


class LimitsConfig(Section):
    """Bounds; each answers with its own reason when it is reached."""

    connections: int = Field(
        default=4096,
        ge=1,
        le=65536,
        description="Open connections from agents; where their uids differ, one uid has half at most.",
    )
    request_head_seconds: float = Field(default=30.0, gt=0, description="For a request's head to arrive in full.")
    keep_alive_seconds: float = Field(default=300.0, gt=0, description="An idle connection is closed after this long.")
    drain_seconds: float = Field(default=10.0, ge=0, description="For calls in flight to end at shutdown.")
