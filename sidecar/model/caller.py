"""Who is at the other end of a connection."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agent:
    """A declared agent: the AI process that calls us, and the identity that we hold for it."""

    name: str
    spiffe_id: str
    hint: str | None = None
    uid: int = -1
    """The uid its processes run as."""
    gid: int | None = None
    """The group that may open its socket, besides the owner; None: ours."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Found once per connection. `agents` are the declared agents that this uid may be: more than one need handles."""

    uid: int
    agents: frozenset[str]
    workflow: str | None = None
    """Set on a workflow's own listener: its id."""


class Isolation:
    """What separates the agent from us; stated wherever it matters."""

    SAME_UID = "same-uid"
    UID = "uid"
    CONTAINER = "container"
