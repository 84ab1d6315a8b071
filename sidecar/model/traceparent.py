"""W3C Trace Context, strictly: the one reading of a `traceparent` header."""

import re
from typing import NamedTuple

_HEADER = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 0x01


class TraceParent(NamedTuple):
    """Who called, in which trace. A trace id selects; it never grants."""

    trace_id: str
    """32 lower-case hex digits."""
    parent_id: str
    """16 lower-case hex digits."""
    sampled: bool


def parse(raw: bytes) -> TraceParent | None:
    """None for what the specification calls invalid; of a later version, what this one has."""
    match = _HEADER.fullmatch(raw)
    if match is None:
        return None
    version, trace, parent, flags, more = match.groups()
    if version == b"ff" or (version == b"00" and more is not None):
        return None
    if not trace.strip(b"0") or not parent.strip(b"0"):
        return None
    return TraceParent(trace.decode(), parent.decode(), bool(int(flags, 16) & _SAMPLED))
