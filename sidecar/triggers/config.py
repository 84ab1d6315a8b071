"""The OTLP receivers' addresses."""

from pydantic import Field

from sidecar.address import LoopbackHostPort
from sidecar.section import Section


class OtlpConfig(Section):
    """Receivers of the agent's spans; null switches one off. Loopback only: the sender is known by its uid."""

    grpc: LoopbackHostPort | None = Field(default="127.0.0.1:17317", description="OTLP/gRPC.")
    http: LoopbackHostPort | None = Field(default="127.0.0.1:17318", description="OTLP/HTTP, protobuf or JSON.")
    max_spans: int = Field(default=10_000, ge=1, description="Spans looked at in one request; the rest is ignored.")
