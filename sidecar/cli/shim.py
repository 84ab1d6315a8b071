"""What stands between `exec` and each process that it starts.

Between fork and exec of a process with gRPC's threads nothing may run, so a fresh interpreter makes the process what it should
be, and becomes it. It runs this file by path, isolated: nothing of the working directory and none of the environment's Python
variables have a say, and nothing but the standard library is there to import.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def words(command: Sequence[str]) -> list[str]:
    """The command line that becomes `command`, which is told by SIGTERM when this process dies, however it dies."""
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def _become(parent: int, command: list[str]) -> int:
    """Returns only when it did not: an exit status as shells give it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # prctl(2): kept over exec
    if os.getppid() != parent:  # it died before we asked
        return 125
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - it is the user's command
    except FileNotFoundError:
        print(f"spanlock: {command[0]}: not found", file=sys.stderr)
        return 127
    except OSError as error:
        print(f"spanlock: {command[0]}: {error.strerror}", file=sys.stderr)
        return 126


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C here is the command's end, without a traceback of ours
    sys.exit(_become(int(sys.argv[1]), sys.argv[2:]))
