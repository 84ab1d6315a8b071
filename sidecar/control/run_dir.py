"""The directories of the sockets, in `run_dir`: made here, and ours alone to write in."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from sidecar.address import MAX_SOCKET_PATH
from sidecar.errors import ConfigError, Reason
from sidecar.model.caller import Agent


def agent_path(run_dir: Path, agent: str) -> Path:
    """Where this agent opens workflows."""
    return run_dir / "agents" / agent / "agent.sock"


def operator_path(run_dir: Path) -> Path:
    """Where the operator asks."""
    return run_dir / "operator" / "operator.sock"


def claim(directory: Path, mode: int) -> None:
    """Makes a directory of a socket ours alone to write in. Raises `ConfigError` when it is another's and open to others."""
    us = os.geteuid()
    if us == 0 and directory.stat().st_uid != us:
        os.chown(directory, us, -1)
    if directory.stat().st_uid == us:
        directory.chmod(mode)
    elif why := _open_to_others(directory):
        raise ConfigError(Reason.CONFIG_INVALID, f"run_dir: {why}")


def _open_to_others(directory: Path) -> str:
    """Whoever may write in it can put a socket of his own in the place of ours. Empty: nobody else may.

    A volume that Kubernetes makes is such a directory (root's, mode 2777): it may hold ours, and not be one of them.
    """
    status, us = directory.stat(), os.geteuid()
    if us in (0, status.st_uid) or not status.st_mode & 0o022:
        return ""
    return (
        f"{directory} is uid {status.st_uid}'s and others may write in it (mode {status.st_mode & 0o7777:o}): they could "
        f"replace the socket; remove it, so that it is made as uid {us} here, and mount a volume over run_dir, not over a "
        "directory in it"
    )


def cannot_give(agent: Agent) -> str:
    """Why the agent's socket cannot be its group's; empty when it can."""
    if os.geteuid() == 0 or agent.gid in (None, os.getegid(), *os.getgroups()):
        return ""
    return f"agents: {agent.name}: gid {agent.gid}: the sidecar is not in that group; add it to it"


def obstacles(run_dir: Path, agents: Iterable[Agent]) -> Iterator[str]:
    """Why the sockets could not be made in it by this process. Changes nothing."""
    paths = [operator_path(run_dir)]
    for agent in agents:
        paths.append(agent_path(run_dir, agent.name))
        if why := cannot_give(agent):
            yield why
    for path in paths:
        yield from (f"run_dir: {why}" for why in (too_long(path), _unusable(path.parent, run_dir)) if why)


def too_long(path: Path) -> str:
    """Why no socket can have this path; empty when one can."""
    length = len(os.fsencode(path))
    return f"{path} has {length} bytes, a socket's path {MAX_SOCKET_PATH} at most" if length > MAX_SOCKET_PATH else ""


def _unusable(directory: Path, run_dir: Path) -> str:
    """Why no socket can be made in it; empty when one can."""
    made = directory
    while not os.path.lexists(made) and made != made.parent:
        made = made.parent
    try:
        if not made.is_dir():
            return f"{made} is not a directory"
        if not os.access(made, os.W_OK | os.X_OK):
            return f"{made} cannot be written in as uid {os.geteuid()}: {directory} is to be there"
        return _open_to_others(made) if run_dir in made.parents else ""
    except OSError as error:
        return f"{made}: {error.strerror}"
