"""Validates configuration and policy, without starting anything; the daemon says the same words."""

import json
import os
import sys

import typer

from sidecar.config.load import find_config, load
from sidecar.config.schema import Settings
from sidecar.errors import ConfigError
from sidecar.identity.callers import Callers, isolation
from sidecar.policy.load import load_policy
from sidecar.tools.names import embeds_ip


def warnings(settings: Settings) -> list[str]:
    """What is allowed and should be known."""
    agents = [agent.build() for agent in settings.agents]
    found = [
        f"agents: {', '.join(sorted(names))} share uid {uid}: their calls must carry workflow handles"
        for uid, names in Callers(agents).shared_uids()
    ]
    found += [
        f"agents: {agent.name} runs as the sidecar's own uid (isolation {isolation(agent, os.getuid())}): "
        "it can fetch the same SVID and read the sidecar's sockets"
        for agent in agents
        if isolation(agent, os.getuid()) == "same-uid"
    ]
    for tool in (t.build() for t in settings.tools):
        if tool.scheme == "http":
            found.append(f"tools: {tool.name} is plain http: its credential can be read on the way")
        if tool.export:
            found.append(f"tools: {tool.name} exports its real token to the agent")
        if (address := embeds_ip(tool.authority.host)) is not None:
            found.append(f"tools: {tool.name}: {tool.authority.host} is the address {address} spelt as a name")
    return found


def command(
    config: str = typer.Option(None, "-c", "--config", help="spanlock.yaml."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object."),
) -> None:
    """Validates configuration and policy, without starting anything."""
    errors: list[str] = []
    notes: list[str] = []
    try:
        path = find_config(config)
        settings = load(path)
        notes = warnings(settings)
        load_policy(settings.policy, path.parent)
    except ConfigError as error:
        errors = error.detail.split("\n")
    if as_json:
        print(json.dumps({"ok": not errors, "errors": errors, "warnings": notes}))
    else:
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        for line in errors:
            print(f"error: {line}", file=sys.stderr)
        print("ok" if not errors else f"{len(errors)} error(s)")
    raise typer.Exit(2 if errors else 0)
