"""Host names and ports, strictly: one spelling for each destination, or a refusal (H5, H8, N3, N4). Pure.

Names are exact: no suffix or pattern is ever matched, so a look-alike is simply another name.
"""

import re
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from sidecar.errors import CallerError, Reason
from sidecar.model.tool import Authority

_LONGEST = 260
"""Characters of a name (253), its trailing dot, a colon and a port. IDNA takes 100 ms for 60 KiB, so it never sees more."""
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PORT = re.compile(r"[1-9][0-9]{0,4}")
_QUAD = re.compile(r"(?:0|[1-9][0-9]{0,2})(?:\.(?:0|[1-9][0-9]{0,2})){3}")
_NUMERIC_LAST = re.compile(r"(?:[0-9]+|0x[0-9a-f]*)")
_WILDCARD_DNS = ("nip.io", "sslip.io", "xip.io", "localtest.me", "lvh.me")
_DOTTED = re.compile(r"(?:^|[.-])((?:[0-9]{1,3}[.-]){3}[0-9]{1,3})(?=[.-]|$)")
_HEX = re.compile(r"(?:^|[.-])([0-9a-f]{8})(?=[.-]|$)")


def _refuse(what: str) -> CallerError:
    return CallerError(Reason.AUTHORITY_MISMATCH, what)


@lru_cache(maxsize=4096)
def parse_authority(text: str, default_port: int | None) -> Authority:
    """`host[:port]` as one normalised destination.

    Refuses what is longer than any name, user info, spaces, control characters, `%`, encoded or odd IPv4 spellings, ports
    with leading zeros, and anything but letters, digits and hyphens after IDNA. One trailing dot is dropped. Without
    `default_port` a port must be written. Raises `CallerError` (authority_mismatch).
    """
    if len(text) > _LONGEST:
        raise _refuse("a destination longer than any name")
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise _refuse("a malformed IPv6 literal")
        port = rest[1:] if rest else None
        name = _ipv6(host)
    else:
        host, colon, port_text = text.partition(":")
        port = port_text if colon else None
        name = parse_host(host)
    if port is None:
        if default_port is None:
            raise _refuse("a destination without a port")
        return Authority(name, default_port)
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise _refuse("a malformed port")
    return Authority(name, int(port))


def _ipv6(host: str) -> str:
    if "%" in host:
        raise _refuse("an IPv6 address with a zone, which only one machine knows")
    try:
        return str(IPv6Address(host))
    except AddressValueError:
        raise _refuse("brackets round what is no IPv6 address") from None


def parse_host(host: str) -> str:
    """One host name or IPv4 literal, normalised. Raises `CallerError` (authority_mismatch)."""
    try:
        name = host.lower() if host.isascii() else host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        raise _refuse("a host name that IDNA refuses") from None
    if not host.isascii() and any(dot in host for dot in "\u3002\uff0e\uff61"):
        raise _refuse("a host name with a look-alike dot")
    name = name.removesuffix(".")
    labels = name.split(".")
    if not name or len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _refuse("a host name with characters that no host name has")
    if _QUAD.fullmatch(name):
        if any(int(part) > 255 for part in labels):
            raise _refuse("a malformed IPv4 address")
        return name
    if _NUMERIC_LAST.fullmatch(labels[-1]):
        raise _refuse("an IPv4 address that is not four plain decimal numbers")
    return name


def embeds_ip(host: str) -> IPv4Address | None:
    """The IPv4 address that a name under a wildcard-DNS suffix spells (10.0.0.1.nip.io, 10-0-0-1.…, 0a000001.…), or None.

    Addresses are checked after resolution in any case; this is for telling people what a name really is.
    """
    suffix = next((s for s in _WILDCARD_DNS if host.endswith("." + s)), None)
    if suffix is None:
        return None
    front = host.removesuffix("." + suffix)
    try:
        if (match := _DOTTED.search(front)) is not None:
            return IPv4Address(match[1].replace("-", "."))
        if (match := _HEX.search(front)) is not None:
            return IPv4Address(int(match[1], 16))
    except AddressValueError:
        return None
    return None
