"""Live leases: who may use what until when. Never a value."""

import typer

from sidecar.cli import operator
from sidecar.wire.spanlock.v1 import admin_pb2 as pb


def command(
    workflow: str = typer.Option("", "--workflow", help="Of this workflow only."),
    agent: str = typer.Option("", "--agent", help="Of this agent only."),
    tool: str = typer.Option("", "--tool", help="For this tool only."),
    config: str | None = operator.CONFIG,
    socket: str | None = operator.SOCKET,
    as_json: bool = operator.JSON,
) -> None:
    request = pb.LeasesRequest(workflow_id=workflow, agent=agent, tool=tool)
    found: pb.LeasesResponse = operator.call(socket, config, lambda stub: stub.Leases(request, timeout=5))
    if as_json:
        print(operator.as_json(found))
        return
    rows = [
        (
            x.id,
            x.workflow_id,
            x.agent,
            x.tool,
            x.state,
            operator.when(x.expires_at),
            x.uses,
            x.epoch,
            " ".join(x.scopes),
        )
        for x in found.leases
    ]
    print(operator.table(("LEASE", "WORKFLOW", "AGENT", "TOOL", "STATE", "UNTIL", "USES", "EPOCH", "SCOPES"), rows))
