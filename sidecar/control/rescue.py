"""How a refusal looks over gRPC: one table, and the reason in trailing metadata."""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import wraps
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio

from sidecar.errors import Reason, SpanlockError
from sidecar.model.audit import RpcRefusal

_C = grpc.StatusCode
_BY_CODE: dict[grpc.StatusCode, tuple[Reason, ...]] = {
    _C.INVALID_ARGUMENT: (
        Reason.MALFORMED_REQUEST, Reason.INVALID_ARGUMENT, Reason.UNKNOWN_TOOL, Reason.AMBIGUOUS_PATH, Reason.EARLY_DATA,
        Reason.AUTHORITY_MISMATCH, Reason.UPGRADE_REFUSED, Reason.METHOD_REFUSED, Reason.CLEARTEXT_REFUSED,
        Reason.FOREIGN_CREDENTIAL, Reason.CROSS_SITE,
    ),
    _C.PERMISSION_DENIED: (Reason.POLICY_DENIED, Reason.EXPORT_REFUSED, Reason.UNKNOWN_CALLER, Reason.ADDRESS_REFUSED),
    _C.NOT_FOUND: (Reason.WORKFLOW_UNKNOWN, Reason.HANDLE_INVALID),
    _C.FAILED_PRECONDITION: (
        Reason.WORKFLOW_CLOSED, Reason.NO_WORKFLOW, Reason.LEASE_GONE, Reason.CONFIG_INVALID, Reason.POLICY_INVALID,
        Reason.ISSUER_REFUSED, Reason.ISSUER_MALFORMED, Reason.SECRET_UNAVAILABLE, Reason.CREDENTIAL_UNUSABLE,
    ),
    _C.RESOURCE_EXHAUSTED: (
        Reason.TOO_MANY_WORKFLOWS, Reason.TOO_MANY_CONNECTIONS, Reason.TOO_MANY_LEASES, Reason.USES_EXHAUSTED,
        Reason.REQUEST_TOO_LARGE,
    ),
    _C.UNAVAILABLE: (
        Reason.NO_IDENTITY, Reason.SVID_EXPIRED, Reason.SPIRE_UNAVAILABLE, Reason.ISSUER_UNAVAILABLE, Reason.DRAINING,
        Reason.DNS_FAILED, Reason.UPSTREAM_UNREACHABLE, Reason.UPSTREAM_TLS, Reason.UPSTREAM_CLOSED, Reason.UPSTREAM_MALFORMED,
    ),
    _C.DEADLINE_EXCEEDED: (Reason.UPSTREAM_TIMEOUT, Reason.REQUEST_TIMEOUT),
    _C.CANCELLED: (Reason.CLIENT_GONE,),
    _C.INTERNAL: (Reason.INTERNAL, Reason.POLICY_ERROR),
}  # fmt: skip
CODE: dict[Reason, grpc.StatusCode] = {reason: code for code, reasons in _BY_CODE.items() for reason in reasons}

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


async def refuse(context: Context, error: SpanlockError) -> NoReturn:
    """Ends the call with the reason's code; the reason itself travels in `x-spanlock-reason`."""
    await context.abort(
        CODE[error.reason], f"{error.reason}: {error.detail}", (("x-spanlock-reason", str(error.reason)),)
    )
    raise AssertionError("abort raises")


def refusal(agent: str, rpc: str, request: object, error: SpanlockError) -> RpcRefusal:
    """The refusal as it is recorded. `request`: the message, if there is one."""
    workflow, tool = getattr(request, "workflow_id", ""), getattr(request, "tool", "")
    code: int = CODE[error.reason].value[0]
    return RpcRefusal(agent, rpc, workflow, tool, code, str(error.reason), error.detail)


class Rescued:
    """Whose handlers are `rescued`. Nobody is told of a refusal, unless a service says whom to tell."""

    def note_refusal(self, rpc: str, request: object, error: SpanlockError) -> None:
        """`request`: the message, or the stream of them."""


def rescued(method: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """For unary handlers of a `Rescued`: a `SpanlockError` becomes its status, and is noted."""

    @wraps(method)
    async def handler(self: Any, request: Any, context: Context) -> T:
        try:
            return await method(self, request, context)
        except SpanlockError as error:
            self.note_refusal(method.__name__, request, error)
            await refuse(context, error)

    return handler


def rescued_stream(method: Callable[..., AsyncIterator[T]]) -> Callable[..., AsyncIterator[T]]:
    """The same for streaming handlers."""

    @wraps(method)
    async def handler(self: Any, request: Any, context: Context) -> AsyncIterator[T]:
        try:
            async for message in method(self, request, context):
                yield message
        except SpanlockError as error:
            self.note_refusal(method.__name__, request, error)
            await refuse(context, error)

    return handler
