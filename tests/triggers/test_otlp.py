"""Ended spans as a trigger: whatever is sent, the answer is clear, bounded, and nothing that was held is lost."""

import gzip
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import grpc.aio
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

from sidecar.cli.stage import Stage
from sidecar.triggers.otlp import MAX_BODY
from tests.stage import opened, ready_stage

TRACE, ROOT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with ready_stage() as stage:
        yield stage


def export(
    trace: str = TRACE, span: str = ROOT, parent: str = "", ended: int = 5, count: int = 1
) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    scope = request.resource_spans.add().scope_spans.add()
    for _ in range(count):
        added = scope.spans.add(trace_id=bytes.fromhex(trace), span_id=bytes.fromhex(span), end_time_unix_nano=ended)
        added.parent_span_id = bytes.fromhex(parent)
    return request


async def post(stage: Stage, body: bytes, kind: str = "application/x-protobuf", **headers: str) -> int:
    url = f"http://127.0.0.1:{stage.app.otlp.http_port}/v1/traces"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=io.BytesIO(body), headers={"content-type": kind, **headers}) as answer,
    ):
        return answer.status


def as_json(**span: Any) -> bytes:
    fields = {"traceId": TRACE.upper(), "spanId": ROOT, "endTimeUnixNano": "5", **span}
    return json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [fields]}]}]}).encode()


MALFORMED = {
    "garbage": (b"\xff\xff\xff", "application/x-protobuf", {}),
    "truncated": (export().SerializeToString()[:-3], "application/x-protobuf", {}),
    "no json": (b"{", "application/json", {}),
    "json of another shape": (b"[1]", "application/json", {}),
    "spans of another shape": (b'{"resourceSpans": [3]}', "application/json", {}),
    "ids that are no hex": (as_json(traceId="zz"), "application/json", {}),
    "ids of another length": (as_json(traceId="ab"), "application/json", {}),
    "an end that is infinite": (as_json().replace(b'"5"', b"1e999"), "application/json", {}),
    "an end that is no number": (as_json(endTimeUnixNano={}), "application/json", {}),
    "deep": (b"[" * 100_000, "application/json", {}),
    "an unknown coding": (b"x", "application/x-protobuf", {"content-encoding": "br"}),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_body_is_400_and_loses_nothing(stage: Stage, name: str) -> None:
    workflow = await opened(stage, trace_id=TRACE)
    body, kind, headers = MALFORMED[name]
    assert await post(stage, body, kind, **headers) == 400
    assert stage.app.registry.get(workflow.workflow.id).is_open
    assert await post(stage, export().SerializeToString()) == 200, "the receiver goes on"
    assert stage.app.registry.find(workflow.workflow.id).close_reason == "span_ended"  # type: ignore[union-attr]


async def test_other_types_bombs_and_floods_are_bounded(stage: Stage) -> None:
    assert await post(stage, b"a=b", "application/x-www-form-urlencoded") == 415
    assert await post(stage, gzip.compress(bytes(MAX_BODY + 1)), **{"content-encoding": "gzip"}) == 413
    assert await post(stage, b"not gzip", **{"content-encoding": "gzip"}) == 413
    assert await post(stage, bytes(MAX_BODY + 1)) == 413
    workflow = await opened(stage, trace_id=TRACE)
    flood = export(trace="11" * 16, count=stage.app.settings.otlp.max_spans)
    flood.MergeFrom(export())
    assert await post(stage, flood.SerializeToString()) == 200
    assert stage.app.registry.get(workflow.workflow.id).is_open, "what is beyond the limit is not looked at"


async def test_json_and_gzip_are_understood(stage: Stage) -> None:
    for body, kind, headers in (
        (as_json(), "application/json", {}),
        (gzip.compress(export().SerializeToString()), "application/x-protobuf", {"content-encoding": "gzip"}),
    ):
        workflow = await opened(stage, trace_id=TRACE)
        assert await post(stage, body, kind, **headers) == 200
        assert stage.app.registry.find(workflow.workflow.id).close_reason == "span_ended"  # type: ignore[union-attr]


async def test_only_the_root_closes(stage: Stage) -> None:
    declared = await opened(stage, trace_id=TRACE, root_span_id=ROOT)
    undeclared = await opened(stage, trace_id="22" * 16)
    for spans in (
        export(span="cc" * 8), export(ended=0), export(trace="22" * 16, parent="dd" * 8), export(trace="33" * 16)
    ):  # fmt: skip
        assert await post(stage, spans.SerializeToString()) == 200
    for workflow in (declared, undeclared):
        assert stage.app.registry.get(workflow.workflow.id).is_open
    assert await post(stage, export(parent="ee" * 8).SerializeToString()) == 200
    assert stage.app.registry.find(declared.workflow.id).close_reason == "span_ended", "whatever its parent"  # type: ignore[union-attr]
    for _ in range(2):  # exporters send again after a lost answer
        assert await post(stage, export(trace="22" * 16).SerializeToString()) == 200
    assert stage.app.registry.find(undeclared.workflow.id).close_reason == "span_ended"  # type: ignore[union-attr]


async def test_malformed_and_overlong_grpc_exports_get_a_status_and_lose_nothing(stage: Stage) -> None:
    workflow = await opened(stage, trace_id=TRACE)
    options = [("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{stage.app.otlp.grpc_port}", options=options) as channel:
        send = channel.unary_unary(
            "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        for body, code in (
            (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
            (bytes(MAX_BODY + 1), grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await send(body)
            assert refused.value.code() is code
        assert stage.app.registry.get(workflow.workflow.id).is_open
        await TraceServiceStub(channel).Export(export())  # type: ignore[no-untyped-call]
    assert stage.app.registry.find(workflow.workflow.id).close_reason == "span_ended"  # type: ignore[union-attr]
