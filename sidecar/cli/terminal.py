"""The controlling terminal: who is in its foreground, and what follows when the command stops.

A command that has the terminal on both sides gets the foreground at once. In a pipeline it shares the terminal with the rest
of it (a pager), so it gets the foreground when the terminal stops it for reading or setting it without. That is why the
terminal is /dev/tty, not standard input.
"""

import os
import signal
import subprocess
from types import TracebackType

from sidecar.cli.signals import send

_WITHOUT_FOREGROUND = (signal.SIGTTIN, signal.SIGTTOU)


class Terminal:
    """Lent to the command's process group, and taken back. Ours to lend only while we are in its foreground ourselves."""

    def __init__(self, group: int) -> None:
        self._group = group
        try:
            self._fd = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:
            self._fd = -1

    @property
    def is_there(self) -> bool:
        """False under `setsid`, in a container without -t, as a service."""
        return self._fd >= 0

    def lend(self) -> bool:
        """Whether the command's group is in the foreground from now on."""
        if self._foreground() == os.getpgrp():
            self._put(self._group)
        return self._foreground() == self._group

    def take_back(self) -> bool:
        """Whether it was lent, and is ours again; what the shell or another has taken stays theirs."""
        if self._foreground() != self._group:
            return False
        self._put(os.getpgrp())
        return True

    def _foreground(self) -> int:
        try:
            return os.tcgetpgrp(self._fd) if self.is_there else -1
        except OSError:  # it was hung up
            return -1

    def _put(self, group: int) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})  # from the background it would stop us
        try:
            os.tcsetpgrp(self._fd, group)
        except OSError:  # the group has ended, or the terminal was hung up
            return
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def __enter__(self) -> "Terminal":
        if os.isatty(0) and os.isatty(1):
            self.lend()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.take_back()
        if self.is_there:
            os.close(self._fd)


def wait(child: subprocess.Popen[bytes], terminal: Terminal) -> int:
    """The command's exit status, 128+n when signal n killed it. When it stops, so do we, for the shell to see; `fg` goes on."""
    while True:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            child.returncode = os.waitstatus_to_exitcode(status)
            return 128 - child.returncode if child.returncode < 0 else child.returncode
        if terminal.is_there:
            _stopped(terminal, os.WSTOPSIG(status))
            send(child.pid, signal.SIGCONT)


def _stopped(terminal: Terminal, number: int) -> None:
    """Returns when the command may go on."""
    if number in _WITHOUT_FOREGROUND and terminal.lend():
        return
    lent = terminal.take_back()
    if number == signal.SIGTSTP:  # which the kernel discards where no shell would continue us
        handler = signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, handler)
    else:
        os.kill(os.getpid(), signal.SIGSTOP)
    if lent:
        terminal.lend()
