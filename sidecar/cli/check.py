"""Validates configuration and policy without starting anything; names the key and the fix. The daemon says the same words."""

import json
import sys

import typer

from sidecar.config.advice import warnings
from sidecar.config.load import find_config, load
from sidecar.config.obstacles import obstacles
from sidecar.errors import ConfigError
from sidecar.policy.load import load_policy


def command(
    config: str | None = typer.Option(None, "-c", "--config", help="spanlock.yaml."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object."),
) -> None:
    errors: list[str] = []
    notes: list[str] = []
    try:
        path = find_config(config)
        settings = load(path)
        errors = obstacles(settings)
        notes = warnings(settings, load_policy(settings.policy))
    except ConfigError as error:
        errors += error.detail.split("\n")
    if as_json:
        print(json.dumps({"ok": not errors, "errors": errors, "warnings": notes}))
    else:
        for note in notes:
            print(f"warning: {note}", file=sys.stderr)
        for line in errors:
            print(f"error: {line}", file=sys.stderr)
        print("ok" if not errors else f"{len(errors)} error(s)")
    raise typer.Exit(2 if errors else 0)
