"""A small HTTP server on one address, for what is not the data plane: OTLP over HTTP, probes and metrics.

Whoever reaches the address can open connections and keep silent, and each takes a file that the data plane needs: they are
bounded, and a new one puts the oldest out, so that a probe or a span still gets in while somebody floods. Where the caller
must be known it is found out before a byte is read, and puts out connections of its own only.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from aiohttp import web

from sidecar.address import host_and_port
from sidecar.errors import CallerError, ConfigError, Reason, SpanlockError

MAX_CONNECTIONS = 256
MAX_OWNED = 16
"""Connections of one owner, where owners are known: an exporter has one."""

_LINGER_SECONDS = 1.0
"""For a refused sender to read its answer: what it sends meanwhile is thrown away."""
_LINGERING = 16
"""Refused ones at one time."""
_BOUNDS: dict[str, Any] = {
    "read_bufsize": 16 * 1024,
    "max_headers": 64,
    "max_field_size": 4096,
    "lingering_time": _LINGER_SECONDS,
}
"""What aiohttp may keep of a connection whose request nobody reads yet; its own defaults come to megabytes."""

Address = tuple[str, int]
Owner = Callable[[Address, Address], int]
"""The uid at the other end of a connection (local, peer). Raises `CallerError`."""


def ends_of(transport: asyncio.BaseTransport) -> tuple[Address, Address]:
    """Its local and its peer's address. Raises `CallerError` (client_gone)."""
    local, peer = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
    if not local or not peer:
        raise CallerError(Reason.CLIENT_GONE, "the connection has ended")
    return local[:2], peer[:2]


def refusal(error: SpanlockError) -> bytes:
    """A whole answer for whoever may not connect."""
    text = f"{error.reason}: {error.detail}\n"
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Type: text/plain\r\nContent-Length: {len(text.encode())}\r\n"
    return f"{head}x-spanlock-reason: {error.reason}\r\nConnection: close\r\n\r\n{text}".encode()


class Site:
    """Serves `routes` on a `HostPort`. `start` listens, `stop` ends it. `key` names the address in the configuration.

    `owner`: only whom it knows may connect, and each has `MAX_OWNED` connections.
    """

    def __init__(
        self,
        routes: list[web.RouteDef],
        address: str,
        key: str,
        max_body: int,
        decompress: bool = True,
        owner: Owner | None = None,
    ) -> None:
        app = web.Application(client_max_size=max_body)
        app.add_routes(routes)
        self._runner = web.AppRunner(app, access_log=None, auto_decompress=decompress, **_BOUNDS)
        self._address = address
        self._key = key
        self._owner = owner
        self._owned: dict[Any, int] = {}
        """Connection to its owner, oldest first."""
        self._refused: dict[asyncio.Transport, None] = {}
        self._listener: asyncio.Server | None = None

    async def start(self) -> int:
        """Returns the port. Raises `ConfigError` when the address is taken."""
        await self._runner.setup()
        host, port = host_and_port(self._address)
        loop = asyncio.get_running_loop()
        try:
            self._listener = await loop.create_server(self._accept, host, port, backlog=128)
        except OSError as error:
            what = f"{self._key}: cannot listen on {self._address}: {error.strerror}"
            raise ConfigError(Reason.CONFIG_INVALID, what) from None
        return int(self._listener.sockets[0].getsockname()[1])

    def _accept(self) -> asyncio.BaseProtocol:
        server: Any = self._runner.server
        if self._owner is not None:
            return _Gate(self._owner, self._admit, self._refused)
        _put_out(server.connections, MAX_CONNECTIONS)
        return server()  # type: ignore[no-any-return]

    def _admit(self, owner: int) -> asyncio.Protocol:
        """The protocol that serves a connection of this owner; its oldest is put out when it has too many."""
        server: Any = self._runner.server
        open_now = server.connections
        self._owned = {connection: self._owned[connection] for connection in open_now if connection in self._owned}
        _put_out([connection for connection, its in self._owned.items() if its == owner], MAX_OWNED)
        connection: asyncio.Protocol = server()
        self._owned[connection] = owner
        return connection

    async def stop(self) -> None:
        """Ends the server and its connections."""
        if self._listener is not None:
            self._listener.close()
        for transport in list(self._refused):
            transport.abort()
        await self._runner.cleanup()


def _put_out(oldest_first: list[Any], most: int) -> None:
    """Makes room for one more."""
    for connection in oldest_first[: max(0, len(oldest_first) + 1 - most)]:
        connection.force_close()


class _Gate(asyncio.Protocol):
    """Finds out whose connection it is and hands it over to `admit`'s protocol, or answers 403 and ends it."""

    def __init__(
        self, owner: Owner, admit: Callable[[int], asyncio.Protocol], refused: dict[asyncio.Transport, None]
    ) -> None:
        self._owner = owner
        self._admit = admit
        self._refused = refused
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        try:
            owner = self._owner(*ends_of(transport))
        except SpanlockError as error:
            self._refuse(transport, error)
            return
        protocol = self._admit(owner)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)

    def _refuse(self, transport: Any, error: SpanlockError) -> None:
        """Ends our side at once, and all of it soon: with what it sent unread, the sender would not see the answer."""
        self._transport = transport
        transport.write(refusal(error))
        transport.write_eof()
        if len(self._refused) >= _LINGERING:
            oldest = next(iter(self._refused))
            del self._refused[oldest]
            oldest.abort()
        self._refused[transport] = None
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._refused.pop(self._transport, None)
