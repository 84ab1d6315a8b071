"""HTTP/1.1 heads, strictly (RFC 9112): the RFC's own grammar, line by line, then what the fields mean together.

General parsers let through what two of them may read differently (duplicate Host, Transfer-Encoding beside others, folded
lines, bare LF, space before a colon), so nothing is read here that the grammar does not have; a test reads what we accept with
llhttp as well and compares. Bodies are framed by `framing`; nothing of a head's raw bytes is ever forwarded.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from sidecar.errors import CallerError, Reason, UpstreamError
from sidecar.model.tool import folded
from sidecar.proxy.framing import NO_BODY, Framing

MAX_HEAD = 64 * 1024
"""Bytes. Precedents: Go 1 MiB, Node 16 KiB, Envoy 60 KiB."""
MAX_FIELDS = 128
"""Precedents: Apache and Envoy 100."""
_TOO_MANY = MAX_FIELDS + 1
"""At so many lines a head is read no further: 64 KiB of short ones would take 15 ms."""
_REMEMBERED, _REMEMBERED_BYTES = 64, 4096
"""Field lines that a connection may remember, and how long they are together: it is idle most of its life."""

# Possessive throughout: 64 KiB that do not match cost one pass, never a backtrack.
_REQUEST_LINE = re.compile(rb"([A-Z][A-Z\-]{0,31}) ([\x21-\x7e]++) HTTP/1\.([01])")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*+))?")
_FIELD_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]++):[ \t]*+([\t\x20-\x7e\x80-\xff]*+)")
_LENGTH = re.compile(rb"[0-9]{1,18}")


class Field(NamedTuple):
    """One header field."""

    name: bytes
    """Lower case."""
    value: bytes
    line: bytes
    """The field as it is sent on, `name: value` and CRLF; nothing when it stops here."""
    folded: bytes
    """The name as servers may read it: what is to be replaced is known by this."""

    def __repr__(self) -> str:
        return f"Field({self.name!r})"  # its value may be a credential


class Fields:
    """Reads the field lines of one connection. The next head mostly repeats the last one's lines, and reading is pure, so a
    line seen before costs a look-up. What is remembered is bounded, and dies with the connection.

    `stops` says by its lower-case name which field never goes on from here.
    """

    __slots__ = ("_known", "_known_bytes", "_stops")

    def __init__(self, stops: Callable[[bytes], bool]) -> None:
        self._known: dict[bytes, Field] = {}
        self._known_bytes = 0
        self._stops = stops

    def read(self, lines: list[bytes]) -> list[Field] | None:
        """The fields of these lines, without their CRLF; None when one is not a field by the grammar."""
        try:
            return list(map(self._known.__getitem__, lines))
        except KeyError:
            return self._read_anew(lines)

    def _read_anew(self, lines: list[bytes]) -> list[Field] | None:
        fields: list[Field] = []
        for line in lines:
            match = _FIELD_LINE.fullmatch(line)
            if match is None:
                return None
            name = match[1].lower()
            # Some parsers take no tab after what frames a message, so it stays there and is refused.
            value = match[2].rstrip(b" " if name in _BODY else b" \t")
            sent = b"" if self._stops(name) else b"%b: %b\r\n" % (name, value)
            fields.append(Field(name, value, sent, folded(name)))
        self._remember(lines, fields)
        return fields

    def _remember(self, lines: list[bytes], fields: list[Field]) -> None:
        known = self._known
        known.update(zip(lines, fields, strict=True))
        self._known_bytes += sum(map(len, lines))
        if len(known) > _REMEMBERED or self._known_bytes > _REMEMBERED_BYTES:
            known.clear()
            self._known_bytes = 0


@dataclass(slots=True)
class RequestHead:
    """A request's head. `host` is the one Host field."""

    method: bytes
    target: bytes = field(repr=False)
    headers: list[Field]
    host: bytes
    framing: Framing
    keep_alive: bool
    expects_continue: bool
    upgrades: bool
    handle: bytes | None = field(repr=False)
    """Proxy-Authorization, or x-spanlock-workflow."""
    connection: bytes | None
    authorization: bytes | None = field(repr=False)
    traceparent: bytes | None
    origin: bytes | None
    """With `fetch_site`, what a browser says of the page that a request is from."""
    fetch_site: bytes | None


@dataclass(slots=True)
class ResponseHead:
    """A response's head, with how its body is framed."""

    status: int
    phrase: bytes
    headers: list[Field]
    framing: Framing
    keep_alive: bool


def named_by(connection: bytes) -> frozenset[bytes]:
    """The lower-case names in a `Connection` field: fields that are for the next hop alone (RFC 9110 section 7.6.1)."""
    return frozenset(part.strip().lower() for part in connection.split(b","))


def _malformed(what: str) -> CallerError:
    return CallerError(Reason.MALFORMED_REQUEST, what)


def _why_not(head: bytes) -> str:
    """What is wrong with a head that does not match its grammar, for the one who has to mend it."""
    lines = head.count(b"\r\n")
    if head.count(b"\n") != lines or head.count(b"\r") != lines:
        return "a bare CR or LF in the head"
    if b"\r\n " in head or b"\r\n\t" in head:
        return "a folded header line (obs-fold)"
    if b"\0" in head:
        return "a NUL in the head"
    return "a first line or header field that RFC 9112 does not allow"


