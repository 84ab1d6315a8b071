"""Time, injected. Wall time is only for comparing with `exp`; timers are monotonic.

Everything that waits or asks for the time takes a `Clock`, so that tests turn the hands themselves.
"""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """What the time is, and how to wait. All values in seconds."""

    def now(self) -> float:
        """Seconds since the Unix epoch; may jump. For `exp`, audit times and nothing else."""
        ...

    def monotonic(self) -> float:
        """Seconds that never go back. For ages, deadlines and durations."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Waits at least `seconds`; zero or less only yields to the loop."""
        ...


class SystemClock:
    """The machine's own clocks."""

    # The functions themselves: a call asks for the time often enough that a frame for each would show.
    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(seconds, 0.0))
