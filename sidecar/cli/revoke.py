"""Drops credentials here at once and revokes them at their issuers: of a workflow, of an agent, for a tool, or all."""

import json
import sys
from typing import Any

import typer

from sidecar.cli import operator
from sidecar.client.summary import residual, seconds
from sidecar.wire.spanlock.v1 import admin_pb2 as pb


def command(
    workflow: str = typer.Option("", "--workflow", help="Of this workflow."),
    agent: str = typer.Option("", "--agent", help="Of this agent."),
    tool: str = typer.Option("", "--tool", help="For this tool."),
    everything: bool = typer.Option(False, "--all", help="Every lease there is."),
    reissue: bool = typer.Option(
        False,
        "--reissue",
        help="The next use gets a new credential; without it, the workflows that are open now get none.",
    ),
    config: str | None = operator.CONFIG,
    socket: str | None = operator.SOCKET,
    as_json: bool = operator.JSON,
) -> None:
    if not (workflow or agent or tool or everything):
        print("spanlock: say which: --workflow, --agent, --tool or --all", file=sys.stderr)
        raise typer.Exit(2)
    if everything and (workflow or agent or tool):
        print("spanlock: --all is everything: say it alone, or name which without it", file=sys.stderr)
        raise typer.Exit(2)
    request = pb.RevokeRequest(workflow_id=workflow, agent=agent, tool=tool, all=everything, reissue=reissue)
    done: pb.RevokeResponse = operator.call(socket, config, lambda stub: stub.Revoke(request, timeout=30))
    if as_json:
        print(json.dumps(_with_null(operator.as_dict(done), done)))
    elif not done.ends:
        print("nothing matched: no credential was held")
    else:
        rows = [(e.lease_id, e.tool, e.at_issuer, residual(e), e.uses) for e in done.ends]
        print(operator.table(("LEASE", "TOOL", "AT THE ISSUER", "RESIDUAL", "USES"), rows))
    raise typer.Exit(1 if any(end.at_issuer == "failed" for end in done.ends) else 0)


def _with_null(said: dict[str, Any], done: pb.RevokeResponse) -> dict[str, Any]:
    """`residual` as in every JSON of ours: null when there is no end."""
    for shown, end in zip(said["ends"], done.ends, strict=True):
        if seconds(end) is None:
            shown["residual"] = None
    return said
