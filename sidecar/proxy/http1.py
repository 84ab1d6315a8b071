"""HTTP/1.1 heads, strictly (RFC 9112). The only importer of httptools.

llhttp lets through what two parsers may read differently (duplicate Host, Transfer-Encoding beside others, obs-fold in
places, bare LF in lenient builds), so a head is checked as raw bytes first, then parsed, then checked as fields. Bodies
are framed by `framing`; nothing of a head's raw bytes is ever forwarded.
"""

import re
from dataclasses import dataclass

import httptools

from sidecar.errors import CallerError, Reason, UpstreamError
from sidecar.proxy.framing import Framing

MAX_HEAD = 64 * 1024
"""Bytes. Precedents: Go 1 MiB, Node 16 KiB, Envoy 60 KiB."""
MAX_FIELDS = 128
"""Precedents: Apache and Envoy 100."""

Headers = list[tuple[bytes, bytes]]
"""Names in lower case, in the order received."""

_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
_TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_TARGET = re.compile(rb"[\x21-\x7e]+")
_LENGTH = re.compile(rb"[0-9]{1,18}")


@dataclass(slots=True)
class RequestHead:
    """A request's head. `host` is the one Host field."""

    method: bytes
    target: bytes
    headers: Headers
    host: bytes
    framing: Framing
    keep_alive: bool
    expects_continue: bool
    upgrades: bool
    handle: bytes | None
    """Proxy-Authorization, or x-spanlock-workflow."""
    authorization: bytes | None
    traceparent: bytes | None


@dataclass(slots=True)
class ResponseHead:
    """A response's head, with how its body is framed."""

    status: int
    phrase: bytes
    headers: Headers
    framing: Framing
    keep_alive: bool


class _Fields:
    """httptools' callbacks."""

    __slots__ = ("headers", "url")

    def __init__(self) -> None:
        self.headers: Headers = []
        self.url = b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


def _malformed(what: str) -> CallerError:
    return CallerError(Reason.MALFORMED_REQUEST, what)


def _raw_problem(head: bytes) -> str | None:
    """What two parsers could read differently in a head that ends with an empty line."""
    lines = head.count(b"\r\n")
    if head.count(b"\n") != lines or head.count(b"\r") != lines:
        return "a bare CR or LF in the head"
    if b"\r\n " in head or b"\r\n\t" in head:
        return "a folded header line (obs-fold)"
    if b"\0" in head:
        return "a NUL in the head"
    if lines > MAX_FIELDS + 2:
        return f"more than {MAX_FIELDS} header fields"
    return None


def parse_request(head: bytes) -> RequestHead:
    """The request whose head is exactly `head`. Raises `CallerError` (malformed_request)."""
    if (problem := _raw_problem(head)) is not None:
        raise _malformed(problem)
    fields = _Fields()
    parser = httptools.HttpRequestParser(fields)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass
    except (httptools.HttpParserError, httptools.HttpParserCallbackError):
        raise _malformed("not a valid HTTP/1.1 request head") from None
    line = head[: head.index(b"\r\n")].split(b" ")
    if len(line) != 3 or line[1] != fields.url or not _TOKEN.fullmatch(line[0]) or not _TARGET.fullmatch(line[1]):
        raise _malformed("the request line is not 'METHOD target HTTP/1.1'")
    if line[2] != b"HTTP/1.1" and (line[0], line[2]) != (b"CONNECT", b"HTTP/1.0"):
        raise _malformed("only HTTP/1.1 is spoken here")
    return _request(line[0], line[1], fields.headers)


_SINGLETON_NAMES = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade", b"authorization",
     b"proxy-authorization", b"x-spanlock-workflow", b"traceparent", b"http2-settings")
)  # fmt: skip


