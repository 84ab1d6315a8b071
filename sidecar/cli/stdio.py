"""Standard streams that may be closed, full or broken: what cannot be said changes nothing of what is done."""

import io
import os
import sys
from typing import Any


class _Lossy(io.FileIO):
    """What cannot be written is lost."""

    def write(self, data: Any, /) -> int:
        """As if it had been."""
        try:
            super().write(data)
        except OSError:
            pass  # its reader has gone, the disk is full, the terminal was hung up
        return len(memoryview(data).cast("B"))


def settle() -> None:
    """For a process that starts others. A closed stream is opened on nothing, so that no file or socket of ours takes its
    place, here or in them."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
    raw = _Lossy(2, "w", closefd=False)
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), errors="backslashreplace", line_buffering=True)
