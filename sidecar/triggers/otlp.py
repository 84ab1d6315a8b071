"""Ended spans as a trigger: OTLP over gRPC and HTTP (protobuf and JSON). Can only take access away, and only the sender's.

OTLP carries ended spans, late and not surely, and anybody on this machine can send it: so the sender is found by its
connection before a byte of a body is read, and a span closes only a workflow of that same agent. A uid has its own
connections, its own turns and a deadline for each body (`turns.py`, `site.py`, `grpc_door.py`): what it floods is its own.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from aiohttp import web

from sidecar.clock import Clock
from sidecar.errors import CallerError, Reason, SpanlockError
from sidecar.model.caller import Caller
from sidecar.site import Site
from sidecar.triggers import spans
from sidecar.triggers.config import OtlpConfig
from sidecar.triggers.grpc_door import GrpcDoor
from sidecar.triggers.spans import MAX_BODY, Span, TooMuch
from sidecar.triggers.turns import Turns

BODY_SECONDS = 10.0
"""For a body to arrive and to be looked at; senders are on this machine."""

FindCaller = Callable[[tuple[str, int], tuple[str, int]], Caller]
FindAgents = Callable[[int], Caller]
"""The agents of a uid, as declared now. Raises `CallerError` (unknown_caller)."""
SpanEnded = Callable[[str, str, str, bool], None]
"""(agent, trace id, span id, whether its parent is empty); ids in lower-case hex."""
_PAUSE_EVERY = 500
"""Spans taken in one step of the loop."""
_PROTOBUF = "application/x-protobuf"
_STATUS = {Reason.TOO_MANY_CONNECTIONS: 429, Reason.REQUEST_TIMEOUT: 408}
_CODE = {
    Reason.TOO_MANY_CONNECTIONS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.REQUEST_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""All others are a caller that may not: 403, PERMISSION_DENIED."""


