"""Which declared agent is it? From a uid to a `Caller`."""

from collections.abc import Iterable

from sidecar.errors import CallerError, Reason
from sidecar.model.caller import Agent, Caller, Isolation


class Callers:
    """Compiled from the declared agents; a reload makes a new one."""

    def __init__(self, agents: Iterable[Agent]) -> None:
        self.agents = {agent.name: agent for agent in agents}
        self._by_uid: dict[int, frozenset[str]] = {}
        for agent in self.agents.values():
            self._by_uid[agent.uid] = self._by_uid.get(agent.uid, frozenset()) | {agent.name}

    @property
    def uids(self) -> int:
        """How many different ones the declared agents have."""
        return len(self._by_uid)

    def by_uid(self, uid: int) -> Caller:
        """Raises `CallerError` (unknown_caller)."""
        names = self._by_uid.get(uid)
        if names is None:
            raise CallerError(Reason.UNKNOWN_CALLER, f"uid {uid} belongs to no declared agent")
        return Caller(uid, names)

    def by_agent(self, name: str) -> Caller:
        """The caller on an agent's own socket, whose file permissions are the authentication."""
        return Caller(self.agents[name].uid, frozenset({name}))

    def shared_uids(self) -> list[tuple[int, frozenset[str]]]:
        """Uids of more than one agent: their calls need handles."""
        return [(uid, names) for uid, names in self._by_uid.items() if len(names) > 1]


def isolation(agent: Agent, own_uid: int) -> str:
    """What separates `agent` from us, as far as we can prove: a container is one only by its own uid."""
    return Isolation.SAME_UID if agent.uid == own_uid else Isolation.UID
