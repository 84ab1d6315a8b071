"""Ended spans as a trigger: OTLP over gRPC and HTTP (protobuf and JSON). Can only take access away, and only the sender's.

OTLP carries ended spans, late and not surely, and anybody on this machine can send it: so the sender is found by its
connection, and a span closes only a workflow of that same agent. Parsing is bounded; the agent is never delayed.
"""

from collections.abc import Callable, Iterable
from typing import Any

import grpc
import grpc.aio
from aiohttp import web
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from sidecar.errors import CallerError, ConfigError, Reason, SpanlockError
from sidecar.model.caller import Caller
from sidecar.site import Site
from sidecar.triggers import spans
from sidecar.triggers.config import OtlpConfig
from sidecar.triggers.spans import MAX_BODY, Span, TooMuch

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
            body = _decoded(await request.read(), request.headers.get("content-encoding", "identity"))
            parse = spans.of_json if is_json else spans.of_protobuf
            self.take(local, peer, parse(body, self._config.max_spans))
        except SpanlockError as error:
            return web.Response(status=403, text=str(error.reason))
        except (ValueError, RecursionError):
            return web.Response(status=400, text="not a valid OTLP export")
        except TooMuch:
            return web.Response(status=413, text="the body is over 4 MiB, of too many parts, or not valid gzip")
        return web.json_response({}) if is_json else web.Response(body=b"", content_type=_PROTOBUF)

    def take(self, local: tuple[str, int], peer: tuple[str, int], found: Iterable[Span | None]) -> None:
        """Closes what these ended spans close. Raises `CallerError` for an unknown sender."""
        ended = [span for span in found if span is not None]
        caller = self._find_caller(local, peer)
        for trace_id, span_id, parent in ended:
            for agent in caller.agents:
                self._span_ended(agent, trace_id, span_id, not parent)

    async def _export(self, body: bytes, context: Any) -> bytes:
        """OTLP over gRPC. The body is parsed here, so that a malformed one gets its own status."""
        try:
            host, port = _peer(context)
            self.take((host, self.grpc_port), (host, port), spans.of_protobuf(body, self._config.max_spans))
        except ValueError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a valid OTLP export")
        except SpanlockError:
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
    host, _, port = rest.rpartition(":")
    if kind not in ("ipv4", "ipv6"):
        raise CallerError(Reason.UNKNOWN_CALLER, f"a peer of kind {kind}")
    return host.replace("%5B", "").replace("%5D", "").strip("[]"), int(port)


def _decoded(body: bytes, coding: str) -> bytes:
    if coding not in ("identity", "gzip"):
        raise ValueError("unknown content-encoding")
    return spans.gunzip(body) if coding == "gzip" else body


async def _drop(_: web.Request) -> web.Response:
    """Metrics and logs are no triggers: taken, so that an exporter with one endpoint for all is not disturbed."""
    return web.Response(body=b"", content_type=_PROTOBUF)
