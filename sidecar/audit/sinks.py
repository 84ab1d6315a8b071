"""Where encoded audit lines go. One class a kind."""

import errno
import os
import queue
import stat
import threading

_AHEAD = 256
"""Batches that standard output may be behind: some 6 MiB."""
_LAST_SECONDS = 2.0


class FileSink:
    """Appends to a file that only its owner reads. Raises OSError when it cannot be opened."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        # Not blocking: a pipe that nobody reads is an error, and not a standstill.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._descriptor = os.open(self._path, flags, 0o600)
        self._lines = _Lines(self._descriptor, _ends_in_mid_line(self._descriptor, self._path))

    def reopen(self) -> None:
        """Goes on in the file that has the name now; a rotation moved the old one. Raises OSError, and the old one stays."""
        before = self._descriptor
        self._open()
        os.close(before)

    def write(self, lines: bytes) -> None:
        self._lines.write(lines)

    def close(self) -> None:
        os.close(self._descriptor)


def obstacle(path: str) -> str:
    """Why no `FileSink` could be opened on `path` by this process; empty when one could. Makes nothing."""
    try:
        if not os.path.lexists(path):
            directory = os.path.dirname(path) or "."
            os.stat(directory)
            path = directory
        elif stat.S_ISLNK(mode := os.lstat(path).st_mode):
            return os.strerror(errno.ELOOP)
        elif stat.S_ISDIR(mode):
            return os.strerror(errno.EISDIR)
        return "" if os.access(path, os.W_OK) else os.strerror(errno.EACCES)
    except OSError as error:
        return str(error.strerror)


class StdoutSink:
    """Writes to standard output in a thread: a reader that stalls must not stop calls, closes and revocations."""

    def __init__(self, descriptor: int = 1) -> None:
        self._lines = _Lines(descriptor)
        self._batches: queue.Queue[bytes | None] = queue.Queue(_AHEAD)
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="audit stdout", daemon=True)
        self._thread.start()

    def write(self, lines: bytes) -> None:
        """Takes `lines`; raises what befell the batch before, since that of this one is not known yet."""
        try:
            self._batches.put_nowait(lines)
        except queue.Full:
            raise OSError(errno.EAGAIN, "standard output is not being read") from None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def reopen(self) -> None:
        """Standard output stays what it is."""

    def _run(self) -> None:
        while (lines := self._batches.get()) is not None:
            try:
                self._lines.write(lines)
            except OSError as error:
                self._error = error

    def close(self) -> None:
        """Writes what is left, for two seconds at most; standard output is not ours to close."""
        try:
            self._batches.put(None, timeout=_LAST_SECONDS)
        except queue.Full:
            return
        self._thread.join(_LAST_SECONDS)


class _Lines:
    """Whole lines: after a write that ended in mid-line (a full disk), the next begins on a line of its own."""

    def __init__(self, descriptor: int, in_mid_line: bool = False) -> None:
        self._descriptor = descriptor
        self._in_mid_line = in_mid_line

    def write(self, lines: bytes) -> None:
        left = b"\n" + lines if self._in_mid_line else lines
        while left:
            written = os.write(self._descriptor, left)
            self._in_mid_line = left[written - 1 : written] != b"\n"
            left = left[written:]


def _ends_in_mid_line(descriptor: int, path: str) -> bool:
    """Whether the last sidecar that wrote here was cut short. Only a regular file can be looked at without waiting."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    try:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:
        return False  # empty, or not ours to read
