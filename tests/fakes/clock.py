"""A clock that tests turn by hand."""

import asyncio
import heapq
import itertools


class FakeClock:
    """`now()` begins at a fixed date, `monotonic()` at 1000; both move only by `advance`."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self._now = now
        self._monotonic = 1000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._somebody_sleeps = asyncio.Condition()

    def now(self) -> float:
        return self._now

    def monotonic(self) -> float:
        return self._monotonic

    def jump_wall(self, seconds: float) -> None:
        """The wall clock alone jumps, as after a suspend or a correction."""
        self._now += seconds

    async def sleep(self, seconds: float) -> None:
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._monotonic + max(seconds, 0.0), next(self._order), future))
        async with self._somebody_sleeps:
            self._somebody_sleeps.notify_all()
        await future

    async def wait_for_sleepers(self, count: int = 1) -> None:
        """Waits until that many tasks sleep."""
        async with self._somebody_sleeps:
            await self._somebody_sleeps.wait_for(lambda: sum(not f.done() for _, _, f in self._sleepers) >= count)

    async def advance(self, seconds: float, sleepers: int = 0) -> None:
        """Waits for `sleepers` tasks to sleep, then turns both clocks; whoever is due wakes, in order."""
        if sleepers:
            await self.wait_for_sleepers(sleepers)
        target = self._monotonic + seconds
        wall = self._now + seconds
        while self._sleepers and self._sleepers[0][0] <= target:
            due, _, future = heapq.heappop(self._sleepers)
            self._now += due - self._monotonic
            self._monotonic = due
            if not future.done():
                future.set_result(None)
            for _ in range(5):
                await asyncio.sleep(0)
        self._monotonic, self._now = target, wall
        for _ in range(5):
            await asyncio.sleep(0)
