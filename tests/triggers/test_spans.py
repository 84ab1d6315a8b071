"""Reading OTLP bodies: the same spans as the generated parser's, and no body costs much more than its own bytes."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sidecar.triggers import spans
from sidecar.triggers.spans import MAX_BODY, MAX_MARKS, Span, TooMuch, of_json, of_protobuf

MANY = MAX_BODY // 2 - 64
MOST = 10_000


def field(number: int, value: bytes) -> bytes:
    size, varint = len(value), b""
    while size > 127:
        varint += bytes([size & 127 | 128])
        size >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([size]) + value


ENDED = b"\x41" + b"\1" * 8
BOMBS = {
    "resources": b"\x0a\x00" * MANY,
    "scopes": field(1, b"\x12\x00" * MANY),
    "spans": field(1, field(2, b"\x12\x00" * MANY)),
    "ended spans": field(1, field(2, field(2, ENDED) * (MAX_BODY // 11 - 64))),
    "attributes": field(1, field(2, field(2, b"\x4a\x00" * MANY))),
    "numbers": b"\x08\x00" * MANY,
    "one name": field(1, field(2, field(2, field(5, bytes(MAX_BODY - 64))))),
    "one trace id": field(1, field(2, field(2, ENDED + field(1, bytes(MAX_BODY - 64))))),
}


def ended(found: object) -> list[Span]:
    return [span for span in found if span is not None]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", BOMBS)
def test_a_body_of_tiny_parts_costs_little_and_lets_others_go_on(name: str) -> None:
    body = BOMBS[name]
    tracemalloc.start()
    try:
        steps = sum(span is None for span in of_protobuf(body, MOST))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * MAX_BODY
    assert steps <= MOST * spans._FIELDS_A_SPAN / spans._STEP, "all its parts are not looked at"
    if name in ("resources", "scopes", "attributes", "numbers"):
        assert steps > 100


def test_json_of_too_many_parts_is_not_parsed() -> None:
    body = b'{"resourceSpans":[{"scopeSpans":[{"spans":[' + b",".join([b"{}"] * MAX_MARKS) + b"]}]}]}"
    tracemalloc.start()
    try:
        with pytest.raises(TooMuch):
            list(of_json(body, MOST))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_json_beyond_the_most_spans_is_not_looked_at() -> None:
    one = b'{"traceId":"%s","spanId":"%s","endTimeUnixNano":1}' % (b"ab" * 16, b"cd" * 8)
    body = (
        b'{"resourceSpans":[{"scopeSpans":[{"spans":[' + b",".join([one] * 5 + [b'{"endTimeUnixNano":{}}']) + b"]}]}]}"
    )
    assert len(ended(of_json(body, 5))) == 5
    with pytest.raises(ValueError):
        list(of_json(body, 6))


ids = st.one_of(st.binary(max_size=20), st.binary(min_size=16, max_size=16), st.binary(min_size=8, max_size=8))


@st.composite
def exports(draw: st.DrawFn) -> ExportTraceServiceRequest:
    request = ExportTraceServiceRequest()
    for _ in range(draw(st.integers(0, 2))):
        resource = request.resource_spans.add(schema_url=draw(st.text("aé", max_size=3)))
        resource.resource.attributes.add(key=draw(st.text("aé", max_size=200))).value.int_value = draw(
            st.integers(-5, 1 << 62)
        )
        for _ in range(draw(st.integers(0, 2))):
            scope = resource.scope_spans.add()
            scope.scope.name = draw(st.text("aé", max_size=3))
            for _ in range(draw(st.integers(0, 3))):
                span = scope.spans.add(
                    trace_id=draw(ids), span_id=draw(ids), parent_span_id=draw(st.one_of(st.just(b""), ids)),
                    name=draw(st.text("aé", max_size=5)), kind=3, flags=0x300, start_time_unix_nano=draw(st.integers(0, 1 << 64 - 1)),
                    end_time_unix_nano=draw(st.integers(0, (1 << 64) - 1)),
                )  # fmt: skip
                span.events.add(name=draw(st.text("aé", max_size=5)), time_unix_nano=1)
                span.links.add(trace_id=draw(ids), span_id=draw(ids))
    return request


@given(exports())
def test_the_same_spans_as_the_generated_parser(request: ExportTraceServiceRequest) -> None:
    expected = [
        (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if span.end_time_unix_nano
        and len(span.trace_id) == 16
        and len(span.span_id) == 8
        and len(span.parent_span_id) in (0, 8)
    ]
    assert ended(of_protobuf(request.SerializeToString(), MOST)) == expected


@given(exports(), st.integers(0, 1 << 16), st.binary(max_size=30))
def test_bytes_of_any_kind_are_spans_or_a_value_error(request: ExportTraceServiceRequest, at: int, put: bytes) -> None:
    whole = request.SerializeToString()
    cut = at % (len(whole) + 1)
    try:
        found = ended(of_protobuf(whole[:cut] + put + whole[cut:], MOST))
    except ValueError:
        return
    assert all(len(trace) == 32 and len(span) == 16 and len(parent) in (0, 16) for trace, span, parent in found)
