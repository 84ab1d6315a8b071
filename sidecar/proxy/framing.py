"""Where a message's body ends: Content-Length, chunked, until close, or none (RFC 9112 section 6). Pure.

One small strict reader for both directions, because the end of a message must be known to the byte: what follows it
is the next request. Chunk extensions and trailers are refused, as they carry what nobody between here and there looks at.
"""

import re
from typing import Literal

from sidecar.errors import CallerError, Reason

_SIZE = re.compile(rb"[0-9A-Fa-f]{1,15}")
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
_MAX_SIZE_LINE = 17
"""15 hex digits and CRLF: over 2^59 bytes in one chunk is nobody's wish."""

Kind = Literal["none", "sized", "chunked", "until_close"]


class Framing:
    """The reader of one body. `feed` returns payload; `done` says that the body has ended."""

    __slots__ = ("_expect", "_line", "done", "kind", "length", "remaining")

    def __init__(self, kind: Kind, remaining: int = 0) -> None:
        self.kind: Kind = kind
        self.length = remaining
        self.remaining = remaining
        self.done = kind == "none" or (kind == "sized" and remaining == 0)
        self._line = b""
        self._expect: Literal["size", "data", "crlf", "end"] = "size"

    @classmethod
    def sized(cls, length: int) -> "Framing":
        return cls("sized", length)

    @classmethod
    def chunked(cls) -> "Framing":
        return cls("chunked")

    @classmethod
    def until_close(cls) -> "Framing":
        return cls("until_close")

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """(payload in `data`, what is left after the body's end). Raises `CallerError` for broken chunking."""
        if self.done:
            return b"", data
        if self.kind == "until_close":
            return data, b""
        if self.kind == "sized":
            payload, rest = data[: self.remaining], data[self.remaining :]
            self.remaining -= len(payload)
            self.done = self.remaining == 0
            return payload, rest
        return self._feed_chunked(data)

    def _feed_chunked(self, data: bytes) -> tuple[bytes, bytes]:
        """By position: a copy of the rest for each chunk would cost a second for a read full of small ones."""
        payload: list[bytes] = []
        at, size = 0, len(data)
        while at < size and not self.done:
            if self._expect == "size" and not self._line:
                at = self._feed_whole(data, at, payload)
            if self._expect == "data":
                taken = min(self.remaining, size - at)
                payload.append(data[at : at + taken])
                at += taken
                self.remaining -= taken
                if self.remaining == 0:
                    self._expect = "crlf"
            elif at < size:
                at = self._feed_line(data, at)
        return b"".join(payload), data[at:]

    def _feed_whole(self, data: bytes, at: int, payload: list[bytes]) -> int:
        """Takes the chunks that are there from their first byte to their last; most are."""
        while (size := _SIZE_LINE.match(data, at)) is not None:
            begin = size.end()
            end = begin + int(size[1], 16)
            if end == begin or data[end : end + 2] != b"\r\n":
                break
            payload.append(data[begin:end])
            at = end + 2
        return at

    def _feed_line(self, data: bytes, at: int) -> int:
        """Takes one framing line: a size, the CRLF after a chunk, or the end after the last one. Where it ends in `data`."""
        limit = at + _MAX_SIZE_LINE
        end = data.find(b"\n", at, limit) + 1
        line = self._line + data[at : end or limit]
        if not end and len(line) < _MAX_SIZE_LINE:
            self._line = line
            return len(data)
        self._line = b""
        if not line.endswith(b"\r\n"):
            raise _broken()
        if self._expect == "size":
            if not _SIZE.fullmatch(line, 0, len(line) - 2):
                raise _broken()
            self.remaining = int(line, 16)
            self._expect = "data" if self.remaining else "end"
        elif line != b"\r\n":
            raise _broken()
        elif self._expect == "end":
            self.done = True
        else:
            self._expect = "size"
        return end


NO_BODY = Framing("none")
"""Never changes, so all messages without a body share it."""


def _broken() -> CallerError:
    return CallerError(Reason.MALFORMED_REQUEST, "broken chunked framing, a chunk extension, or trailers")


def chunk(payload: bytes) -> bytes:
    """`payload` as one chunk; never called with nothing, which would end the body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


LAST_CHUNK = b"0\r\n\r\n"
