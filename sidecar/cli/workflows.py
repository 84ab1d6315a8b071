"""Open workflows and the last closed ones."""

import typer

from sidecar.cli import operator
from sidecar.wire.spanlock.v1 import admin_pb2 as pb


def command(
    agent: str = typer.Option("", "--agent", help="Of this agent only."),
    config: str | None = operator.CONFIG,
    socket: str | None = operator.SOCKET,
    as_json: bool = operator.JSON,
) -> None:
    found: pb.ListWorkflowsResponse = operator.call(
        socket, config, lambda stub: stub.ListWorkflows(pb.ListWorkflowsRequest(agent=agent), timeout=5)
    )
    if as_json:
        print(operator.as_json(found))
        return
    rows = [
        (w.id, w.agent, w.state, operator.when(w.opened_at), w.flows, w.leases, w.close_reason or "-", w.name)
        for w in found.workflows
    ]
    print(operator.table(("WORKFLOW", "AGENT", "STATE", "OPENED", "CALLS", "LEASES", "ENDED BY", "NAME"), rows))
