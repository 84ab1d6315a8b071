"""The `tools:` section: one entry a tool, in the words that operators use."""

from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from sidecar.errors import CallerError
from sidecar.model.lease import TokenCheck
from sidecar.model.tool import Authority, Introspection, Timeouts, Tool
from sidecar.section import ConfigFile, Name, Section
from sidecar.tools.names import parse_authority

_FRAMING = frozenset(
    ("connection", "content-length", "expect", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade")
)


class IntrospectionConfig(Section):
    """The tool's own client at the issuer: most issuers say `active: true` only to a client in the token's audience."""

    client_id: str = Field(min_length=1)
    secret_file: ConfigFile = Field(min_length=1, description="File that holds the client's secret; read at each use.")


class TimeoutsConfig(Section):
    """Seconds."""

    connect: float = Field(default=10.0, gt=0, le=300, description="Resolve, connect and TLS handshake together.")
    response: float = Field(default=120.0, gt=0, le=86400, description="From the request to the response's head.")
    idle: float = Field(default=300.0, gt=0, le=86400, description="Without a byte while a body streams.")


class ToolConfig(Section):
    """One tool that agents may use."""

    name: Name = Field(description="In base URLs, policy and audit.")
    url: str = Field(description="https://host[:port]; the only destination of this tool's credential.")
    issuer: str = Field(description="Name of the entry in `issuers:` that mints its credential.")
    audience: str | None = Field(default=None, description="RFC 8693 audience.")
    resource: str | None = Field(default=None, description="RFC 8707 resource.")
    scopes: tuple[str, ...] = Field(default=(), description="The most that is ever asked for.")
    address: str | None = Field(default=None, description="IP address to dial instead of resolving the name.")
    allow_networks: tuple[IPv4Network | IPv6Network, ...] = Field(
        default=(), description="Networks that are not public but may be dialled for this tool."
    )
    allow_cleartext: bool = Field(default=False, description="Send the credential over plain http beyond this machine.")
    allow_semicolons: bool = Field(
        default=False, description="Accept `;` in paths; policy must permit the path with and without `;…`."
    )
    methods: tuple[str, ...] | None = Field(
        default=None, description="The methods that it takes. Absent: any, policy decides. Empty: none."
    )
    ca_file: ConfigFile | None = Field(default=None, description="PEM of a private CA to trust beside the system's.")
    header: str = Field(
        default="authorization", pattern=r"^[A-Za-z0-9-]{1,64}$", description="Header of the credential."
    )
    prefix: str = Field(default="Bearer ", pattern=r"^[\x20-\x7e]{0,32}$")
    token_check: TokenCheck = Field(
        default=TokenCheck.UNKNOWN,
        description="How the tool checks tokens: decides what is left of one after a revoke.",
    )
    introspection: IntrospectionConfig | None = None
    export: bool = Field(default=False, description="Let Exchange hand the real token to the agent.")
    max_ttl: float = Field(default=900.0, gt=0, le=86400, description="Seconds a credential is used at most.")
    max_uses: int = Field(default=0, ge=0, description="Requests per workflow; 0: unlimited.")
    timeouts: TimeoutsConfig = TimeoutsConfig()
    strip_headers: tuple[str, ...] = Field(default=(), description="Further agent headers to remove.")

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        _destination(value)
        return value

    @field_validator("header")
    @classmethod
    def _header(cls, value: str) -> str:
        if value.lower() in _FRAMING or value.lower().startswith(("proxy-", "x-spanlock")):
            raise ValueError(
                f"{value} frames the message or is ours; name the header that the tool reads its token from"
            )
        return value

    @field_validator("address")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else str(ip_address(value))

    @field_validator("scopes")
    @classmethod
    def _scopes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for scope in value:
            if not scope or not all(c == "!" or "#" <= c <= "[" or "]" <= c <= "~" for c in scope):
                raise ValueError(f"scope {scope!r} has characters that RFC 6749 forbids")
        return value

    def build(self) -> Tool:
        """The compiled noun."""
        scheme, authority = _destination(self.url)
        client = self.introspection
        introspection = Introspection(client.client_id, client.secret_file) if client is not None else None
        return Tool(
            name=self.name, scheme=scheme, authority=authority, issuer=self.issuer, audience=self.audience,
            resource=self.resource, scopes=tuple(sorted(set(self.scopes))), address=self.address,
            allow_networks=self.allow_networks, allow_cleartext=self.allow_cleartext,
            allow_semicolons=self.allow_semicolons,
            methods=None if self.methods is None else frozenset(map(str.upper, self.methods)),
            ca_file=self.ca_file, header=self.header.lower(), prefix=self.prefix, token_check=self.token_check,
            introspection=introspection,
            export=self.export, max_ttl=self.max_ttl, max_uses=self.max_uses,
            timeouts=Timeouts(self.timeouts.connect, self.timeouts.response, self.timeouts.idle),
            client_headers=tuple(h.lower() for h in self.strip_headers),
        )  # fmt: skip


def _destination(url: str) -> tuple[Literal["http", "https"], Authority]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("write https://host[:port], without a path; paths are policy's business")
    try:
        authority = parse_authority(parts.netloc, 443 if parts.scheme == "https" else 80)
    except CallerError as error:
        raise ValueError(error.detail) from None
    return ("https" if parts.scheme == "https" else "http"), authority
