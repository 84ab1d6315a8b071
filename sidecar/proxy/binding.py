"""Which workflow a call belongs to, from what the connection and the head carry. First match; a bad handle ends it.

A CredentialHandle in `Authorization` binds too: it names its workflow, and is good for its own tool only.
"""

import base64
import binascii

from sidecar.errors import CallerError, Reason
from sidecar.model.caller import Caller
from sidecar.model.lease import Lease
from sidecar.model.tool import Tool
from sidecar.model.workflow import Workflow
from sidecar.proxy.http1 import RequestHead
from sidecar.proxy.plane import Plane

_WORKFLOW_HANDLE = b"slw_"
_CREDENTIAL_HANDLE = b"bearer slh_"


def handle_of(raw: bytes | None) -> str | None:
    """The handle in a Proxy-Authorization value (Basic: the password; Bearer: the token) or in x-spanlock-workflow."""
    if raw is None:
        return None
    if raw.startswith(_WORKFLOW_HANDLE):
        return raw.decode("latin-1")
    scheme, _, rest = raw.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip().decode("latin-1")
    if scheme.lower() != b"basic":
        return raw.decode("latin-1")
    try:
        decoded = base64.b64decode(rest.strip(), validate=True)
    except (binascii.Error, ValueError):
        raise CallerError(Reason.HANDLE_INVALID, "Proxy-Authorization is not valid Basic") from None
    return decoded.partition(b":")[2].decode("latin-1")


def join(
    plane: Plane, caller: Caller, head: RequestHead, tunnel_handle: str | None, tool: Tool
) -> tuple[Workflow, Lease | None]:
    """The open workflow of this call, and the lease that a CredentialHandle stands for.

    Raises `CallerError` (handle_invalid, no_workflow, workflow_closed)."""
    handle = handle_of(head.handle) if head.handle is not None else tunnel_handle
    authorization = head.authorization
    if authorization is None or authorization[: len(_CREDENTIAL_HANDLE)].lower() != _CREDENTIAL_HANDLE:
        return plane.registry.join(caller, handle, head.traceparent), None
    value = authorization[7:].strip().decode("latin-1")
    lease = plane.broker.resolve_handle(value, caller.agents, tool.name)
    named = plane.registry.join(caller, handle, head.traceparent) if handle is not None or caller.workflow else None
    if named is not None and named.id != lease.key.workflow:
        raise CallerError(Reason.HANDLE_INVALID, "the credential handle belongs to another workflow")
    return named or plane.registry.get(lease.key.workflow), lease
