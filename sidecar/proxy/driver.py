"""Drives one coroutine without a Task until it must really wait (see `Driven`).

A Task costs 10–14 µs a request; a coroutine that is sent into by hand costs about 7. Most calls only ever wait for
their own connection's bytes, which the protocols announce by `wake`. When the coroutine awaits a real future (a dial, an
exchange), it is promoted to a Task that finishes it. Before promotion there is no current task, so `asyncio.timeout`
cannot be used in the coroutine itself: deadlines live inside the slow branches, which run as tasks of their own.
"""

import asyncio
import types
from collections.abc import Coroutine, Generator
from typing import Any

from sidecar.tasks import Background


class Driven:
    """Base of `Flow`: `start` runs its coroutine as far as it goes; `await self` parks it until `wake`."""

    __slots__ = ("_background", "_coroutine", "_running", "_signal", "_task", "_waiter")

    def __init__(self, background: Background) -> None:
        self._background = background
        self._coroutine: Coroutine[Any, None, None] | None = None
        self._running = False
        self._signal = False
        self._waiter: asyncio.Future[None] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def in_task(self) -> bool:
        """The coroutine has been promoted: it wakes a step later."""
        return self._task is not None

    def start(self, coroutine: Coroutine[Any, None, None]) -> None:
        """Takes `coroutine` over and runs it until it parks, is promoted, or ends."""
        self._coroutine = coroutine
        self._run()

    def __await__(self) -> Generator[Any, None, None]:
        while not self._signal:
            yield self
        self._signal = False

    def wake(self) -> None:
        """Something the coroutine may be parked for has happened. Safe from inside its own stack: then it only notes it."""
        self._signal = True
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
        elif self._coroutine is not None and self._task is None and not self._running:
            self._run()

    def crashed(self) -> None:
        """The coroutine ended by an exception, which is a bug: gives up what it held."""
        raise NotImplementedError

    def cancel_wait(self) -> None:
        """Ends a wait for a real future (a dial, an exchange) with CancelledError; parked waits end by `wake`."""
        if self._task is not None and self._waiter is None and not self._running:
            self._task.cancel()

    def _run(self) -> None:
        if self._coroutine is None:
            return
        self._running = True
        try:
            yielded = self._coroutine.send(None)
        except StopIteration:
            self._coroutine = None
            return
        except Exception as error:  # noqa: BLE001 - a bug of ours; whoever woke us, a close above all, must go on
            self._coroutine = None
            context = {"message": "a flow failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            self.crashed()
            return
        finally:
            self._running = False
        if yielded is not self:
            self._task = self._background.spawn(self._finish(yielded), "flow")
            self._task.add_done_callback(self._abandoned)

    async def _finish(self, first: Any) -> None:
        try:
            await self._drive(first)
        except Exception:
            self.crashed()
            raise
        finally:
            self._coroutine = self._task = None

    def _abandoned(self, _: "asyncio.Task[None]") -> None:
        """A Task that is cancelled before its first step never enters the coroutine: it is ended here."""
        coroutine, self._coroutine, self._task = self._coroutine, None, None
        if coroutine is not None:
            self._step(coroutine, asyncio.CancelledError())

    @types.coroutine
    def _drive(self, yielded: Any) -> Generator[Any, None, None]:
        """The rest of the coroutine, inside a Task: futures go up to the Task, parking becomes a future of ours."""
        coroutine = self._coroutine
        if coroutine is None:
            return
        while True:
            try:
                if yielded is self:
                    self._waiter = asyncio.get_running_loop().create_future()
                    try:
                        yield from self._waiter
                    finally:
                        self._waiter = None
                else:
                    yield yielded
            except BaseException as error:  # noqa: BLE001 - whatever it is belongs to the coroutine
                step = self._step(coroutine, error)
            else:
                step = self._step(coroutine, None)
            if step is None:
                return
            yielded = step

    def _step(self, coroutine: Coroutine[Any, None, None], error: BaseException | None) -> Any:
        """One step: resumes, or raises `error` inside. What was yielded, or None at the end."""
        self._running = True
        try:
            return coroutine.send(None) if error is None else coroutine.throw(error)
        except StopIteration:
            return None
        finally:
            self._running = False
