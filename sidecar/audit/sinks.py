"""Where encoded audit lines go. One class a kind."""

import os
import sys


class FileSink:
    """Appends to a file that only its owner reads. Raises OSError when it cannot be opened."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def write(self, lines: bytes) -> None:
        while lines:
            lines = lines[os.write(self._descriptor, lines) :]

    def close(self) -> None:
        os.close(self._descriptor)


class StdoutSink:
    """Writes to standard output."""

    def write(self, lines: bytes) -> None:
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()

    def close(self) -> None:
        """Standard output is not ours to close."""
