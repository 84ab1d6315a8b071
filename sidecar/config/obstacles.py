"""What keeps a valid configuration from starting here: found by `check` as this user on this machine, without starting it."""

from pathlib import Path

from sidecar.audit import sinks
from sidecar.config.schema import Settings
from sidecar.control import run_dir


def obstacles(settings: Settings) -> list[str]:
    """One line each, with the key."""
    found = list(run_dir.obstacles(Path(settings.run_dir), [agent.build() for agent in settings.agents]))
    file = settings.audit.file
    if file != "-" and (why := sinks.obstacle(file)):
        found.append(f"audit.file: {file} cannot be opened: {why}")
    return found