def _request(method: bytes, target: bytes, headers: Headers) -> RequestHead:
    """Checks what the fields mean together."""
    seen: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if not _VALUE.fullmatch(value) or not _TOKEN.fullmatch(name):
            raise _malformed("a control character in a header field")
        if name in _SINGLETON_NAMES:
            seen.setdefault(name, []).append(value)
    host = _single(seen, b"host")
    if host is None and method == b"CONNECT":
        host = target  # Python's http.client tunnels by HTTP/1.0, without a Host
    if host is None:
        raise _malformed("HTTP/1.1 without a Host header")
    expect = _single(seen, b"expect")
    if expect is not None and expect.lower() != b"100-continue":
        raise _malformed("an expectation other than 100-continue")
    connection = b",".join(seen.get(b"connection", ())).lower()
    handle = _single(seen, b"proxy-authorization")
    if handle is None:
        handle = _single(seen, b"x-spanlock-workflow")
    traces = seen.get(b"traceparent", ())
    authorizations = seen.get(b"authorization", ())
    return RequestHead(
        method=method,
        target=target,
        headers=headers,
        host=host,
        framing=_request_framing(seen),
        keep_alive=b"close" not in connection,
        expects_continue=expect is not None,
        upgrades=b"upgrade" in seen or b"http2-settings" in seen,
        handle=handle,
        authorization=authorizations[0] if len(authorizations) == 1 else None,
        traceparent=traces[0] if len(traces) == 1 else None,
    )


def _single(seen: dict[bytes, list[bytes]], name: bytes) -> bytes | None:
    values = seen.get(name)
    if values is None:
        return None
    if len(values) > 1:
        raise _malformed(f"more than one {name.decode()} header")
    return values[0]


def _request_framing(seen: dict[bytes, list[bytes]]) -> Framing:
    length, coding = _single(seen, b"content-length"), _single(seen, b"transfer-encoding")
    if coding is not None:
        if length is not None or coding.lower() != b"chunked":
            raise _malformed("Transfer-Encoding must be exactly 'chunked', without Content-Length")
        return Framing.chunked()
    if length is None:
        return Framing.none()
    if not _LENGTH.fullmatch(length):
        raise _malformed("Content-Length is not a plain number")
    return Framing.sized(int(length))


def parse_response(head: bytes, method: bytes) -> ResponseHead:
    """The response to a `method` request whose head is exactly `head`. Raises `UpstreamError` (upstream_malformed)."""
    if (problem := _raw_problem(head)) is not None:
        raise UpstreamError(Reason.UPSTREAM_MALFORMED, f"the tool's answer has {problem}")
    fields = _Fields()
    parser = httptools.HttpResponseParser(fields)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass
    except (httptools.HttpParserError, httptools.HttpParserCallbackError):
        raise UpstreamError(Reason.UPSTREAM_MALFORMED, "the tool's answer is not valid HTTP/1.1") from None
    status = parser.get_status_code()
    phrase = head[: head.index(b"\r\n")][13:]
    connection, lengths, codings = b"", set(), []
    for name, value in fields.headers:
        if not _VALUE.fullmatch(value):
            raise UpstreamError(Reason.UPSTREAM_MALFORMED, "the tool's answer has a control character in a header")
        if name == b"connection":
            connection += value.lower() + b","
        elif name == b"content-length":
            lengths.add(value)
        elif name == b"transfer-encoding":
            codings.append(value.lower())
    http11 = parser.get_http_version() == "1.1"
    framing = _response_framing(method, status, lengths, codings)
    keep = framing.kind != "until_close" and (
        (http11 and b"close" not in connection) or (not http11 and b"keep-alive" in connection)
    )
    return ResponseHead(status, phrase, fields.headers, framing, keep)


def _response_framing(method: bytes, status: int, lengths: set[bytes], codings: list[bytes]) -> Framing:
    """RFC 9112 section 6.3, with everything ambiguous refused."""
    if method == b"HEAD" or status in (204, 304) or status < 200:
        return Framing.none()
    if codings:
        if codings != [b"chunked"] or lengths:
            raise UpstreamError(Reason.UPSTREAM_MALFORMED, "the tool's answer is framed in two ways")
        return Framing.chunked()
    if not lengths:
        return Framing.until_close()
    if len(lengths) > 1 or not _LENGTH.fullmatch(next(iter(lengths))):
        raise UpstreamError(Reason.UPSTREAM_MALFORMED, "the tool's answer has no clear Content-Length")
    return Framing.sized(int(next(iter(lengths))))
