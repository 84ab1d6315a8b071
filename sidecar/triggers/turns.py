"""Bodies of one uid are taken in turns: what a uid may fill is bounded, and its flood holds up nobody else."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from sidecar.errors import CallerError, Reason

AT_ONCE = 2
"""Bodies of one uid that are in memory at one time: twice 4 MiB, and as much again while one is decompressed."""

WAITING = 32
"""Exports of one uid that may wait for their turn."""

TURN_SECONDS = 10.0
"""How long one waits at most: as long as exporters do."""


@dataclass(slots=True)
class _Line:
    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    waiting: int = 0


class Turns:
    """One for both doors. A line for each uid that has ever come; only declared ones get here, so they are few."""

    def __init__(self) -> None:
        self._lines: dict[int, _Line] = {}

    @asynccontextmanager
    async def of(self, uid: int) -> AsyncIterator[None]:
        """Waits for a turn of this uid. Raises `CallerError` (too_many_connections)."""
        line = self._lines.setdefault(uid, _Line())
        if line.waiting >= WAITING:
            raise CallerError(Reason.TOO_MANY_CONNECTIONS, f"{WAITING} exports of this uid wait already")
        line.waiting += 1
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await line.free.acquire()
        except TimeoutError:
            raise CallerError(Reason.TOO_MANY_CONNECTIONS, "this uid's other exports do not end") from None
        finally:
            line.waiting -= 1
        try:
            yield
        finally:
            line.free.release()
