"""The only file that knows everybody: builds the parts, starts them in order, reloads, drains.

Order of start: identity, then credentials and policy, then the doors. Order of the end: stop accepting, let calls in flight
end, close every workflow, revoke every lease, say what could not be revoked, close the audit log last.
"""

import asyncio
import math
import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sidecar import __version__
from sidecar.address import host_and_port
from sidecar.audit.log import AuditLog
from sidecar.audit.sinks import FileSink, StdoutSink
from sidecar.clock import Clock, SystemClock
from sidecar.config.load import load
from sidecar.config.schema import Settings
from sidecar.control.admin_service import AdminOps
from sidecar.control.health import HealthServer
from sidecar.control.run_dir import operator_path
from sidecar.control.sockets import Socket, agent_socket, operator_socket
from sidecar.control.status import Reloads, StatusPage
from sidecar.control.workflows_service import Doors
from sidecar.credentials.broker import Broker
from sidecar.credentials.exchangers.registry import build_exchanger
from sidecar.credentials.renewer import Renewer
from sidecar.errors import ConfigError, Reason, SpanlockError
from sidecar.identity.callers import Callers
from sidecar.identity.peer import uid_of_peer
from sidecar.identity.source import WorkloadSvids
from sidecar.identity.workload_api import WorkloadApi
from sidecar.model.audit import LeaseRecord, WorkflowRecord
from sidecar.model.caller import Agent, Caller
from sidecar.model.lease import CloseReport, Lease
from sidecar.model.tool import Tool
from sidecar.model.workflow import CloseReason, Workflow
from sidecar.policy.decider import Decider
from sidecar.policy.load import load_policy
from sidecar.proxy.ca import CertificateAuthority
from sidecar.proxy.egress import Resolve, system_resolver
from sidecar.proxy.flow import Flow
from sidecar.proxy.listener import Listeners
from sidecar.proxy.outbox import Outbox
from sidecar.proxy.plane import Plane
from sidecar.proxy.pool import Pool
from sidecar.tasks import Background
from sidecar.telemetry.logging import logger
from sidecar.telemetry.metrics import Metrics
from sidecar.telemetry.tracing import Tracer
from sidecar.tools.router import Router
from sidecar.triggers.otlp import OtlpReceivers
from sidecar.wire.spanlock.v1 import admin_pb2
from sidecar.workflows.registry import Registry
from sidecar.workflows.roll import Roll

_RELOADED = frozenset(("agents", "issuers", "tools", "policy"))
"""The sections that a reload takes over; what the file says otherwise in any other waits for a restart."""
_PAUSE = 1.0
"""Seconds before a loop that failed begins anew."""


@dataclass(frozen=True)
class World:
    """What differs between production and a test: time, chance, names."""

    clock: Clock
    rng: random.Random
    resolve: Resolve = system_resolver


def world() -> World:
    """The real one."""
    return World(SystemClock(), random.SystemRandom())


