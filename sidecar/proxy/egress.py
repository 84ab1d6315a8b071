"""Which addresses a credential may travel to: resolve, check every answer, pin one, dial that.

Only globally routable unicast addresses, unless the tool's `allow_networks` says otherwise. An IPv4 address embedded in
IPv6 (mapped, compatible, NAT64, 6to4, Teredo, ISATAP) is taken out and judged itself, so that DNS64 networks work and
nothing hides in them. Of the rest of IPv6 only 2000::/3 is public, the one block that IANA gives out; in 64:ff9b:1::/48 each
network embeds IPv4 in its own place (RFC 8215), so nothing in it is. The registries are those of `ipaddress` (IANA
special-purpose), with what it calls global and we do not.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from sidecar.address import is_literal, is_loopback
from sidecar.errors import Reason, UpstreamError
from sidecar.model.tool import Tool

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Name and port to IP addresses as text. Raises OSError."""

_LOOKUPS = ThreadPoolExecutor(max_workers=16, thread_name_prefix="resolver")
_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_DOCUMENTATION = IPv6Network("3fff::/20")
_REFUSED_V4 = tuple(
    IPv4Network(n)
    for n in ("0.0.0.0/8", "100.64.0.0/10", "192.0.0.0/24", "192.88.99.0/24", "198.18.0.0/15", "240.0.0.0/4")
)
_ISATAP = (0x00005EFE, 0x02005EFE)


async def system_resolver(host: str, port: int) -> list[str]:
    """The machine's resolver, in threads of its own: a name server that hangs holds up nothing but look-ups."""
    look = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    answers = await asyncio.get_running_loop().run_in_executor(_LOOKUPS, look)
    return [str(sockaddr[0]) for *_, sockaddr in answers]


def embedded_v4(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that `address` stands for, if it is of a kind that carries one."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    packed = int(address)
    if address in _NAT64 or (address in _COMPATIBLE and packed > 1):
        return IPv4Address(packed & 0xFFFFFFFF)
    if (packed >> 32) & 0xFFFFFFFF in _ISATAP:
        return IPv4Address(packed & 0xFFFFFFFF)
    return None


def is_public(address: Address) -> bool:
    """Whether anybody's packets may go there: global unicast only."""
    if isinstance(address, IPv6Address):
        if (inner := embedded_v4(address)) is not None:
            return is_public(inner)
        return address.is_global and address in _GLOBAL_UNICAST and address not in _DOCUMENTATION
    return address.is_global and not address.is_multicast and not any(address in n for n in _REFUSED_V4)


def allowed(address: Address, tool: Tool) -> bool:
    """Whether `tool` may be reached at `address`: public, or in a network that the operator listed for this tool."""
    candidates: list[Address] = [address]
    if isinstance(address, IPv6Address) and (inner := embedded_v4(address)) is not None:
        candidates.append(inner)
    if any(c in network for c in candidates for network in tool.allow_networks if c.version == network.version):
        return True
    return is_public(address)


async def addresses(tool: Tool, resolve: Resolve) -> list[str]:
    """The checked addresses of `tool`, to dial in this order.

    The operator's own `address` is taken as given. Otherwise every answer must be allowed: one private answer among
    public ones is an attack or a mistake, and both are refused. Plain http is dialled on this machine only, whatever the
    name said, unless the tool allows cleartext. Raises `UpstreamError` (dns_failed, address_refused, cleartext_refused).
    """
    checked = [tool.address] if tool.address is not None else await _resolved(tool, resolve)
    if tool.scheme == "http" and not tool.allow_cleartext and not all(map(is_loopback, checked)):
        raise UpstreamError(Reason.CLEARTEXT_REFUSED, f"tool {tool.name} is plain http and not on this machine")
    return checked


async def _resolved(tool: Tool, resolve: Resolve) -> list[str]:
    host = tool.authority.host
    try:
        answers = [host] if is_literal(host) else await resolve(host, tool.authority.port)
    except (OSError, UnicodeError):
        raise UpstreamError(Reason.DNS_FAILED, f"the name of tool {tool.name} does not resolve") from None
    if not answers:
        raise UpstreamError(Reason.DNS_FAILED, f"the name of tool {tool.name} has no address")
    for text in answers:
        if "%" in text or not allowed(ip_address(text), tool):
            raise UpstreamError(
                Reason.ADDRESS_REFUSED, f"tool {tool.name} resolves to {text}, which is not public; see allow_networks"
            )
    return list(dict.fromkeys(answers))


def stays_here(tool: Tool) -> bool:
    """Whether `tool` is on this machine by the operator's word: where it is dialled, else by its name."""
    return is_loopback(tool.address or tool.authority.host)
