"""W3C Trace Context, strictly: the trace id of a `traceparent` header, or None."""

import re

_HEADER = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


def trace_id(header: bytes) -> str | None:
    """The trace id, or None for what the specification calls invalid. A trace id selects; it never grants."""
    match = _HEADER.fullmatch(header)
    if match is None or match[1] == b"ff" or (match[1] == b"00" and match[4] is not None):
        return None
    if not match[2].strip(b"0") or not match[3].strip(b"0"):
        return None
    return match[2].decode()