class OtlpReceivers:
    """Both receivers. `start` listens, `stop` ends them. `private`: a directory for sockets that nobody else may reach."""

    def __init__(
        self,
        config: OtlpConfig,
        find_caller: FindCaller,
        by_uid: FindAgents,
        span_ended: SpanEnded,
        clock: Clock,
        private: Path,
    ) -> None:
        self._config = config
        self._find_caller = find_caller
        self._by_uid = by_uid
        self._span_ended = span_ended
        self._clock = clock
        self._private = private
        self._turns = Turns()
        self._grpc: GrpcDoor | None = None
        self._site: Site | None = None
        self.grpc_port = 0
        self.http_port = 0

    async def start(self) -> None:
        """Raises `ConfigError` when an address is taken."""
        if self._config.grpc is not None:
            self._grpc = GrpcDoor(self._config.grpc, self._private, self._uid, self._export)
            self.grpc_port = await self._grpc.start()
        if self._config.http is not None:
            routes = [
                web.post("/v1/traces", self._traces),
                web.post("/v1/metrics", self._drop),
                web.post("/v1/logs", self._drop),
            ]
            self._site = Site(
                routes, self._config.http, "otlp.http", max_body=MAX_BODY, decompress=False, owner=self._uid
            )
            self.http_port = await self._site.start()

    def _uid(self, local: tuple[str, int], peer: tuple[str, int]) -> int:
        return self._find_caller(local, peer).uid

    async def _traces(self, request: web.Request) -> web.Response:
        is_json = request.content_type == "application/json"
        try:
            caller = self._sender(request)
            if not is_json and request.content_type != _PROTOBUF:
                return _no(415, "send application/x-protobuf or application/json")
            async with self._turns.of(caller.uid), _deadline():
                body = await _decoded(await _body(request), request.headers.get("content-encoding", "identity"))
                await self._take(caller, spans.of_json if is_json else spans.of_protobuf, body)
        except SpanlockError as error:
            return _no(_STATUS.get(error.reason, 403), f"{error.reason}: {error.detail}")
        except TooMuch:
            return _no(413, "the body is over 4 MiB, of too many parts, or not valid gzip")
        except (ValueError, RecursionError):
            return _no(400, "not a valid OTLP export")
        return web.json_response({}) if is_json else web.Response(body=b"", content_type=_PROTOBUF)

    async def _drop(self, request: web.Request) -> web.Response:
        """Metrics and logs are no triggers: taken, so that an exporter with one endpoint for all is not disturbed."""
        try:
            self._sender(request)
            async with _deadline():
                async for _ in _pieces(request):
                    pass
        except SpanlockError as error:
            return _no(_STATUS.get(error.reason, 403), f"{error.reason}: {error.detail}")
        except TooMuch:
            return _no(413, "the body is over 4 MiB")
        except ValueError:
            return _no(400, "the body broke off")
        return web.Response(body=b"", content_type=_PROTOBUF)

    def _sender(self, request: web.Request) -> Caller:
        """Asked of the kernel anew: a reload may have changed whose uid it is. Raises `CallerError`, `TooMuch`."""
        transport = request.transport
        if transport is None:
            raise CallerError(Reason.CLIENT_GONE, "the connection has ended")
        caller = self._find_caller(transport.get_extra_info("sockname")[:2], transport.get_extra_info("peername")[:2])
        if (request.content_length or 0) > MAX_BODY:
            raise TooMuch
        return caller

    async def _export(self, uid: int, read: Callable[[], Any], context: Any) -> bytes:
        """OTLP over gRPC. The body is read and looked at here, so that a malformed one gets its own status."""
        try:
            caller = self._by_uid(uid)
            async with self._turns.of(uid), _deadline():
                body = await read()
                await self._take(caller, spans.of_protobuf, body if isinstance(body, bytes) else b"")
        except SpanlockError as error:
            code = _CODE.get(error.reason, grpc.StatusCode.PERMISSION_DENIED)
            await context.abort(code, f"{error.reason}: {error.detail}")
        except ValueError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "not a valid OTLP export")
        return b""

    async def _take(self, caller: Caller, parse: Callable[[bytes, int], Iterator[Span | None]], body: bytes) -> None:
        """Closes what the spans in `body` close; nothing when it is malformed. Others go on meanwhile."""
        ended: list[Span] = []
        for span in parse(body, self._config.max_spans):
            if span is None:
                await self._clock.sleep(0)
            else:
                ended.append(span)
        for count, (trace_id, span_id, parent) in enumerate(ended, start=1):
            for agent in caller.agents:
                self._span_ended(agent, trace_id, span_id, not parent)
            if count % _PAUSE_EVERY == 0:
                await self._clock.sleep(0)

    async def stop(self) -> None:
        """Ends both receivers."""
        if self._grpc is not None:
            await self._grpc.stop()
        if self._site is not None:
            await self._site.stop()


@asynccontextmanager
async def _deadline() -> AsyncIterator[None]:
    """Raises `CallerError` (request_timeout)."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            yield
    except TimeoutError:
        raise CallerError(Reason.REQUEST_TIMEOUT, f"the body was not there within {BODY_SECONDS:g} seconds") from None


def _no(status: int, why: str) -> web.Response:
    """A refusal; what the sender still has to send is not waited for."""
    refusal = web.Response(status=status, text=why, headers={"Retry-After": "1"} if status == 429 else None)
    refusal.force_close()
    return refusal


async def _decoded(body: bytes, coding: str) -> bytes:
    """In a thread: zlib lets the loop go on. Raises `TooMuch`, `ValueError`."""
    if coding == "identity":
        return body
    if coding != "gzip":
        raise ValueError("unknown content-encoding")
    return await asyncio.to_thread(spans.gunzip, body)


async def _pieces(request: web.Request) -> AsyncIterator[bytes]:
    """What is sent, as it comes. Raises `TooMuch`, and `ValueError` when it ends before its end."""
    size = 0
    try:
        async for piece in request.content.iter_any():
            size += len(piece)
            if size > MAX_BODY:
                raise TooMuch
            yield piece
    except (ConnectionError, web.RequestPayloadError):
        raise ValueError("the body broke off") from None


async def _body(request: web.Request) -> bytes:
    """All of it. What has come of one that breaks off is let go at once: aiohttp keeps the error, and so its frames, longer."""
    body = bytearray()
    try:
        async for piece in _pieces(request):
            body += piece
        return bytes(body)
    finally:
        body.clear()
