"""What a reason means and what to do about it: of a refusal, of a workflow's end, of a credential's end at its issuer."""

import json
import sys

import typer

from sidecar.errors import EXPLANATIONS, Explanation
from sidecar.model.endings import AT_THE_ISSUER, CLOSED_BY

_ALL: dict[str, Explanation] = {
    str(word): said for table in (EXPLANATIONS, CLOSED_BY, AT_THE_ISSUER) for word, said in table.items()
}


def command(
    reason: str | None = typer.Argument(
        None, help="As in x-spanlock-reason, a receipt or the audit log; without one, all are listed."
    ),
    as_json: bool = typer.Option(False, "--json", help="JSON."),
) -> None:
    if reason is not None and reason not in _ALL:
        print(f"spanlock: no such reason; `spanlock explain` lists all {len(_ALL)}", file=sys.stderr)
        raise typer.Exit(2)
    chosen = {reason: _ALL[reason]} if reason is not None else _ALL
    if as_json:
        print(json.dumps({word: said._asdict() for word, said in chosen.items()}))
        return
    for word, said in chosen.items():
        print(f"{word}\n  {said.meaning}\n  Fix: {said.fix}")
