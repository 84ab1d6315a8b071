"""A tool: what the agent may want to use, and all that is fixed about reaching it. A route: the tool of one call."""

from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from typing import NamedTuple

from sidecar.model.lease import TokenCheck

_FOLD = bytes(byte if chr(byte).isalnum() and byte < 0x80 else ord("-") for byte in range(256))


def folded(name: bytes) -> bytes:
    """What servers make of a lower-case field name: to CGI and WSGI, whatever is no letter or digit is one character (P8)."""
    return name.translate(_FOLD).strip(b"-")


class Authority(NamedTuple):
    """One destination: normalised host (lower case, A-labels, no trailing dot; IP literals without brackets), port."""

    host: str
    port: int

    def header(self, scheme: str) -> str:
        """As the Host header writes it: the scheme's default port left out, IPv6 in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if scheme == "https" else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds."""

    connect: float = 10.0
    """Resolve, connect and TLS handshake together."""
    response: float = 120.0
    """From the request's end to the response's head."""
    idle: float = 300.0
    """Without a byte in either direction while a body streams."""


@dataclass(frozen=True, slots=True)
class Introspection:
    """With whose eyes a token is looked up at its issuer (RFC 7662): usually the tool's own client."""

    client_id: str
    secret_file: str


@dataclass(frozen=True, slots=True)
class Tool:
    """One configured tool. The upstream's host is the operator's word, never the agent's."""

    name: str
    scheme: str
    """"http" or "https"."""
    authority: Authority
    issuer: str
    audience: str | None = None
    resource: str | None = None
    scopes: tuple[str, ...] = ()
    """Sorted; the most that may be asked for."""
    address: str | None = None
    """An IP address to dial instead of resolving the name; the certificate is still verified for the name."""
    allow_networks: tuple[IPv4Network | IPv6Network, ...] = ()
    allow_cleartext: bool = False
    allow_semicolons: bool = False
    methods: frozenset[str] = frozenset()
    """Empty: any but TRACE, TRACK and CONNECT (policy decides)."""
    ca_file: str | None = None
    header: str = "authorization"
    """Where the credential goes, lower case."""
    prefix: str = "Bearer "
    token_check: TokenCheck = TokenCheck.UNKNOWN
    introspection: Introspection | None = None
    export: bool = False
    max_ttl: float = 900.0
    """Seconds."""
    max_uses: int = 0
    """Requests a workflow may make with this tool's credentials; 0: unlimited."""
    timeouts: Timeouts = Timeouts()
    client_headers: tuple[str, ...] = ()
    """Further agent headers to strip, lower case."""


@dataclass(frozen=True, slots=True)
class Route:
    """The rule that recognised a call: its tool and the canonical request target that is both matched and sent."""

    tool: Tool
    path: str
    """Canonical path: policy sees exactly what is sent."""
    target: bytes
    """Path and query, byte for byte as sent upstream."""
    opening: bytes = field(init=False, repr=False)
    """What follows the method in the head that is sent: target, version, Host. Made once, as routes are remembered."""
    replaced: frozenset[bytes] = field(init=False, repr=False)
    """Folded names of the agent's headers that never go to this tool: ours, and the tool's `client_headers`."""
    ours: bytes = field(init=False, repr=False)
    """What comes before the credential: its header's name."""

    def __post_init__(self) -> None:
        tool = self.tool
        host = tool.authority.header(tool.scheme).encode()
        object.__setattr__(self, "opening", b" %b HTTP/1.1\r\nhost: %b\r\n" % (self.target, host))
        names = (tool.header, *tool.client_headers)
        object.__setattr__(self, "replaced", frozenset(folded(name.encode()) for name in names))
        object.__setattr__(self, "ours", b"%b: " % tool.header.encode())
