"""The names agree: which tool a call is for, from the connection and the one Host header together (H1, H2, H5).

Three ways in, one rule: the destination is fixed before policy, and nothing that the agent writes can name a second one.
"""

import re
from functools import lru_cache
from typing import Literal

from sidecar.address import is_loopback
from sidecar.errors import CallerError, Reason
from sidecar.model.tool import Authority, Tool
from sidecar.proxy.egress import stays_here
from sidecar.proxy.http1 import RequestHead
from sidecar.tools.names import parse_authority
from sidecar.tools.router import Router

_ORIGIN = re.compile(rb"https?://([^/?#]++)")
_ABSOLUTE = re.compile(rb"([A-Za-z]++)://([^/?]*+)(.*+)", re.DOTALL)

_OWN_SITE = (b"none", b"same-origin")
"""Values of Sec-Fetch-Site. Not `same-site`: that is another port, and whose that is nobody knows."""

Mode = Literal["explicit", "intercepted", "reverse"]
"""How a call came; in the audit record."""


def _mismatch(detail: str) -> CallerError:
    return CallerError(Reason.AUTHORITY_MISMATCH, detail)


def _text(raw: bytes) -> str:
    """A destination as it came. Clients send A-labels; IDNA is for configuration, as what it maps has many spellings."""
    if not raw.isascii():
        raise _mismatch("a host name that is not ASCII; send its A-labels (xn--…)")
    return raw.decode("ascii")


def connect(head: RequestHead, router: Router) -> tuple[Authority, Tool]:
    """CONNECT's authority and its tool. The port must be written; a Host header must agree."""
    authority = parse_authority(_text(head.target), None)
    if parse_authority(_text(head.host), authority.port) != authority:
        raise _mismatch("CONNECT and its Host header name two destinations")
    return authority, router.by_authority(authority, "https")


def intercepted(head: RequestHead, authority: Authority, tool: Tool) -> tuple[Tool, bytes]:
    """Inside the tunnel: Host must be the CONNECT authority (which the TLS server name equals already)."""
    target = head.target
    if not target.startswith(b"/"):
        if target == b"*" and head.method == b"OPTIONS":
            return tool, target
        absolute, target = _split_absolute(target, "https")
        if absolute != authority:
            raise _mismatch("the request line names another host than the tunnel")
    if parse_authority(_text(head.host), 443) != authority:
        raise _mismatch(f"Host is not the tunnel's destination {authority}")
    return tool, target


def absolute(head: RequestHead, router: Router) -> tuple[Tool, bytes]:
    """A plain-http proxy request: the absolute form is the destination and Host must repeat it."""
    authority, target = _split_absolute(head.target, "http")
    if parse_authority(_text(head.host), 80) != authority:
        raise _mismatch(f"Host is not the request line's destination {authority}")
    try:
        tool = router.by_authority(authority, "http")
    except CallerError:
        if any(t.authority.host == authority.host for t in router.tools):
            raise CallerError(
                Reason.CLEARTEXT_REFUSED, f"{authority.host} is a tool over https; use an https:// URL"
            ) from None
        raise
    _refuse_cleartext(tool)
    return tool, target


def reverse(head: RequestHead, router: Router) -> tuple[Tool, bytes]:
    """The base-URL mode: the first path segment is the tool's name; the outbound names are all the tool's own.

    Host must be loopback: a web page that rebinds its own name to 127.0.0.1 gets nothing (N6). Nor does one that sends to
    127.0.0.1 without asking (no-cors), which needs no handle where the listener is a workflow's own.
    """
    if not _names_this_machine(head.host):
        raise _mismatch("the base-URL listener is addressed by a loopback name only")
    if head.origin is not None or head.fetch_site is not None:
        _refuse_other_sites(head.origin, head.fetch_site)
    name, slash, rest = head.target[1:].partition(b"/")
    name, query, parameters = name.partition(b"?")
    tool = router.by_segment(name)
    _refuse_cleartext(tool)
    return tool, (b"/" + rest if slash else b"/" + query + parameters)


def _refuse_cleartext(tool: Tool) -> None:
    """No credential over plain http beyond this machine, unless the tool says so (H4). The dialled address is checked again."""
    if tool.scheme == "http" and not tool.allow_cleartext and not stays_here(tool):
        raise CallerError(Reason.CLEARTEXT_REFUSED, f"tool {tool.name} is plain http and not on this machine")


@lru_cache(maxsize=1024)
def _names_this_machine(host: bytes) -> bool:
    return is_loopback(parse_authority(_text(host), 80).host)


def _refuse_other_sites(origin: bytes | None, fetch_site: bytes | None) -> None:
    """Raises `CallerError` (cross_site) for what a browser sends on behalf of a page that is not this machine's."""
    if fetch_site is not None and fetch_site.lower() not in _OWN_SITE:
        raise CallerError(Reason.CROSS_SITE, "a browser sends this for another site (Sec-Fetch-Site)")
    match = _ORIGIN.fullmatch(origin) if origin is not None else None
    try:
        local = origin is None or (match is not None and _names_this_machine(match[1]))
    except CallerError:
        local = False
    if not local:
        raise CallerError(Reason.CROSS_SITE, "a browser sends this for a page that is not this machine's (Origin)")


def _split_absolute(target: bytes, scheme: str) -> tuple[Authority, bytes]:
    """`scheme://authority/path` into the authority and the origin form."""
    match = _ABSOLUTE.fullmatch(target)
    if match is None or match[1].lower() != scheme.encode():
        raise _mismatch(f"the request line is neither {scheme}://… nor CONNECT")
    authority = parse_authority(_text(match[2]), 443 if scheme == "https" else 80)
    path = match[3]
    return authority, path if path.startswith(b"/") else b"/" + path
