"""RFC 8693 in its own words, for agents that ask instead of being injected."""

from collections.abc import Callable

from sidecar.control import convert
from sidecar.control.rescue import Context, rescued
from sidecar.control.workflows_service import AgentService, Doors
from sidecar.errors import CallerError, Denied, Reason
from sidecar.tools.router import Router
from sidecar.wire.spanlock.v1 import token_exchange_pb2 as pb
from sidecar.wire.spanlock.v1 import token_exchange_pb2_grpc

HANDLE_TYPE = "urn:spanlock:token-type:credential-handle"
ACCESS_TOKEN_TYPE = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a type, not a token


class TokenExchangeService(AgentService, token_exchange_pb2_grpc.TokenExchangeServicer):
    """One for each agent. `router` gives the router of the moment: a reload replaces it."""

    def __init__(self, agent: str, doors: Doors, router: Callable[[], Router]) -> None:
        super().__init__(agent, doors)
        self._router = router

    @rescued
    async def Exchange(self, request: pb.ExchangeRequest, context: Context) -> pb.ExchangeResponse:
        doors = self._doors
        workflow = doors.registry.get(request.workflow_id)
        if workflow.agent != self._agent:
            raise CallerError(Reason.WORKFLOW_UNKNOWN, "no such workflow of this agent")
        tool = self._router().by_name(request.tool)
        wanted = tuple(sorted(set(request.scope))) or tool.scopes
        if not set(wanted) <= set(tool.scopes):
            raise CallerError(Reason.INVALID_ARGUMENT, f"scope: more than tool {tool.name} is configured for")
        for field, given, own in (
            ("audience", request.audience, tool.audience),
            ("resource", request.resource, tool.resource),
        ):
            if given and given != own:
                raise CallerError(Reason.INVALID_ARGUMENT, f"{field}: not the one of tool {tool.name}")
        if request.requested_token_type not in ("", HANDLE_TYPE, ACCESS_TOKEN_TYPE):
            raise CallerError(Reason.INVALID_ARGUMENT, f"requested_token_type: {HANDLE_TYPE} or {ACCESS_TOKEN_TYPE}")
        export = request.requested_token_type == ACCESS_TOKEN_TYPE
        if export and not tool.export:
            raise CallerError(Reason.EXPORT_REFUSED, f"tool {tool.name} does not allow export")
        permit = doors.decider.decide_exchange(workflow, tool, wanted)
        lease = await doors.broker.lease(workflow, tool, permit)
        if permit.epoch != doors.decider.epoch and not permit.same(
            doors.decider.decide_exchange(workflow, tool, wanted)
        ):
            raise Denied(Reason.POLICY_DENIED, "the policy changed meanwhile; ask again")
        self._router().require(tool)
        value = doors.broker.export(lease, workflow, tool).reveal() if export else doors.broker.handle(lease)
        return pb.ExchangeResponse(
            access_token=value,
            issued_token_type=ACCESS_TOKEN_TYPE if export else HANDLE_TYPE,
            token_type="Bearer" if export else "N_A",  # noqa: S106 - a type
            expires_at=convert.timestamp(lease.ends_at),
            scope=lease.key.scopes,
            lease_id=lease.id,
        )

    @rescued
    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        which = request.WhichOneof("what")
        if which is None:
            raise CallerError(Reason.INVALID_ARGUMENT, "name access_token (a handle or an exported token) or lease_id")
        end = await self._doors.broker.release(
            self._agent,
            token=request.access_token if which == "access_token" else None,
            lease_id=request.lease_id if which == "lease_id" else None,
        )
        return pb.ReleaseResponse(at_issuer=str(end.at_issuer))
