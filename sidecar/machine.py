"""State machines as data: a table `(state, event) -> state`. An absent pair is an illegal transition."""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)


class IllegalTransition(RuntimeError):
    """A bug of ours: the table has no such pair. Never caught to carry on."""


def step(table: Mapping[tuple[S, E], S], state: S, event: E) -> S:
    """The state after `event`; raises `IllegalTransition` when the table does not have the pair."""
    try:
        return table[state, event]
    except KeyError:
        raise IllegalTransition(f"no transition from {state} by {event}") from None
