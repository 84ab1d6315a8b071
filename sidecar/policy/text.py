"""The text of Cedar policies, as far as it must be read before the engine reads it: where each policy is, and how deep.

The engine's errors have no place, and it descends once for each bracket and operator: text that nests deeply enough overruns
the stack and kills the process, whose policies are reloaded while it runs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_BRACKETS = 64
"""Open brackets. The engine overruns an 8 MiB stack at about a thousand."""
MAX_CHAIN = 400
"""Operators and attributes in one policy that may stand in a chain, each a level too. It overruns beyond some thousands."""

_TOKEN = re.compile(
    r"""(?P<skipped>//[^\n]*|"(?:\\.|[^"\\])*"?)|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<end>;)"""
    r"""|(?P<chain>&&|\|\||[-+*.!]|\bif\b)|(?P<other>[^\s])""",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Statement:
    """One policy with its annotations, and where it begins."""

    file: str
    line: int
    text: str
    too_deep: str = ""
    """What of it nests too deeply; empty when nothing does."""

    @property
    def where(self) -> str:
        return f"{self.file}, line {self.line}"


def statements(file: str, text: str) -> Iterator[Statement]:
    """The policies of a file: a policy ends with `;`, which stands nowhere else but in strings and comments."""
    start: int | None = None
    line, counted = 1, 0
    depth = deepest = chain = 0
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        if start is None:
            if kind == "skipped" and token[0].startswith("//"):
                continue
            start, depth, deepest, chain = token.start(), 0, 0, 0
            line, counted = line + text.count("\n", counted, start), start
        depth += (kind == "open") - (kind == "close")
        deepest = max(deepest, depth)
        chain += kind == "chain" or token[0] == "["
        if kind == "end":
            yield Statement(file, line, text[start : token.end()], _too_deep(deepest, chain))
            start = None
    if start is not None:
        yield Statement(file, line, text[start:], _too_deep(deepest, chain))


def _too_deep(brackets: int, chain: int) -> str:
    if brackets > MAX_BRACKETS:
        return f"brackets are nested more than {MAX_BRACKETS} deep"
    return f"more than {MAX_CHAIN} operators in one policy; make several of it" if chain > MAX_CHAIN else ""
