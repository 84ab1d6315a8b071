"""What policy is asked and what it answers."""

import re
from dataclasses import dataclass
from enum import StrEnum

_PARAMETERS = re.compile(r";[^/]*")
DELIMITERS = "%(?:2[146789ABC]|3[AD]|40)"
"""Escapes of !$&'()*+,:=@ (delimiters of RFC 3986): many clients escape them in a segment, many servers read them as plain."""
_DELIMITER = re.compile(DELIMITERS)


class Action(StrEnum):
    """The Cedar actions, word for word."""

    WORKFLOW_OPEN = "workflow.open"
    LEASE_ISSUE = "lease.issue"
    LEASE_RENEW = "lease.renew"
    TOKEN_EXCHANGE = "token.exchange"
    HTTP_REQUEST = "http.request"


def without_parameters(path: str) -> str:
    """`path` as those servers read it that cut `;…` off each segment, which they do before they look for dot segments."""
    return _PARAMETERS.sub("", path)


def readings(path: str) -> tuple[str, ...]:
    """The ways in which a tool may read a canonical `path`: as it is, with its delimiters unescaped, without parameters."""
    plain = _DELIMITER.sub(lambda escape: chr(int(escape[0][1:], 16)), path)
    return tuple(dict.fromkeys((path, plain, without_parameters(path), without_parameters(plain))))


@dataclass(frozen=True, slots=True)
class Question:
    """Everything that a decision depends on, besides policy itself: equal questions have equal answers."""

    agent: str
    action: Action
    tool: str = ""
    """Empty for workflow.open."""
    workflow_name: str = ""
    method: str = ""
    path: str = ""
    """Canonical, without the query."""


@dataclass(frozen=True, slots=True)
class Permit:
    """Policy's yes, and the proof of it. Made only by `policy.decider`."""

    question: Question
    scopes: tuple[str, ...]
    """Sorted; the tool's configured scopes, narrowed by `@scopes`."""
    ttl: float
    """Seconds a credential may live at most; `inf` when no obligation says."""
    policy_ids: tuple[str, ...]
    epoch: int
    """The policy's epoch when this was decided; a reload raises it, and what was decided before is asked again."""

    def same(self, other: "Permit") -> bool:
        """Whether both allow the same, whatever policies say so."""
        return self.scopes == other.scopes and self.ttl == other.ttl
