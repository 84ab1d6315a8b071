"""What works, what does not, since when, when it is tried again, and what that means for calls. Exits 0 when ready,
3 when not, 1 when no sidecar answers."""

import typer

from sidecar.cli import operator
from sidecar.wire.spanlock.v1 import admin_pb2 as pb


def command(
    config: str | None = operator.CONFIG, socket: str | None = operator.SOCKET, as_json: bool = operator.JSON
) -> None:
    status: pb.StatusResponse = operator.call(socket, config, lambda stub: stub.Status(pb.StatusRequest(), timeout=5))
    if as_json:
        print(operator.as_json(status))
    else:
        _print(status)
    raise typer.Exit(0 if status.ready else 3)


def _print(status: pb.StatusResponse) -> None:
    state = "ready" if status.ready else "NOT READY"
    why = f": {status.not_ready_because}" if status.not_ready_because else ""
    print(f"spanlock {status.version}, up since {operator.when(status.started_at)}: {state}{why}")
    print(
        f"{status.open_workflows} open workflows, {status.active_leases} leases, {status.revocation_backlog} tokens to be "
        f"revoked; policy epoch {status.policy_epoch}, digest {status.policy_digest[:16]}; {', '.join(status.listeners)}\n"
    )
    rows = [
        (
            d.name,
            d.state if d.ok else d.state.upper(),
            operator.when(d.since),
            d.last_error or "-",
            operator.when(d.next_try),
            d.effect or "-",
        )
        for d in status.dependencies
    ]
    print(operator.table(("DEPENDENCY", "STATE", "SINCE", "LAST ERROR", "NEXT TRY", "EFFECT"), rows) + "\n")
    agents = [
        (a.name, a.spiffe_id, operator.when(a.svid_expires_at), a.isolation, a.problem or "-") for a in status.agents
    ]
    print(operator.table(("AGENT", "SPIFFE ID", "SVID UNTIL", "ISOLATION", "PROBLEM"), agents))
    if status.last_denials:
        denials = [
            (operator.when(d.at), d.agent or "-", d.tool or "-", d.reason, d.detail) for d in status.last_denials
        ]
        print("\n" + operator.table(("REFUSED AT", "AGENT", "TOOL", "REASON", "DETAIL"), denials))
