"""Theirs off, ours on: the head that goes to the tool. Pure, and the only maker of `OutboundRequest`."""

from typing import NamedTuple

from sidecar.model.tool import Route, folded
from sidecar.proxy.http1 import RequestHead, named_by

_HOP_BY_HOP = (
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"http2-settings", b"expect", b"content-length", b"host",
)  # fmt: skip
_CREDENTIALS = (
    b"authorization", b"x-api-key", b"api-key", b"cookie", b"dpop", b"x-vault-token", b"txn-token", b"workload-identity-token",
    b"workload-proof-token", b"x-amz-security-token", b"x-amz-date", b"x-goog-iam-authorization-token", b"x-auth-token",
    b"x-access-token", b"private-token", b"x-goog-api-key", b"apikey", b"x-spanlock-workflow",
)  # fmt: skip
# What intermediaries tell each other: an agent has no say in it (L7), and baggage leaks to strangers.
_FORWARDING = (
    b"forwarded", b"via", b"x-real-ip", b"baggage", b"x-original-url", b"x-rewrite-url", b"x-host", b"x-original-host",
    b"true-client-ip", b"x-client-ip", b"x-cluster-client-ip", b"cf-connecting-ip",
)  # fmt: skip
# With these, frameworks serve another method than the one that policy saw.
_OVERRIDES = (b"x-http-method-override", b"x-method-override", b"x-http-method")
_NAMES_NONE = frozenset((b"keep-alive", b"close"))
"""What `Connection` says nearly always, and then it names no field that would go on."""
_BODY_EXPECTED = frozenset((b"POST", b"PUT", b"PATCH"))
_STRIPPED = frozenset(_HOP_BY_HOP + _CREDENTIALS + _FORWARDING + _OVERRIDES)


class OutboundRequest(NamedTuple):
    """A head with our credential on it. Only this can be sent to a tool."""

    head: bytes


def stripped(name: bytes) -> bool:
    """Whether an agent's field of this lower-case name never goes to any tool."""
    read = folded(name)  # a variant of a stripped name is stripped as well (P8)
    return read in _STRIPPED or read.startswith((b"x-forwarded", b"x-spanlock", b"proxy-"))


def inject(head: RequestHead, route: Route, credential: bytes) -> OutboundRequest:
    """The request as the tool gets it. `credential` is the header's full value, checked when it was rendered.

    The head was read with `stripped`, so those fields have no line. Order matters: what `Connection` names is stripped before
    ours goes on, so it can never take ours off.
    """
    replaced = route.replaced
    if head.connection is not None and head.connection not in _NAMES_NONE:
        replaced = replaced.union(map(folded, named_by(head.connection)))
    parts = [head.method, route.opening]
    parts += [line for _, _, line, name in head.headers if name not in replaced]
    parts += (route.ours, credential, b"\r\n")
    if head.framing.kind == "sized":
        parts.append(b"content-length: %d\r\n" % head.framing.length)
    elif head.framing.kind == "chunked":
        parts.append(b"transfer-encoding: chunked\r\n")
    elif head.method in _BODY_EXPECTED:
        parts.append(b"content-length: 0\r\n")
    parts.append(b"\r\n")
    return OutboundRequest(b"".join(parts))
