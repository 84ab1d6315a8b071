"""How long to wait before the next try: doubling, capped, with full jitter from an injected source."""

import random
from collections.abc import Iterator


def delays(first: float, cap: float, rng: random.Random) -> Iterator[float]:
    """Endless waits in seconds, drawn from the upper half of first, 2*first, 4*first … cap.

    The upper half keeps a floor under the wait (full jitter may draw almost zero); the jitter keeps many
    sidecars that lost the same issuer from coming back in one wave.
    """
    ceiling = first
    while True:
        yield ceiling * (0.5 + rng.random() / 2)
        ceiling = min(ceiling * 2, cap)