class App:
    """One sidecar. `start` returns when every door is open; `stop` drains. Made once, started once."""

    def __init__(self, settings: Settings, path: Path, around: World) -> None:
        """Builds everything; reads the policy files. `path`: the configuration file, for reloads. Raises `ConfigError`."""
        self.settings = self._started_with = settings
        self.path = path
        self.log = logger("app")
        self.clock = clock = around.clock
        self.background = Background(self._task_failed)
        self.metrics = Metrics()
        tools = {tool.name: tool for tool in (t.build() for t in settings.tools)}
        agents = {agent.name: agent for agent in (a.build() for a in settings.agents)}
        self.svids = WorkloadSvids(
            WorkloadApi(settings.spiffe.socket),
            list(agents.values()),
            clock,
            around.rng,
            self._needs_identity,
            self.background,
        )
        self.decider = Decider(load_policy(settings.policy), agents, tools)
        exchangers = {i.name: build_exchanger(i, self.svids, clock) for i in settings.issuers}
        self._exchangers = list(exchangers.values())
        """Each one ever made: a revocation under way may still use one that a reload has replaced."""
        self.broker = Broker(
            clock=clock, rng=around.rng, svids=self.svids, exchangers=exchangers, decider=self.decider,
            config=settings.credentials, background=self.background, on_event=self._lease_event, on_drop=self._lease_dropped,
        )  # fmt: skip
        self.registry = Registry(
            clock, settings.workflows, self.broker.close_workflow, self._workflow_changed, self.background
        )
        sink = StdoutSink() if settings.audit.file == "-" else _file_sink(settings.audit.file)
        self.audit = AuditLog(sink, clock, self.metrics.audit_lost.inc)
        self.tracer = Tracer(settings.telemetry.otlp_endpoint, clock)
        outbox = Outbox()
        self.pool = Pool(self.background, outbox, around.resolve, self._own_ports)
        self.plane = Plane(
            registry=self.registry, router=Router(tools.values()), callers=Callers(agents.values()), decider=self.decider,
            broker=self.broker, pool=self.pool, audit=self.audit, metrics=self.metrics, tracer=self.tracer, clock=clock,
            ca=CertificateAuthority(_https_hosts(settings), clock), outbox=outbox, background=self.background,
            limits=settings.limits, find_caller=self.find_caller,
        )  # fmt: skip
        self.listeners = Listeners(self.plane)
        self.otlp = OtlpReceivers(
            settings.otlp, self.find_caller, lambda uid: self.callers.by_uid(uid), self.registry.span_ended, clock,
            operator_path(Path(settings.run_dir)).parent,
        )  # fmt: skip
        self._reloads = Reloads(clock.now())
        self.addresses: dict[str, str] = {}
        """Listener to the address it is bound to."""
        self.page = StatusPage(
            started_at=clock.now(), registry=self.registry, broker=self.broker, svids=self.svids, decider=self.decider,
            audit=self.audit, callers=lambda: self.callers, draining=lambda: self.plane.draining,
            denials=lambda: list(self.plane.denials), reloads=lambda: self._reloads,
            ca_fingerprint=self.plane.ca.fingerprint, addresses=self.addresses,
        )  # fmt: skip
        self.health = (
            HealthServer(settings.health, self.page.ready, self.metrics) if settings.health is not None else None
        )
        self.roll = Roll(operator_path(Path(settings.run_dir)).with_name("workflows.jsonl"))
        self._sockets: list[Socket] = []
        self._gauges()

    # -- start and end ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Opens every door. Does not wait for SPIRE: readiness says when identities are there. Raises `ConfigError`."""
        asyncio.get_running_loop().set_exception_handler(self._loop_error)
        self._make_sockets()
        for socket in self._sockets:
            socket.refuse_taken()  # before anything that another sidecar on this run_dir would notice
        for work, name in (
            (self.svids.run, "svids"),
            (self.svids.keep_fresh, "jwt-svid refresh"),
            (self.registry.run, "workflow expiry"),
            (Renewer(self.broker, self.clock).run, "renewer"),
            (self.audit.run, "audit"),
            (self.tracer.run, "tracer"),
            (partial(self.listeners.sweep, self.clock), "sweep"),
        ):
            self.background.keep(work, name, pause=partial(self.clock.sleep, _PAUSE))
        listeners = self.settings.listeners
        if listeners.explicit is not None:
            self.addresses["explicit"] = await self.listeners.open(listeners.explicit, "explicit")
        if listeners.reverse is not None:
            self.addresses["reverse"] = await self.listeners.open(listeners.reverse, "reverse")
        await self.otlp.start()
        for socket in self._sockets:
            await socket.start()
        self.registry.restarted(self.roll.start())
        if self.health is not None:
            await self.health.start()  # last: a pod's agent starts when the probe passes, and needs its socket then
        self.log.info("started", version=__version__, listeners=self.addresses, run_dir=self.settings.run_dir)

    def _make_sockets(self) -> None:
        """Each agent's and the operator's; none is open yet."""
        doors = Doors(
            registry=self.registry,
            broker=self.broker,
            decider=self.decider,
            open_listener=self.listeners.open_for,
            ca_pem=lambda: self.plane.ca.pem,
            otlp_endpoint=lambda: f"http://localhost:{self.otlp.http_port}" if self.otlp.http_port else "",
            identity_problem=self.svids.problem,
            accepting=self._accepting,
            refused=self.plane.record_rpc_refusal,
        )
        run_dir = Path(self.settings.run_dir)
        for agent in self.callers.agents.values():
            most = self.settings.workflows.max_open_per_agent
            self._sockets.append(agent_socket(run_dir, agent, doors, lambda: self.plane.router, self.clock, most))
        ops = AdminOps(
            self.registry,
            self.broker,
            self.page.response,
            self.reload,
            agents=lambda: self.callers.agents,
            tools=lambda: [tool.name for tool in self.plane.router.tools],
        )
        self._sockets.append(operator_socket(run_dir, ops, self.clock))

    async def stop(self) -> int:
        """Drains and revokes; returns how many leases could not be revoked, each named in the log and the audit."""
        self.plane.draining = True
        self.listeners.stop_accepting()
        await self._let_flows_end(self.settings.limits.drain_seconds)
        closing = self.registry.close_all(CloseReason.SHUTDOWN)
        if closing:
            await asyncio.wait(closing)
        left = await self.broker.drain(self.settings.credentials.revoke_deadline)
        for end in left:
            because = self.broker.revoker.failing.get(end.issuer, "no answer in time")
            self.log.error(
                "not_revoked", lease=end.lease, workflow=end.workflow, tool=end.tool, issuer=end.issuer, because=because,
                residual_seconds=math.ceil(end.residual_seconds),
            )  # fmt: skip
        for socket in self._sockets:
            await socket.stop(0.5)
        self.listeners.aclose()
        self.pool.aclose()
        await self.otlp.stop()
        if self.health is not None:
            await self.health.stop()
        await self.background.aclose()
        for exchanger in self._exchangers:
            await exchanger.aclose()
        await self.svids.aclose()
        self.audit.close()
        self.roll.close()
        self.log.info("stopped", not_revoked=len(left))
        return len(left)

    async def _let_flows_end(self, seconds: float) -> None:
        deadline = self.clock.monotonic() + seconds
        while any(c.flow is not None for c in self.listeners.connections) and self.clock.monotonic() < deadline:
            await self.clock.sleep(0.05)

    # -- reload -------------------------------------------------------------------------------------------------

    async def reload(self) -> admin_pb2.ReloadResponse:
        """Reads the configuration file again: all or nothing. The running one is kept when anything is wrong."""
        try:
            return self._apply(load(self.path))
        except ConfigError as error:
            self.log.error("reload_refused", detail=error.detail)
            since = self._reloads.refused_since or self.clock.now()
            self._reloads = Reloads(self._reloads.at, since, error.detail.replace("\n", "; "))
            return admin_pb2.ReloadResponse(
                applied=False, errors=error.detail.split("\n"), policy_epoch=self.decider.epoch
            )

    def _apply(self, settings: Settings) -> admin_pb2.ReloadResponse:
        """Everything that can fail is made first; then all of it is swapped without a pause."""
        policy = load_policy(settings.policy)
        agents = {agent.name: agent for agent in (a.build() for a in settings.agents)}
        tools = {tool.name: self._same(tool) for tool in (t.build() for t in settings.tools)}
        changed = [i for i in settings.issuers if i not in self.settings.issuers]
        exchangers = {i.name: build_exchanger(i, self.svids, self.clock) for i in changed}
        router, callers = Router(tools.values()), Callers(agents.values())
        self._refuse_changed(agents)
        restart = self._needs_restart(settings)
        dismissed = set(self.callers.agents) - set(agents)
        gone = [
            tool for tool in self.plane.router.tools if tools.get(tool.name) is not tool or tool.issuer in exchangers
        ]
        self.decider.replace(policy, agents, tools)
        self.broker.replace(exchangers)
        self._exchangers += exchangers.values()
        self.pool.forget_trust()
        self.plane.callers = callers
        self.svids.replace_agents(list(agents.values()))
        self.plane.router = router
        self.settings = settings
        self._reloads = Reloads(self.clock.now())
        for name in dismissed:
            self.registry.close_all(CloseReason.AGENT_REMOVED, name)
        for tool in gone:
            self.broker.drop(tool=tool.name)
        self.audit.reopen()
        self.log.info("reloaded", policy_epoch=self.decider.epoch, needs_restart=restart)
        return admin_pb2.ReloadResponse(applied=True, needs_restart=restart, policy_epoch=self.decider.epoch)

    def _same(self, tool: Tool) -> Tool:
        """The tool that is running, when nothing of it changed: its leases live on."""
        return next((running for running in self.plane.router.tools if running == tool), tool)

    def _refuse_changed(self, agents: dict[str, Agent]) -> None:
        """A uid or an identity that changed under open workflows, sockets and cached SVIDs is nobody's clear intention."""
        # One that a reload has removed has its socket still: its name goes to nobody else.
        known = {agent.name: agent for agent in (a.build() for a in self._started_with.agents)} | self.callers.agents
        changed = sorted(name for name, agent in known.items() if agents.get(name, agent) != agent)
        if changed:
            raise ConfigError(
                Reason.CONFIG_INVALID,
                f"agents: {', '.join(changed)} cannot change while running; restart, or declare the new one by a new name",
            )

    def _needs_restart(self, settings: Settings) -> list[str]:
        """What the file says otherwise than it did at the start, and a reload does not change."""
        started = self._started_with
        fixed = [name for name in Settings.model_fields if name not in _RELOADED]
        names = [name for name in fixed if getattr(settings, name) != getattr(started, name)]
        if {a.name for a in settings.agents} != {a.name for a in started.agents}:
            names.append("agents (sockets)")
        if _https_hosts(settings) - _https_hosts(started):
            names.append("tools (a new https host: the interception CA is constrained to those it was made for)")
        return names

    # -- what the parts tell us ---------------------------------------------------------------------------------

    @property
    def callers(self) -> Callers:
        """The declared agents; a reload makes new ones."""
        return self.plane.callers

    def find_caller(self, local: tuple[str, int], peer: tuple[str, int]) -> Caller:
        """Who is at the other end of a loopback connection. Raises `CallerError` (unknown_caller)."""
        return self.callers.by_uid(uid_of_peer(local, peer))

    def _accepting(self) -> bool:
        return not self.plane.draining

    def _needs_identity(self, agent: str) -> bool:
        return self.broker.needs_identity(agent)

    def _own_ports(self) -> frozenset[int]:
        """Those that no tool may lead to: ours, and the SPIRE agent's if it has one (N8)."""
        ports = {self.otlp.grpc_port, self.otlp.http_port, self.health.port if self.health is not None else 0}
        if self.settings.spiffe.socket.startswith("tcp://"):
            ports.add(host_and_port(self.settings.spiffe.socket.removeprefix("tcp://"))[1])
        return self.listeners.ports() | frozenset(ports - {0})

    def _lease_event(self, record: LeaseRecord) -> None:
        self.audit.lease(record)
        self.metrics.lease_event(record.tool, record.event, record.outcome)

    def _lease_dropped(self, workflow: Workflow, lease: Lease) -> None:
        """No byte with this credential leaves any more: its flows are cut, its connections closed."""
        for flow in list(workflow.flows):
            if isinstance(flow, Flow) and flow.lease is lease:
                flow.drop_lease()
        self.pool.drop_workflow(workflow.id, lease.key.tool)

    def _workflow_changed(self, workflow: Workflow, report: CloseReport | None) -> None:
        self.roll.note(workflow)
        if not workflow.is_open and report is None:
            self.pool.drop_workflow(workflow.id)
            self.listeners.close_for(workflow.id)
        event = "opened" if workflow.is_open else "closing" if report is None else "closed"
        self.audit.workflow(
            WorkflowRecord(
                time=self.clock.now(), event=event, workflow=workflow.id, agent=workflow.agent, name=workflow.name,
                reason=str(workflow.close_reason or ""), trace_id=workflow.trace_id or "", flows=workflow.flow_count,
                leases=len(report.ends) if report is not None else 0,
                dropped_ms=report.dropped_ms if report is not None else 0.0,
                revoked_ms=report.revoked_ms if report is not None else 0.0,
            )
        )  # fmt: skip
        if report is not None:
            crashed = workflow.close_reason is CloseReason.SIDECAR_RESTARTED
            dropped_ms = None if crashed else report.dropped_ms
            self.metrics.workflow_closed(report.reason, dropped_ms, report.revoked_ms if report.ends else None)

    def _task_failed(self, name: str, error: BaseException) -> None:
        if not isinstance(error, SpanlockError):
            self.log.error("task_failed", task=name, exc_info=error)

    def _loop_error(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.log.error("internal_error", message=context.get("message"), exc_info=context.get("exception"))

    def _gauges(self) -> None:
        gauge = self.metrics.gauge
        gauge("spanlock_open_workflows", "Open workflows", lambda: float(self.registry.open_count))
        gauge("spanlock_leases", "Live leases", lambda: float(len(self.broker.live)))
        gauge("spanlock_revocation_backlog", "Tokens still to be revoked", lambda: float(self.broker.revoker.backlog))
        gauge("spanlock_ready", "1 when ready", lambda: float(self.page.ready()[0]))


def _https_hosts(settings: Settings) -> frozenset[str]:
    """What the interception CA is constrained to."""
    tools = [tool.build() for tool in settings.tools]
    return frozenset(tool.authority.host for tool in tools if tool.scheme == "https")


def _file_sink(path: str) -> FileSink:
    try:
        return FileSink(path)
    except OSError as error:
        raise ConfigError(Reason.CONFIG_INVALID, f"audit.file: {path} cannot be opened: {error.strerror}") from None
