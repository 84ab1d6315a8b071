"""The wrapper that keeps a secret value out of everything that prints.

`reveal()` may be called only in the few files that `tests/test_architecture.py` lists.
"""

import hmac
from typing import NoReturn


class Secret:
    """A secret string that never prints, formats, pickles or hashes itself.

    Python cannot promise erasure from memory: dropping the last reference is all there is.
    """

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The value itself. Never hand the result to anything that logs, stores or raises."""
        return self._value

    def __repr__(self) -> str:
        return "Secret(****)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is never pickled or copied to disk")
