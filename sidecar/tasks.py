"""Background tasks with an owner: each is named, kept, reported when it fails, and ended with its owner."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

OnFailure = Callable[[str, BaseException], None]
"""Called with the task's name and its exception; must not raise."""


def told_to_end() -> bool:
    """Whether the present task was cancelled. A CancelledError without that is somebody else's: what was awaited has ended."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Background:
    """Owns tasks. `aclose()` cancels what still runs and waits for it; the owner calls it once."""

    def __init__(self, on_failure: OnFailure) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_failure = on_failure

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Starts `work`. Its failure goes to `on_failure`; awaiting the returned task is optional."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def keep(
        self, work: Callable[[], Coroutine[Any, Any, None]], name: str, pause: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Starts what must never end while the owner lives: a failure is reported, and after `pause` it begins anew."""
        self.spawn(self._kept(work, name, pause), name)

    async def _kept(
        self, work: Callable[[], Coroutine[Any, Any, None]], name: str, pause: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        while True:
            try:
                return await work()
            except Exception as error:  # noqa: BLE001 - whatever it is: expiry, renewal and identity must go on
                self._on_failure(name, error)
            await pause()

    def __len__(self) -> int:
        return len(self._tasks)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(task.get_name(), error)

    async def aclose(self) -> None:
        """Cancels every task and waits until all have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
