import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from sidecar.wire.spanlock.v1 import workflows_pb2 as _workflows_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("version", "started_at", "ready", "not_ready_because", "dependencies", "agents", "open_workflows", "active_leases", "revocation_backlog", "last_denials", "policy_epoch", "policy_digest", "ca_fingerprint", "listeners")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    NOT_READY_BECAUSE_FIELD_NUMBER: _ClassVar[int]
    DEPENDENCIES_FIELD_NUMBER: _ClassVar[int]
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    OPEN_WORKFLOWS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_LEASES_FIELD_NUMBER: _ClassVar[int]
    REVOCATION_BACKLOG_FIELD_NUMBER: _ClassVar[int]
    LAST_DENIALS_FIELD_NUMBER: _ClassVar[int]
    POLICY_EPOCH_FIELD_NUMBER: _ClassVar[int]
    POLICY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CA_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LISTENERS_FIELD_NUMBER: _ClassVar[int]
    version: str
    started_at: _timestamp_pb2.Timestamp
    ready: bool
    not_ready_because: str
    dependencies: _containers.RepeatedCompositeFieldContainer[Dependency]
    agents: _containers.RepeatedCompositeFieldContainer[AgentStatus]
    open_workflows: int
    active_leases: int
    revocation_backlog: int
    last_denials: _containers.RepeatedCompositeFieldContainer[Denial]
    policy_epoch: int
    policy_digest: str
    ca_fingerprint: str
    listeners: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, version: _Optional[str] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ready: _Optional[bool] = ..., not_ready_because: _Optional[str] = ..., dependencies: _Optional[_Iterable[_Union[Dependency, _Mapping]]] = ..., agents: _Optional[_Iterable[_Union[AgentStatus, _Mapping]]] = ..., open_workflows: _Optional[int] = ..., active_leases: _Optional[int] = ..., revocation_backlog: _Optional[int] = ..., last_denials: _Optional[_Iterable[_Union[Denial, _Mapping]]] = ..., policy_epoch: _Optional[int] = ..., policy_digest: _Optional[str] = ..., ca_fingerprint: _Optional[str] = ..., listeners: _Optional[_Iterable[str]] = ...) -> None: ...

class Dependency(_message.Message):
    __slots__ = ("name", "ok", "since", "last_error", "next_try", "effect", "state")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    NEXT_TRY_FIELD_NUMBER: _ClassVar[int]
    EFFECT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    name: str
    ok: bool
    since: _timestamp_pb2.Timestamp
    last_error: str
    next_try: _timestamp_pb2.Timestamp
    effect: str
    state: str
    def __init__(self, name: _Optional[str] = ..., ok: _Optional[bool] = ..., since: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_error: _Optional[str] = ..., next_try: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., effect: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class AgentStatus(_message.Message):
    __slots__ = ("name", "spiffe_id", "svid_expires_at", "isolation", "problem")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SPIFFE_ID_FIELD_NUMBER: _ClassVar[int]
    SVID_EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    ISOLATION_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    name: str
    spiffe_id: str
    svid_expires_at: _timestamp_pb2.Timestamp
    isolation: str
    problem: str
    def __init__(self, name: _Optional[str] = ..., spiffe_id: _Optional[str] = ..., svid_expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., isolation: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...

class Denial(_message.Message):
    __slots__ = ("at", "agent", "tool", "reason", "detail")
    AT_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    TOOL_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    at: _timestamp_pb2.Timestamp
    agent: str
    tool: str
    reason: str
    detail: str
    def __init__(self, at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., agent: _Optional[str] = ..., tool: _Optional[str] = ..., reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class ListWorkflowsRequest(_message.Message):
    __slots__ = ("agent",)
    AGENT_FIELD_NUMBER: _ClassVar[int]
    agent: str
    def __init__(self, agent: _Optional[str] = ...) -> None: ...

class ListWorkflowsResponse(_message.Message):
    __slots__ = ("workflows",)
    WORKFLOWS_FIELD_NUMBER: _ClassVar[int]
    workflows: _containers.RepeatedCompositeFieldContainer[_workflows_pb2.Workflow]
    def __init__(self, workflows: _Optional[_Iterable[_Union[_workflows_pb2.Workflow, _Mapping]]] = ...) -> None: ...

class CloseWorkflowRequest(_message.Message):
    __slots__ = ("workflow_id",)
    WORKFLOW_ID_FIELD_NUMBER: _ClassVar[int]
    workflow_id: str
    def __init__(self, workflow_id: _Optional[str] = ...) -> None: ...

class LeasesRequest(_message.Message):
    __slots__ = ("workflow_id", "agent", "tool")
    WORKFLOW_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    TOOL_FIELD_NUMBER: _ClassVar[int]
    workflow_id: str
    agent: str
    tool: str
    def __init__(self, workflow_id: _Optional[str] = ..., agent: _Optional[str] = ..., tool: _Optional[str] = ...) -> None: ...

class LeasesResponse(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    def __init__(self, leases: _Optional[_Iterable[_Union[Lease, _Mapping]]] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("id", "workflow_id", "agent", "tool", "issuer", "audience", "scopes", "state", "expires_at", "uses", "epoch")
    ID_FIELD_NUMBER: _ClassVar[int]
    WORKFLOW_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    TOOL_FIELD_NUMBER: _ClassVar[int]
    ISSUER_FIELD_NUMBER: _ClassVar[int]
    AUDIENCE_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    id: str
    workflow_id: str
    agent: str
    tool: str
    issuer: str
    audience: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    state: str
    expires_at: _timestamp_pb2.Timestamp
    uses: int
    epoch: int
    def __init__(self, id: _Optional[str] = ..., workflow_id: _Optional[str] = ..., agent: _Optional[str] = ..., tool: _Optional[str] = ..., issuer: _Optional[str] = ..., audience: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., state: _Optional[str] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., uses: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("workflow_id", "agent", "tool", "all", "reissue")
    WORKFLOW_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    TOOL_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    REISSUE_FIELD_NUMBER: _ClassVar[int]
    workflow_id: str
    agent: str
    tool: str
    all: bool
    reissue: bool
    def __init__(self, workflow_id: _Optional[str] = ..., agent: _Optional[str] = ..., tool: _Optional[str] = ..., all: _Optional[bool] = ..., reissue: _Optional[bool] = ...) -> None: ...

class RevokeResponse(_message.Message):
    __slots__ = ("ends",)
    ENDS_FIELD_NUMBER: _ClassVar[int]
    ends: _containers.RepeatedCompositeFieldContainer[_workflows_pb2.LeaseEnd]
    def __init__(self, ends: _Optional[_Iterable[_Union[_workflows_pb2.LeaseEnd, _Mapping]]] = ...) -> None: ...

class ReloadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadResponse(_message.Message):
    __slots__ = ("applied", "errors", "needs_restart", "policy_epoch")
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    NEEDS_RESTART_FIELD_NUMBER: _ClassVar[int]
    POLICY_EPOCH_FIELD_NUMBER: _ClassVar[int]
    applied: bool
    errors: _containers.RepeatedScalarFieldContainer[str]
    needs_restart: _containers.RepeatedScalarFieldContainer[str]
    policy_epoch: int
    def __init__(self, applied: _Optional[bool] = ..., errors: _Optional[_Iterable[str]] = ..., needs_restart: _Optional[_Iterable[str]] = ..., policy_epoch: _Optional[int] = ...) -> None: ...
