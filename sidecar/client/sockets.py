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
        return [Path(named)]
    return below(run_dir(), agent)


def below(directory: Path, agent: str | None = None) -> list[Path]:
    """The sockets in a run directory: the agent's, or every agent's."""
    return sorted((directory / "agents").glob(f"{agent or '*'}/agent.sock"))
