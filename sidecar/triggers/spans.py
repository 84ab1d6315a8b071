"""The ended spans of an OTLP body, read so that no body costs much more than its own bytes, nor all of it in one step.

The generated parser makes some hundred bytes of objects out of two bytes of body, without a pause: 4 KB of gzip were 460 MiB
and almost a second. Four fields of a span are needed, so the fields are walked where they stand and the rest is stepped
over. JSON cannot be walked so; there the marks that make objects are counted before it is parsed.
"""

import json
import zlib
from collections.abc import Iterator

MAX_BODY = 4 * 1024 * 1024
"""Bytes, after decompression too: what gRPC, and so each collector, takes by default."""

MAX_MARKS = 100_000
"""Braces, brackets and commas in one JSON body: a usual batch (512 spans) has about 30,000."""

_FIELDS_A_SPAN = 32
"""Fields looked at for each span that may be: attributes, events and links are one each."""
_STEP = 500
"""Fields, or JSON spans, between two moments at which others may go on: about half a millisecond."""

Span = tuple[str, str, str]
"""Trace id, span id, parent's id (empty: none), in lower-case hex."""

# A field's number and wire type, as they stand before its value.
_INTO = (0x0A, 0x12, 0x12)
"""resource_spans, their scope_spans, their spans."""
_SPAN_DEPTH = len(_INTO) + 1
_TRACE_ID, _SPAN_ID, _PARENT, _END = 0x0A, 0x12, 0x22, 0x41
_WANTED = frozenset((_TRACE_ID, _SPAN_ID, _PARENT, _END))
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class TooMuch(Exception):
    """The body is larger, or of more parts, than one export may be; or it is no whole gzip."""


def of_protobuf(body: bytes, most: int) -> Iterator[Span | None]:
    """Those of the first `most` spans that have ended; None is a moment to let others go on. Raises `ValueError`."""
    at, ends, spans = 0, [len(body)], 0
    fields: dict[int, bytes] = {}
    for count in range(1, most * _FIELDS_A_SPAN + 1):
        while at == ends[-1]:
            ends.pop()
            if len(ends) == _SPAN_DEPTH - 1 and (span := _ended(fields)) is not None:
                yield span
            if not ends or spans == most:
                return
        if count % _STEP == 0:
            yield None
        tag, value, after = _field(body, at, ends[-1])
        depth = len(ends)
        if depth < _SPAN_DEPTH and tag == _INTO[depth - 1]:
            ends.append(after)
            at = value
            if depth + 1 == _SPAN_DEPTH:
                spans += 1
                fields = {}
        else:
            if depth == _SPAN_DEPTH and tag in _WANTED:
                fields[tag] = body[value:after]
            at = after


def _ended(fields: dict[int, bytes]) -> Span | None:
    """None for a span that has not ended, or whose ids nobody can have declared."""
    trace, span, parent = (fields.get(tag, b"") for tag in (_TRACE_ID, _SPAN_ID, _PARENT))
    if not any(fields.get(_END, b"")) or len(trace) != 16 or len(span) != 8 or len(parent) not in (0, 8):
        return None
    return trace.hex(), span.hex(), parent.hex()


def _field(body: bytes, at: int, end: int) -> tuple[int, int, int]:
    """The tag of the field at `at`, where its value begins, and where the next field does."""
    tag, value = _varint(body, at)
    kind = tag & 7
    if kind == _BYTES:
        size, value = _varint(body, value)
        after = value + size
    elif kind == _VARINT:
        _, after = _varint(body, value)
    elif kind == _FIXED64:
        after = value + 8
    elif kind == _FIXED32:
        after = value + 4
    else:
        raise ValueError("a wire type that OTLP does not have")
    if after > end or tag < 8:
        raise ValueError("truncated, or a field without a number")
    return tag, value, after


def _varint(body: bytes, at: int) -> tuple[int, int]:
    """The number at `at`, and where what follows it begins."""
    if at < len(body) and body[at] < 0x80:
        return body[at], at + 1  # nearly all of them
    number = 0
    for place, byte in enumerate(body[at : at + 10]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number, at + place + 1
    raise ValueError("a number without an end")


def of_json(body: bytes, most: int) -> Iterator[Span | None]:
    """The same of OTLP's JSON mapping: ids in hex of either case, 64-bit numbers as text or number, unknown fields ignored.

    Raises `TooMuch`, `ValueError` and `RecursionError`.
    """
    if sum(body.count(mark) for mark in (b"{", b"[", b",")) > MAX_MARKS:
        raise TooMuch
    document = json.loads(body)
    try:
        for count, span in enumerate(_spans(document)):
            if count == most:
                return
            if count % _STEP == _STEP - 1:
                yield None
            if int(span.get("endTimeUnixNano", 0)):
                yield _hex(span["traceId"], 16), _hex(span["spanId"], 8), _hex(span.get("parentSpanId", ""), 8)
    except (AttributeError, KeyError, TypeError, OverflowError):
        raise ValueError("not an OTLP export") from None


def _spans(document: dict[str, list[dict[str, list[dict[str, list[dict[str, str]]]]]]]) -> Iterator[dict[str, str]]:
    for resource in document.get("resourceSpans", ()):
        for scope in resource.get("scopeSpans", ()):
            yield from scope.get("spans", ())


def _hex(text: str, size: int) -> str:
    raw = bytes.fromhex(text)
    if text and len(raw) != size:
        raise ValueError("an id of the wrong length")
    return raw.hex()


def gunzip(body: bytes) -> bytes:
    """Raises `TooMuch` over `MAX_BODY`, and for what is no whole gzip: how long it would be, nobody knows."""
    stream = zlib.decompressobj(wbits=31)
    try:
        plain = stream.decompress(body, MAX_BODY)
    except zlib.error:
        raise TooMuch from None
    if not stream.eof:
        raise TooMuch
    return plain
