"""What the operator and the probes are told: readiness, and the whole picture for `spanlock status`."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sidecar import __version__
from sidecar.audit.log import AuditLog
from sidecar.control import convert
from sidecar.credentials.broker import Broker
from sidecar.identity.callers import Callers, isolation
from sidecar.identity.source import WorkloadSvids
from sidecar.model.audit import FlowRecord
from sidecar.policy.decider import Decider
from sidecar.wire.spanlock.v1 import admin_pb2 as pb
from sidecar.workflows.registry import Registry

Row = dict[str, Any]
"""One dependency: name, ok, state, since, last_error, next_try, effect."""


@dataclass(frozen=True)
class Reloads:
    """How the last reading of the configuration went."""

    at: float
    """Wall seconds of the last good one."""
    refused_since: float | None = None
    """Wall seconds of the first refusal since then."""
    error: str = ""


@dataclass(frozen=True)
class StatusPage:
    """Reads from every part and changes none. What a reload replaces is asked for anew each time."""

    started_at: float
    """Wall seconds."""
    registry: Registry
    broker: Broker
    svids: WorkloadSvids
    decider: Decider
    audit: AuditLog
    callers: Callable[[], Callers]
    draining: Callable[[], bool]
    denials: Callable[[], list[FlowRecord]]
    """The last refused calls."""
    reloads: Callable[[], Reloads]
    ca_fingerprint: str
    addresses: Mapping[str, str]

    def ready(self) -> tuple[bool, list[Row]]:
        """Ready: every agent has an identity, and we are not draining. Issuers that fail are told, as calls may go on."""
        problems = self._problems()
        identities = [{"name": f"identity {name}", "ok": not why, "last_error": why} for name, why in problems.items()]
        return self._is_ready(problems), [*self._dependencies(), *identities]

    def _is_ready(self, problems: dict[str, str]) -> bool:
        return not any(problems.values()) and not self.draining()

    def _problems(self) -> dict[str, str]:
        """Why each declared agent has no identity; empty: it has one."""
        return {name: self.svids.problem(name) for name in self.callers().agents}

    def _dependencies(self) -> list[Row]:
        own = [self._configuration_row(), self._policy_row(), self._audit_row()]
        return [*self.svids.health(), *self.broker.health(), *own]

    def _configuration_row(self) -> Row:
        last = self.reloads()
        refused = last.refused_since is not None
        return {
            "name": "configuration",
            "ok": not refused,
            "state": "reload refused" if refused else "ok",
            "since": last.refused_since if refused else last.at,
            "last_error": last.error,
            "effect": "the last good configuration and policy are in force" if refused else "",
        }

    def _policy_row(self) -> Row:
        digest = self.decider.digest[:16]
        return {"name": "policy", "ok": True, "since": self.reloads().at, "last_error": "", "digest": digest}

    def _audit_row(self) -> Row:
        ok = self.audit.healthy
        return {
            "name": "audit",
            "ok": ok,
            "last_error": "" if ok else "the sink refuses lines; records are lost and counted",
        }

    def response(self) -> pb.StatusResponse:
        """For `Admin.Status`."""
        problems = self._problems()
        response = pb.StatusResponse(
            version=__version__,
            started_at=convert.timestamp(self.started_at),
            ready=self._is_ready(problems),
            not_ready_because="shutting down" if self.draining() else "; ".join(filter(None, problems.values())),
            open_workflows=self.registry.open_count,
            active_leases=len(self.broker.live),
            revocation_backlog=self.broker.revoker.backlog,
            policy_epoch=self.decider.epoch,
            policy_digest=self.decider.digest,
            ca_fingerprint=self.ca_fingerprint,
            listeners=[f"{name} {address}" for name, address in self.addresses.items()],
            dependencies=map(_dependency, self._dependencies()),
        )
        for agent in self.callers().agents.values():
            response.agents.add(
                name=agent.name, spiffe_id=agent.spiffe_id, svid_expires_at=convert.timestamp(self.svids.expiry(agent.name)),
                isolation=isolation(agent, os.getuid()), problem=problems[agent.name],
            )  # fmt: skip
        for flow in self.denials():
            at = convert.timestamp(flow.time)
            response.last_denials.add(at=at, agent=flow.agent, tool=flow.tool, reason=flow.outcome, detail=flow.detail)
        return response


def _dependency(row: Row) -> pb.Dependency:
    return pb.Dependency(
        name=row["name"],
        ok=row["ok"],
        state=row.get("state") or ("ok" if row["ok"] else "down"),
        since=convert.timestamp(row.get("since")),
        last_error=row["last_error"],
        next_try=convert.timestamp(row.get("next_try")),
        effect=row.get("effect") or "",
    )
