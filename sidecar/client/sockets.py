"""Where the sidecar that runs here listens for agents. The library and `spanlock exec` look in the same places."""

import os
from pathlib import Path

_RUN_DIR = "/run/spanlock"


def run_dir() -> Path:
    """SPANLOCK_RUN_DIR, or the daemon's own default."""
    return Path(os.environ.get("SPANLOCK_RUN_DIR") or _RUN_DIR)


def candidates(agent: str | None = None) -> list[Path]:
    """SPANLOCK_SOCKET alone; without it, or when an agent is named, what the run directory has of it."""
    if (named := os.environ.get("SPANLOCK_SOCKET")) and agent is None:
        return [path_of(named)]
    return below(run_dir(), agent)


def path_of(socket: str | Path) -> Path:
    """Of a path, or of the address that gRPC has for it (`unix:PATH`, `unix:///PATH`)."""
    scheme, colon, path = str(socket).partition(":")
    return Path(path.removeprefix("//")) if (scheme, colon) == ("unix", ":") else Path(socket)


def below(directory: Path, agent: str | None = None) -> list[Path]:
    """The sockets in a run directory: the agent's, or every agent's."""
    return sorted((directory / "agents").glob(f"{agent or '*'}/agent.sock"))
