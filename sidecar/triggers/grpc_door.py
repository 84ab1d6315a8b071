"""OTLP over gRPC: whose connection it is, is found out before gRPC has it, and each uid has a gRPC server of its own.

gRPC accepts whoever comes, keeps memory for every connection and call, and tells the peer only when a call is there: anybody
on the machine could fill it. So TCP ends here, and a known uid's bytes go on to a server on a socket that only we can reach.
That server's limits are that uid's alone, and who calls it needs no asking.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

from sidecar.address import host_and_port
from sidecar.errors import ConfigError, Reason, SpanlockError
from sidecar.site import Owner, ends_of, refusal
from sidecar.telemetry.logging import logger
from sidecar.triggers.spans import MAX_BODY

CONNECTIONS = 16
"""Of one uid: an exporter has one. The next puts the oldest out."""

_CALLS = 32
"""Of one connection, at one time."""
_PIECE = 64 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_BODY),  # after decompression too
    ("grpc.max_concurrent_streams", _CALLS),
    ("grpc.http2.bdp_probe", 0),  # what a call sends unread stays within the first window, 64 KiB
    ("grpc.server_handshake_timeout_ms", 2_000),
    ("grpc.max_connection_idle_ms", 60_000),
)
"""Silent connections are put out: each takes files that the data plane needs."""

Export = Callable[[int, Callable[[], Awaitable[Any]], Any], Awaitable[bytes]]
"""(uid, reads the one message, the call's context) → the answer."""


class GrpcDoor:
    """Listens on `address`; `directory`: ours alone, made if need be. `start` listens, `stop` ends it."""

    def __init__(self, address: str, directory: Path, owner: Owner, export: Export) -> None:
        self._address = address
        self._directory = directory
        self._owner = owner
        self._export = export
        self._listener: asyncio.Server | None = None
        self._servers: dict[int, Any] = {}
        """Made when the uid first comes; only declared ones get so far."""
        self._connected: dict[int, deque[asyncio.StreamWriter]] = {}
        """Oldest first."""
        self._log = logger("otlp")

    async def start(self) -> int:
        """Returns the port. Raises `ConfigError` when the address is taken."""
        host, port = host_and_port(self._address)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._directory.chmod(0o700)
            self._listener = await asyncio.start_server(self._serve, host, port, limit=_PIECE)
        except OSError as error:
            what = f"otlp.grpc: cannot listen on {self._address}: {error.strerror}"
            raise ConfigError(Reason.CONFIG_INVALID, what) from None
        return int(self._listener.sockets[0].getsockname()[1])

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until either side ends it."""
        try:
            uid = self._owner(*ends_of(writer.transport))
        except SpanlockError as error:
            # No HTTP/2: clients show the 403, take it that nobody is here, and try again ever less often. After SETTINGS
            # and GOAWAY they would try again at once, for ever.
            writer.write(refusal(error))
            writer.close()
            return
        connected = self._connected.setdefault(uid, deque())
        if len(connected) >= CONNECTIONS:
            connected.popleft().transport.abort()
        connected.append(writer)
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(await self._server(uid), limit=_PIECE)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(_copy(reader, far_writer))
                ways.create_task(_copy(far_reader, writer))
        except (OSError, RuntimeError) as error:  # gRPC raises the latter when it cannot listen
            self._log.error("otlp_grpc_failed", uid=uid, because=str(error))
        finally:
            if writer in connected:
                connected.remove(writer)
            writer.transport.abort()

    async def _server(self, uid: int) -> Path:
        """The socket of that uid's own server, which is made when it first comes."""
        path = self._directory / f"otlp-{uid}.sock"
        if uid not in self._servers:
            path.unlink(missing_ok=True)
            server = grpc.aio.server(options=_OPTIONS)
            server.add_generic_rpc_handlers((_handler(partial(self._call, uid)),))
            server.add_insecure_port(f"unix:{path}")
            self._servers[uid] = server
            await server.start()
        return path

    async def _call(self, uid: int, _: Any, context: Any) -> bytes:
        return await self._export(uid, context.read, context)

    async def stop(self) -> None:
        """Ends the servers and their connections."""
        if self._listener is not None:
            self._listener.close()
        for connected in self._connected.values():
            for writer in list(connected):
                writer.transport.abort()
        for uid, server in self._servers.items():
            await server.stop(0)
            (self._directory / f"otlp-{uid}.sock").unlink(missing_ok=True)


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Until the source ends; waits for a sink that is full, so that neither side fills us."""
    try:
        while piece := await source.read(_PIECE):
            sink.write(piece)
            await sink.drain()
    except OSError:
        pass  # one of the two has ended, and so does the other
    finally:
        sink.close()


def _handler(call: Any) -> Any:
    """opentelemetry.proto.collector.trace.v1.TraceService, with bytes in and out.

    On the wire one message is a stream of one; declared as a stream, the call is ours before its message is read.
    """
    service = trace_service_pb2.DESCRIPTOR.services_by_name["TraceService"].full_name
    return grpc.method_handlers_generic_handler(service, {"Export": grpc.stream_unary_rpc_method_handler(call)})
