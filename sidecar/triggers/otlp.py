"""Ended spans as a trigger: OTLP over gRPC and HTTP (protobuf and JSON). Can only take access away, and only the sender's.

OTLP carries ended spans, late and not surely, and anybody on this machine can send it: so the sender is found by its
connection, and a span closes only a workflow of that same agent. Parsing is bounded; the agent is never delayed.
"""

import json
import zlib
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio
from aiohttp import web
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from sidecar.address import host_and_port
from sidecar.errors import ConfigError, Reason, SpanlockError
from sidecar.model.caller import Caller
from sidecar.site import Site
from sidecar.triggers.config import OtlpConfig

MAX_BODY = 4 * 1024 * 1024
"""Bytes, after decompression too."""

MAX_CALLS = 256
"""Exports under way at one time."""
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BODY),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 2_000),
    ("grpc.max_connection_idle_ms", 60_000),
)
"""Silent connections are put out: each takes a file that the data plane needs."""

FindCaller = Callable[[tuple[str, int], tuple[str, int]], Caller]
SpanEnded = Callable[[str, str, str, bool], None]
"""(agent, trace id, span id, whether its parent is empty); ids in lower-case hex."""
Export = trace_service_pb2.ExportTraceServiceRequest
_PROTOBUF = "application/x-protobuf"


class OtlpReceivers:
    """Both receivers. `start` listens, `stop` ends them."""

    def __init__(self, config: OtlpConfig, find_caller: FindCaller, span_ended: SpanEnded) -> None:
        self._config = config
        self._find_caller = find_caller
        self._span_ended = span_ended
        self._grpc: Any = None
        self._site: Site | None = None
        self.grpc_port = 0
        self.http_port = 0

    async def start(self) -> None:
        """Raises `ConfigError` when an address is taken."""
        if self._config.grpc is not None:
            self._grpc = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
            self._grpc.add_generic_rpc_handlers((_handler(self._export),))
            try:
                self.grpc_port = self._grpc.add_insecure_port(self._config.grpc)
            except RuntimeError:
                raise ConfigError(Reason.CONFIG_INVALID, f"otlp.grpc: cannot listen on {self._config.grpc}") from None
            await self._grpc.start()
        if self._config.http is not None:
            routes = [
                web.post("/v1/traces", self._traces),
                web.post("/v1/metrics", _drop),
                web.post("/v1/logs", _drop),
            ]
            self._site = Site(routes, self._config.http, "otlp.http", max_body=MAX_BODY, decompress=False)
            self.http_port = await self._site.start()

    async def _traces(self, request: web.Request) -> web.Response:
        transport = request.transport
        if transport is None:
            return web.Response(status=400)
        local, peer = transport.get_extra_info("sockname")[:2], transport.get_extra_info("peername")[:2]
        is_json = request.content_type == "application/json"
        if not is_json and request.content_type != _PROTOBUF:
            return web.Response(status=415, text="send application/x-protobuf or application/json")
        try:
            body = _decompress(await request.read(), request.headers.get("content-encoding", "identity"))
            spans = _spans_of_json(body) if is_json else _spans_of(Export.FromString(body))
            self.take(local, peer, spans)
        except SpanlockError as error:
            return web.Response(status=403, text=str(error.reason))
        except (DecodeError, ValueError, RecursionError):
            return web.Response(status=400, text="not a valid OTLP export")
        except zlib.error:
            return web.Response(status=413, text="the body is over 4 MiB or not valid gzip")
        return web.json_response({}) if is_json else web.Response(body=b"", content_type=_PROTOBUF)

    def take(self, local: tuple[str, int], peer: tuple[str, int], spans: list[tuple[str, str, str]]) -> None:
        """Closes what these ended spans close. Raises `CallerError` for an unknown sender."""
        caller = self._find_caller(local, peer)
        for trace_id, span_id, parent in spans[: self._config.max_spans]:
            for agent in caller.agents:
                self._span_ended(agent, trace_id, span_id, not parent)

    async def _export(self, body: bytes, context: Any) -> bytes:
        """OTLP over gRPC. The body is parsed here, so that a malformed one gets its own status."""
        try:
            spans = _spans_of(Export.FromString(body))
            host, port = _peer(context)
            self.take((host, self.grpc_port), (host, port), spans)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a valid OTLP export")
        except (SpanlockError, ValueError):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(Reason.UNKNOWN_CALLER))
        return b""

    async def stop(self) -> None:
        """Ends both receivers."""
        if self._grpc is not None:
            await self._grpc.stop(0)
        if self._site is not None:
            await self._site.stop()


def _handler(export: Any) -> Any:
    """opentelemetry.proto.collector.trace.v1.TraceService, with bytes in and out."""
    service = trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"].full_name
    return grpc.method_handlers_generic_handler(service, {"Export": grpc.unary_unary_rpc_method_handler(export)})


def _peer(context: Any) -> tuple[str, int]:
    """gRPC tells the peer as text, and our own side not at all; on loopback both ends have one address."""
    kind, _, rest = context.peer().partition(":")
    if kind not in ("ipv4", "ipv6"):
        raise ValueError(kind)
    return host_and_port(unquote(rest))


def _spans_of(request: Export) -> list[tuple[str, str, str]]:
    return [
        (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
        if span.end_time_unix_nano
    ]


def _spans_of_json(body: bytes) -> list[tuple[str, str, str]]:
    """OTLP's JSON mapping: ids in hex of either case, 64-bit numbers as text or number, unknown fields ignored."""
    document = json.loads(body)
    found: list[tuple[str, str, str]] = []
    try:
        for resource in document.get("resourceSpans", ()):
            for scope in resource.get("scopeSpans", ()):
                for span in scope.get("spans", ()):
                    if int(span.get("endTimeUnixNano", 0)):
                        found.append(
                            (_hex(span["traceId"], 16), _hex(span["spanId"], 8), _hex(span.get("parentSpanId", ""), 8))
                        )
    except (AttributeError, KeyError, TypeError, OverflowError):
        raise ValueError("not an OTLP export") from None
    return found


def _hex(text: str, size: int) -> str:
    raw = bytes.fromhex(text)
    if text and len(raw) != size:
        raise ValueError("an id of the wrong length")
    return raw.hex()


def _decompress(body: bytes, coding: str) -> bytes:
    if coding == "identity":
        return body
    if coding != "gzip":
        raise ValueError("unknown content-encoding")
    stream = zlib.decompressobj(wbits=31)
    plain = stream.decompress(body, MAX_BODY)
    if not stream.eof:
        raise zlib.error("too long or truncated")
    return plain


async def _drop(_: web.Request) -> web.Response:
    """Metrics and logs are no triggers: taken, so that an exporter with one endpoint for all is not disturbed."""
    return web.Response(body=b"", content_type=_PROTOBUF)
