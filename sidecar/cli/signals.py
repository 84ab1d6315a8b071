"""The signals that `exec` gets. They are the command's once it runs; before, they end everything in order."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_TERMINALS = (signal.SIGTSTP, signal.SIGWINCH)
"""What the terminal tells its foreground, where we are until the command asks for it."""


class Interrupted(BaseException):
    """A signal came before the command ran. As a KeyboardInterrupt, it is nobody's to handle on its way."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


class Signals:
    """Raises `Interrupted` only where we wait for others, so that nothing that was begun is lost half-way.

    A signal that we were started to ignore (`nohup`, a shell's `&`) stays ignored, by us and by the command.
    """

    def __init__(self) -> None:
        self._group = 0
        self._received = 0
        self._waits = False
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would lose the command's exit status
        self._handle(_ENDING)

    def _handle(self, numbers: tuple[signal.Signals, ...]) -> None:
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda received, _: self._receive(received))

    def _receive(self, number: int) -> None:
        if self._group:
            send(self._group, number)
            return
        self._received = number
        if self._waits:
            raise Interrupted(number)

    def check(self) -> None:
        """Raises `Interrupted` for what has come."""
        if self._received:
            raise Interrupted(self._received)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Nothing is lost when the block is left at any point. Raises `Interrupted`, also for what came before it."""
        self._waits = True
        try:
            self.check()
            yield
        finally:
            self._waits = False

    @contextmanager
    def forwarded(self, group: int) -> Iterator[None]:
        """To the command's process group, what came while it was started too. What comes after the block is too late."""
        self._handle(_TERMINALS)
        self._group = group
        if self._received:
            send(group, self._received)
        try:
            yield
        finally:
            self._group = 0


def send(group: int, number: int) -> None:
    """Signals a process group, if it is still there."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return
