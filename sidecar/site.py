"""A small HTTP server on one address, for what is not the data plane: OTLP over HTTP, probes and metrics.

Whoever reaches the address can open connections and keep silent, and each takes a file that the data plane needs: they are
bounded, and a new one puts the oldest out, so that a probe or a span still gets in while somebody floods.
"""

import asyncio
from typing import Any

from aiohttp import web

from sidecar.address import host_and_port
from sidecar.errors import ConfigError, Reason

MAX_CONNECTIONS = 256


class Site:
    """Serves `routes` on a `HostPort`. `start` listens, `stop` ends it. `key` names the address in the configuration."""

    def __init__(
        self, routes: list[web.RouteDef], address: str, key: str, max_body: int, decompress: bool = True
    ) -> None:
        app = web.Application(client_max_size=max_body)
        app.add_routes(routes)
        self._runner = web.AppRunner(app, access_log=None, auto_decompress=decompress)
        self._address = address
        self._key = key
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
        oldest_first = server.connections
        for connection in oldest_first[: max(0, len(oldest_first) + 1 - MAX_CONNECTIONS)]:
            connection.force_close()
        return server()  # type: ignore[no-any-return]

    async def stop(self) -> None:
        """Ends the server and its connections."""
        if self._listener is not None:
            self._listener.close()
        await self._runner.cleanup()
