"""What every flow needs: its collaborators, as one frozen record. `Plane` is the only such record, and holds no state."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sidecar.audit.log import AuditLog
from sidecar.clock import Clock
from sidecar.credentials.broker import Broker
from sidecar.errors import Reason, SpanlockError
from sidecar.identity.callers import Callers
from sidecar.model.audit import FlowRecord, RpcRefusal
from sidecar.model.caller import Caller
from sidecar.policy.decider import Decider
from sidecar.proxy.ca import CertificateAuthority
from sidecar.proxy.config import LimitsConfig
from sidecar.proxy.outbox import Outbox
from sidecar.proxy.pool import Pool
from sidecar.tasks import Background
from sidecar.telemetry.metrics import Metrics
from sidecar.telemetry.tracing import Tracer
from sidecar.tools.router import Router
from sidecar.workflows.registry import Registry

FindCaller = Callable[[tuple[str, int], tuple[str, int]], Caller]
"""From a connection's local and peer address. Raises `CallerError` (unknown_caller)."""


@dataclass
class Plane:
    """The data plane's collaborators. A reload replaces `router` and `callers` here; flows in flight keep what they took."""

    registry: Registry
    router: Router
    callers: Callers
    decider: Decider
    broker: Broker
    pool: Pool
    audit: AuditLog
    metrics: Metrics
    tracer: Tracer
    clock: Clock
    ca: CertificateAuthority
    outbox: Outbox
    background: Background
    limits: LimitsConfig
    find_caller: FindCaller
    draining: bool = False
    denials: deque[FlowRecord] = field(default_factory=lambda: deque(maxlen=20))
    """The last refusals, for `status`."""

    def record_flow(self, record: FlowRecord, traceparent: bytes | None) -> None:
        """The one record of a flow: audit, metrics, the last refusals, and a span when the parent is sampled."""
        self.audit.flow(record)
        self.metrics.flow(record.tool, record.outcome, record.duration_ms / 1000)
        if record.outcome != "ok":
            self.denials.append(record)
            if record.workflow and record.outcome != Reason.CLIENT_GONE:
                self.registry.refused(record.workflow, record.outcome)
        if traceparent is not None:
            self.tracer.flow(record, traceparent)

    def record_refusal(self, caller: Caller, mode: str, status: int, error: SpanlockError) -> None:
        """The record of a request that was refused before it became a flow."""
        agents = ",".join(sorted(caller.agents))
        self.record_flow(
            FlowRecord(
                time=self.clock.now(), agent=agents, uid=caller.uid, workflow=caller.workflow or "", tool="", method="",
                path="", status=status, outcome=str(error.reason), detail=error.detail, request_bytes=0, response_bytes=0,
                duration_ms=0.0, lease="", lease_epoch=0, policy_ids=(), trace_id="", mode=mode, upstream="",
            ),
            None,
        )  # fmt: skip

    def record_rpc_refusal(self, refusal: RpcRefusal) -> None:
        """The record of an RPC that was refused on an agent's socket.

        A workflow of another agent and a tool that is not configured are left out: the agent may write what it likes, and
        neither a metric nor what is remembered for `status` may grow by it.
        """
        workflow = self.registry.find(refusal.workflow)
        is_own = workflow is not None and workflow.agent == refusal.agent
        tool = next((tool.name for tool in self.router.tools if tool.name == refusal.tool), "")
        self.record_flow(
            FlowRecord(
                time=self.clock.now(), agent=refusal.agent, uid=-1, workflow=refusal.workflow if is_own else "", tool=tool,
                method=refusal.rpc, path="", status=refusal.status, outcome=refusal.reason, detail=refusal.detail,
                request_bytes=0, response_bytes=0, duration_ms=0.0, lease="", lease_epoch=0, policy_ids=(), trace_id="",
                mode="grpc", upstream="",
            ),
            None,
        )  # fmt: skip