def parse_request(head: bytes, reader: Fields) -> RequestHead:
    """The request whose head is `head`, up to its empty line. Raises `CallerError` (malformed_request, request_too_large)."""
    first, *lines = head.split(b"\r\n", _TOO_MANY)
    if len(lines) >= _TOO_MANY:
        raise CallerError(Reason.REQUEST_TOO_LARGE, f"more than {MAX_FIELDS} header fields")
    match = _REQUEST_LINE.fullmatch(first)
    fields = reader.read(lines)
    if match is None or fields is None:
        raise _malformed(_why_not(head))
    method, target, minor = match.groups()
    if minor != b"1" and method != b"CONNECT":
        raise _malformed("only HTTP/1.1 is spoken here")
    return _request(method, target, fields)


_MEANT = frozenset(
    (b"host", b"content-length", b"transfer-encoding", b"connection", b"expect", b"upgrade", b"authorization",
     b"proxy-authorization", b"x-spanlock-workflow", b"traceparent", b"http2-settings", b"origin", b"sec-fetch-site")
)  # fmt: skip
"""The fields that mean something to us."""
_BODY = frozenset((b"content-length", b"transfer-encoding"))
"""Those that say where a body ends."""
_FRAMING = _BODY | {b"connection"}
"""Those of an answer."""
_CUSTOMARY = frozenset((b"", b"close,", b"keep-alive,"))
"""What `Connection` says in an answer, nearly always."""
_LISTS = frozenset((b"connection", b"upgrade"))
_VOID_IF_REPEATED = frozenset((b"authorization", b"traceparent"))


def _request(method: bytes, target: bytes, headers: list[Field]) -> RequestHead:
    """Checks what the fields mean together."""
    seen: dict[bytes, bytes] = {}
    for name, value, _, _ in headers:
        if name in _MEANT:
            seen[name] = _repeated(name, seen[name], value) if name in seen else value
    get = seen.get
    host = get(b"host")
    if host is None:
        if method != b"CONNECT":
            raise _malformed("HTTP/1.1 without a Host header")
        host = target  # Python's http.client tunnels by HTTP/1.0, without a Host
    expect = get(b"expect")
    if expect is not None and expect.lower() != b"100-continue":
        raise _malformed("an expectation other than 100-continue")
    connection = get(b"connection")
    handle = get(b"proxy-authorization")
    return RequestHead(
        method,
        target,
        headers,
        host,
        _request_framing(get(b"content-length"), get(b"transfer-encoding")),
        connection is None or b"close" not in connection.lower(),
        expect is not None,
        b"upgrade" in seen or b"http2-settings" in seen,
        handle if handle is not None else get(b"x-spanlock-workflow"),
        connection,
        get(b"authorization") or None,
        get(b"traceparent") or None,
        get(b"origin"),
        get(b"sec-fetch-site"),
    )


def _repeated(name: bytes, first: bytes, second: bytes) -> bytes:
    """What a field that comes twice means: a list goes on, some then mean nothing, all others are refused."""
    if name in _LISTS:
        return first + b"," + second
    if name in _VOID_IF_REPEATED:
        return b""
    raise _malformed(f"more than one {name.decode()} header")


def _request_framing(length: bytes | None, coding: bytes | None) -> Framing:
    if coding is not None:
        if length is not None or coding.lower() != b"chunked":
            raise _malformed("Transfer-Encoding must be exactly 'chunked', without Content-Length")
        return Framing.chunked()
    if length is None:
        return NO_BODY
    if not _LENGTH.fullmatch(length):
        raise _malformed("Content-Length is not a plain number")
    return Framing.sized(int(length))


def _bad_answer(what: str) -> UpstreamError:
    return UpstreamError(Reason.UPSTREAM_MALFORMED, f"the tool's answer has {what}")


def parse_response(head: bytes, method: bytes, reader: Fields) -> ResponseHead:
    """The response to a `method` request whose head is `head`, up to its empty line.

    Raises `UpstreamError` (upstream_malformed).
    """
    first, *lines = head.split(b"\r\n", _TOO_MANY)
    if len(lines) >= _TOO_MANY:
        raise _bad_answer(f"more than {MAX_FIELDS} header fields")
    read = _status_line(first)
    fields = reader.read(lines)
    if read is None or fields is None:
        raise _bad_answer(_why_not(head))
    minor, status, phrase = read
    length = coding = None
    connection = b""
    for name, value, _, _ in fields:
        if name not in _FRAMING:
            continue
        if name == b"content-length":
            if length not in (None, value):
                raise _bad_answer("two lengths")
            length = value
        elif name == b"transfer-encoding":
            coding = value if coding is None else coding + b"," + value
        else:
            connection += value.lower() + b","
    if connection not in _CUSTOMARY:
        named = named_by(connection) - _FRAMING  # our client still needs the length
        fields = [field for field in fields if field.name not in named]
    framing = _response_framing(method, status, length, coding)
    kept = b"close" not in connection if minor == b"1" else b"keep-alive" in connection
    keep_alive = kept and framing.kind != "until_close"
    return ResponseHead(status, phrase, fields, framing, keep_alive)


@lru_cache(maxsize=32)
def _status_line(line: bytes) -> tuple[bytes, int, bytes] | None:
    """The minor version, the status and the phrase; remembered, as tools have few of them."""
    match = _STATUS_LINE.fullmatch(line)
    return None if match is None else (match[1], int(match[2]), match[3] or b"")


def _response_framing(method: bytes, status: int, length: bytes | None, coding: bytes | None) -> Framing:
    """RFC 9112 section 6.3, with everything ambiguous refused."""
    if method == b"HEAD" or status in (204, 304) or status < 200:
        return NO_BODY
    if coding is not None:
        if coding.lower() != b"chunked" or length is not None:
            raise _bad_answer("a body that is framed in two ways")
        return Framing.chunked()
    if length is None:
        return Framing.until_close()
    if not _LENGTH.fullmatch(length):
        raise _bad_answer("no clear Content-Length")
    return Framing.sized(int(length))
