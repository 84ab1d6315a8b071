"""What a reason means and what to do about it."""

import json
import sys

import typer

from sidecar.errors import EXPLANATIONS, Reason


def command(
    reason: str | None = typer.Argument(None, help="As in x-spanlock-reason; without one, all are listed."),
    as_json: bool = typer.Option(False, "--json", help="JSON."),
) -> None:
    if reason is not None and reason not in set(Reason):
        print(f"spanlock: no such reason; `spanlock explain` lists all {len(Reason)}", file=sys.stderr)
        raise typer.Exit(2)
    chosen = [Reason(reason)] if reason is not None else list(Reason)
    if as_json:
        print(json.dumps({str(r): {"meaning": EXPLANATIONS[r].meaning, "fix": EXPLANATIONS[r].fix} for r in chosen}))
        return
    for item in chosen:
        print(f"{item}\n  {EXPLANATIONS[item].meaning}\n  Fix: {EXPLANATIONS[item].fix}")
