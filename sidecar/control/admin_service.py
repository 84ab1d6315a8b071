"""The operator's service, on the operator's socket only."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sidecar.control import convert
from sidecar.control.rescue import Context, Rescued, rescued
from sidecar.credentials.broker import Broker
from sidecar.errors import CallerError, Reason
from sidecar.model.workflow import CloseReason
from sidecar.wire.spanlock.v1 import admin_pb2 as pb
from sidecar.wire.spanlock.v1 import admin_pb2_grpc, workflows_pb2
from sidecar.workflows.registry import Registry


@dataclass(frozen=True)
class AdminOps:
    """What the service needs; `status` and `reload` are the app's."""

    registry: Registry
    broker: Broker
    status: Callable[[], pb.StatusResponse]
    reload: Callable[[], Awaitable[pb.ReloadResponse]]


class AdminService(Rescued, admin_pb2_grpc.AdminServicer):
    """Status, workflows, leases, revoke, reload."""

    def __init__(self, ops: AdminOps) -> None:
        self._ops = ops

    @rescued
    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusResponse:
        return self._ops.status()

    @rescued
    async def ListWorkflows(self, request: pb.ListWorkflowsRequest, context: Context) -> pb.ListWorkflowsResponse:
        registry, broker = self._ops.registry, self._ops.broker
        return pb.ListWorkflowsResponse(
            workflows=[
                convert.workflow(w, registry.expires_at(w), len(broker.leases(workflow=w.id)))
                for w in registry.remembered(request.agent or None)
            ]
        )

    @rescued
    async def CloseWorkflow(self, request: pb.CloseWorkflowRequest, context: Context) -> workflows_pb2.CloseResponse:
        workflow = self._ops.registry.find(request.workflow_id)
        if workflow is None:
            raise CallerError(Reason.WORKFLOW_UNKNOWN, "no such workflow")
        return convert.close_report(await asyncio.shield(self._ops.registry.close(workflow, CloseReason.OPERATOR)))

    @rescued
    async def Leases(self, request: pb.LeasesRequest, context: Context) -> pb.LeasesResponse:
        found = self._ops.broker.leases(request.workflow_id or None, request.agent or None, request.tool or None)
        return pb.LeasesResponse(leases=[convert.lease(lease) for lease in found])

    @rescued
    async def Revoke(self, request: pb.RevokeRequest, context: Context) -> pb.RevokeResponse:
        if not (request.workflow_id or request.agent or request.tool or request.all):
            raise CallerError(Reason.INVALID_ARGUMENT, "name workflow_id, agent or tool, or say all")
        workflow, agent = request.workflow_id or None, request.agent or None
        open_now = [w for w in self._ops.registry.remembered(agent) if w.is_open and workflow in (None, w.id)]
        ends = await self._ops.broker.withdraw(
            workflow=workflow, agent=agent, tool=request.tool or None, bar=() if request.reissue else open_now
        )
        return pb.RevokeResponse(ends=[convert.lease_end(end) for end in ends])

    @rescued
    async def Reload(self, request: pb.ReloadRequest, context: Context) -> pb.ReloadResponse:
        return await self._ops.reload()
