"""The `issuers:` and `credentials:` sections."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from sidecar.section import ConfigFile, Name, Section

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def issuer_url(value: str) -> str:
    """Where a JWT-SVID or a token may be sent. Raises ValueError for anything but https, or http on loopback."""
    parts = urlsplit(value)
    if parts.scheme == "https" and parts.hostname:
        return value
    if parts.scheme == "http" and parts.hostname in _LOOPBACK:
        return value
    raise ValueError("write an https:// URL; plain http is for loopback only")


class TokenExchangeConfig(Section):
    """An authorization server that speaks RFC 8693, authenticated to by JWT-SVID."""

    name: Name
    kind: Literal["token_exchange"]
    issuer: str = Field(description="Issuer identifier; its metadata (RFC 8414, then OIDC) gives the endpoints.")
    token_endpoint: str | None = Field(default=None, description="Explicit endpoint: no discovery.")
    revocation_endpoint: str | None = None
    introspection_endpoint: str | None = None
    assertion_type: Literal["jwt-spiffe", "jwt-bearer"] = "jwt-spiffe"
    assertion_audience: str | None = Field(default=None, description="Audience of the JWT-SVID. Default: the issuer.")
    client_id: str | None = Field(
        default=None, description="Sent only when set; many servers find the client by the SVID."
    )
    subject: Literal["client_credentials", "svid", "host_token"] = Field(
        default="client_credentials",
        description="What is exchanged: a token of our own got first (two steps), the SVID, or the token given to Open.",
    )
    ca_file: ConfigFile | None = Field(default=None, description="PEM of a private CA to trust beside the system's.")
    timeout: float = Field(default=10.0, gt=0, le=60, description="Seconds for one request, answer included.")

    @field_validator("issuer", "token_endpoint", "revocation_endpoint", "introspection_endpoint")
    @classmethod
    def _urls(cls, value: str | None) -> str | None:
        return None if value is None else issuer_url(value)


class StaticConfig(Section):
    """A legacy shared secret: injected and dropped, but nobody can revoke it (`local_only`)."""

    name: Name
    kind: Literal["static"]
    secret_file: ConfigFile | None = None
    secret_env: str | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "StaticConfig":
        if (self.secret_file is None) == (self.secret_env is None):
            raise ValueError("set exactly one of secret_file and secret_env")
        return self


IssuerConfig = Annotated[TokenExchangeConfig | StaticConfig, Field(discriminator="kind")]


class CredentialsConfig(Section):
    """Lives and limits of leases. Seconds."""

    max_leases: int = Field(default=50_000, ge=1, description="Live leases altogether.")
    max_leases_per_agent: int = Field(default=10_000, ge=1)
    exchange_deadline: float = Field(default=15.0, gt=0, description="For one exchange with all its steps and retries.")
    revoke_deadline: float = Field(
        default=5.0, gt=0, description="A close waits this long for issuers; then it reports."
    )
    revoke_parallel: int = Field(default=16, ge=1, le=256, description="Revocations under way at once.")
    supersede_grace: float = Field(
        default=5.0, ge=0, description="A renewed lease's old token lives on this long for calls already sent."
    )
