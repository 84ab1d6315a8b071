import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenRequest(_message.Message):
    __slots__ = ("name", "trace_id", "root_span_id", "max_age", "idle", "listener", "subject_token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    ROOT_SPAN_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_AGE_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    LISTENER_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    trace_id: str
    root_span_id: str
    max_age: _duration_pb2.Duration
    idle: _duration_pb2.Duration
    listener: bool
    subject_token: str
    def __init__(self, name: _Optional[str] = ..., trace_id: _Optional[str] = ..., root_span_id: _Optional[str] = ..., max_age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., idle: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., listener: _Optional[bool] = ..., subject_token: _Optional[str] = ...) -> None: ...

class OpenResponse(_message.Message):
    __slots__ = ("workflow", "handle", "proxy_url", "ca_pem", "otlp_endpoint")
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    PROXY_URL_FIELD_NUMBER: _ClassVar[int]
    CA_PEM_FIELD_NUMBER: _ClassVar[int]
    OTLP_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    workflow: Workflow
    handle: str
    proxy_url: str
    ca_pem: str
    otlp_endpoint: str
    def __init__(self, workflow: _Optional[_Union[Workflow, _Mapping]] = ..., handle: _Optional[str] = ..., proxy_url: _Optional[str] = ..., ca_pem: _Optional[str] = ..., otlp_endpoint: _Optional[str] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("open", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: OpenRequest
    close: bool
    def __init__(self, open: _Optional[_Union[OpenRequest, _Mapping]] = ..., close: _Optional[bool] = ...) -> None: ...

class HoldResponse(_message.Message):
    __slots__ = ("opened", "closed")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    opened: OpenResponse
    closed: CloseResponse
    def __init__(self, opened: _Optional[_Union[OpenResponse, _Mapping]] = ..., closed: _Optional[_Union[CloseResponse, _Mapping]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("workflow_id",)
    WORKFLOW_ID_FIELD_NUMBER: _ClassVar[int]
    workflow_id: str
    def __init__(self, workflow_id: _Optional[str] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("workflow",)
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    workflow: Workflow
    def __init__(self, workflow: _Optional[_Union[Workflow, _Mapping]] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("workflow_id",)
    WORKFLOW_ID_FIELD_NUMBER: _ClassVar[int]
    workflow_id: str
    def __init__(self, workflow_id: _Optional[str] = ...) -> None: ...

class CloseResponse(_message.Message):
    __slots__ = ("workflow_id", "reason", "leases", "dropped_after", "revoked_after", "refused")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKFLOW_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    DROPPED_AFTER_FIELD_NUMBER: _ClassVar[int]
    REVOKED_AFTER_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    workflow_id: str
    reason: str
    leases: _containers.RepeatedCompositeFieldContainer[LeaseEnd]
    dropped_after: _duration_pb2.Duration
    revoked_after: _duration_pb2.Duration
    refused: _containers.ScalarMap[str, int]
    def __init__(self, workflow_id: _Optional[str] = ..., reason: _Optional[str] = ..., leases: _Optional[_Iterable[_Union[LeaseEnd, _Mapping]]] = ..., dropped_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., revoked_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., refused: _Optional[_Mapping[str, int]] = ...) -> None: ...

class LeaseEnd(_message.Message):
    __slots__ = ("lease_id", "tool", "at_issuer", "residual", "token_check", "uses", "detail")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TOOL_FIELD_NUMBER: _ClassVar[int]
    AT_ISSUER_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    TOKEN_CHECK_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    tool: str
    at_issuer: str
    residual: _duration_pb2.Duration
    token_check: str
    uses: int
    detail: str
    def __init__(self, lease_id: _Optional[str] = ..., tool: _Optional[str] = ..., at_issuer: _Optional[str] = ..., residual: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., token_check: _Optional[str] = ..., uses: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("workflows",)
    WORKFLOWS_FIELD_NUMBER: _ClassVar[int]
    workflows: _containers.RepeatedCompositeFieldContainer[Workflow]
    def __init__(self, workflows: _Optional[_Iterable[_Union[Workflow, _Mapping]]] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("workflow",)
    WORKFLOW_FIELD_NUMBER: _ClassVar[int]
    workflow: Workflow
    def __init__(self, workflow: _Optional[_Union[Workflow, _Mapping]] = ...) -> None: ...

class Workflow(_message.Message):
    __slots__ = ("id", "agent", "name", "state", "opened_at", "expires_at", "trace_id", "close_reason", "flows", "leases")
    ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    OPENED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    TRACE_ID_FIELD_NUMBER: _ClassVar[int]
    CLOSE_REASON_FIELD_NUMBER: _ClassVar[int]
    FLOWS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    id: str
    agent: str
    name: str
    state: str
    opened_at: _timestamp_pb2.Timestamp
    expires_at: _timestamp_pb2.Timestamp
    trace_id: str
    close_reason: str
    flows: int
    leases: int
    def __init__(self, id: _Optional[str] = ..., agent: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[str] = ..., opened_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., trace_id: _Optional[str] = ..., close_reason: _Optional[str] = ..., flows: _Optional[int] = ..., leases: _Optional[int] = ...) -> None: ...
