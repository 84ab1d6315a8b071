"""Where encoded audit lines go. One class a kind."""

import errno
import os
import queue
import threading

_AHEAD = 256
"""Batches that standard output may be behind: some 6 MiB."""
_LAST_SECONDS = 2.0


class FileSink:
    """Appends to a file that only its owner reads. Raises OSError when it cannot be opened."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def write(self, lines: bytes) -> None:
        _write_all(self._descriptor, lines)

    def close(self) -> None:
        os.close(self._descriptor)


class StdoutSink:
    """Writes to standard output in a thread: a reader that stalls must not stop calls, closes and revocations."""

    def __init__(self, descriptor: int = 1) -> None:
        self._descriptor = descriptor
        self._batches: queue.Queue[bytes | None] = queue.Queue(_AHEAD)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="audit stdout", daemon=True)
        self._thread.start()

    def write(self, lines: bytes) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
        try:
            self._batches.put_nowait(lines)
        except queue.Full:
            raise OSError(errno.EAGAIN, "standard output is not being read") from None

    def _run(self) -> None:
        while (lines := self._batches.get()) is not None:
            try:
                _write_all(self._descriptor, lines)
            except OSError as error:
                self._error = error

    def close(self) -> None:
        """Writes what is left, for two seconds at most; standard output is not ours to close."""
        try:
            self._batches.put(None, timeout=_LAST_SECONDS)
        except queue.Full:
            return
        self._thread.join(_LAST_SECONDS)


def _write_all(descriptor: int, lines: bytes) -> None:
    while lines:
        lines = lines[os.write(descriptor, lines) :]
