"""The sidecar's own spans: a child of each sampled parent, sent by OTLP/HTTP in batches. Nothing when no collector is set.

No SDK: a span object of it costs 52 µs; this appends a tuple, and encodes in the background.
"""

import secrets
from collections import deque

import aiohttp
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from sidecar.clock import Clock
from sidecar.model.audit import FlowRecord
from sidecar.model.traceparent import TraceParent, parse
from sidecar.telemetry.logging import logger

_QUEUE = 2048
"""Spans kept for the next batch; the oldest are lost beyond it. Precedent: the SDK's batch processor."""
_INTERVAL = 1.0


class Tracer:
    """Started by `run` in a background task; ends with it."""

    def __init__(self, endpoint: str | None, clock: Clock) -> None:
        self._url = endpoint.rstrip("/") + "/v1/traces" if endpoint else None
        self._clock = clock
        self._queue: deque[tuple[FlowRecord, TraceParent]] = deque(maxlen=_QUEUE)
        self._log = logger("tracing")
        self._losing = False

    def flow(self, record: FlowRecord, traceparent: bytes) -> None:
        """Notes a span for the call, if its parent is sampled."""
        if self._url is not None and (parent := parse(traceparent)) is not None and parent.sampled:
            self._queue.append((record, parent))

    async def run(self) -> None:
        """For ever: a batch a second. A collector that is down or refuses costs spans, nothing else."""
        if self._url is None:
            return
        async with aiohttp.ClientSession(trust_env=False, timeout=aiohttp.ClientTimeout(total=5)) as session:
            while True:
                await self._clock.sleep(_INTERVAL)
                if not self._queue:
                    continue
                self._note(await _send(session, self._url, self._batch()))

    def _note(self, problem: str) -> None:
        """Says once that an outage begins, and once that it is over."""
        if problem and not self._losing:
            self._log.warning("spans_lost", error=problem, effect="calls go on, the sidecar's own spans are lost")
        elif self._losing and not problem:
            self._log.info("spans_recovered")
        self._losing = bool(problem)

    def _batch(self) -> bytes:
        request = ExportTraceServiceRequest()
        resource = request.resource_spans.add()
        name = resource.resource.attributes.add()
        name.key, name.value.string_value = "service.name", "spanlock"
        scope = resource.scope_spans.add()
        while self._queue:
            record, parent = self._queue.popleft()
            _fill(scope.spans.add(), record, parent)
        return request.SerializeToString()


async def _send(session: aiohttp.ClientSession, url: str, body: bytes) -> str:
    """What kept the collector from taking the batch; empty when it took it."""
    headers = {"content-type": "application/x-protobuf"}
    try:
        async with session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
            await answer.read()
    except (aiohttp.ClientError, TimeoutError) as error:
        return type(error).__name__
    return "" if answer.status < 300 else f"HTTP {answer.status}"


def _fill(span: Span, record: FlowRecord, parent: TraceParent) -> None:
    span.trace_id, span.parent_span_id = bytes.fromhex(parent.trace_id), bytes.fromhex(parent.parent_id)
    span.span_id = secrets.token_bytes(8)
    span.name = f"{record.method} {record.tool or 'refused'}"
    span.kind = Span.SPAN_KIND_CLIENT
    span.end_time_unix_nano = int(record.time * 1e9)
    span.start_time_unix_nano = int((record.time - record.duration_ms / 1000) * 1e9)
    for key, value in (
        ("http.request.method", record.method), ("spanlock.outcome", record.outcome), ("spanlock.workflow", record.workflow),
        ("spanlock.lease", record.lease), ("spanlock.tool", record.tool),
    ):  # fmt: skip
        attribute = span.attributes.add()
        attribute.key, attribute.value.string_value = key, value
    status = span.attributes.add()
    status.key, status.value.int_value = "http.response.status_code", record.status
    if record.outcome != "ok":
        span.status.code = Status.STATUS_CODE_ERROR
