"""Accepts agents' connections: the shared listeners, and one of its own for a workflow that asks."""

import asyncio

from sidecar.address import host_and_port
from sidecar.clock import Clock
from sidecar.errors import CallerError, ConfigError, Reason
from sidecar.model.workflow import Workflow
from sidecar.proxy.destination import Mode
from sidecar.proxy.downstream import Connection
from sidecar.proxy.plane import Plane

_SWEEP_SECONDS = 1.0


class Listeners:
    """Owns every listening socket and open connection of the data plane. `aclose` ends them all."""

    def __init__(self, plane: Plane) -> None:
        self._plane = plane
        self._servers: dict[str, asyncio.Server] = {}
        self.connections: set[Connection] = set()

    async def open(self, address: str, mode: Mode) -> str:
        """Listens on a `LoopbackHostPort`. Returns the address bound. Raises `ConfigError` when it is taken."""
        host, port = host_and_port(address)
        try:
            return await self._listen(mode, mode, host, port, None)
        except OSError as error:
            raise ConfigError(
                Reason.CONFIG_INVALID, f"listeners.{mode}: cannot listen on {address}: {error.strerror}"
            ) from None

    async def open_for(self, workflow: Workflow) -> str:
        """A listener of the workflow's own on an ephemeral port. Returns its proxy URL; `close_for` ends it.

        Raises `CallerError`: too_many_workflows when the machine has no port or file left for it, workflow_closed.
        """
        try:
            address = await self._listen(workflow.id, "explicit", "127.0.0.1", 0, workflow.id)
        except OSError as error:
            what = f"no listener for the workflow: {error.strerror}; raise the limit of open files"
            raise CallerError(Reason.TOO_MANY_WORKFLOWS, what) from None
        if not workflow.is_open:  # it closed meanwhile, and found no listener to end
            self.close_for(workflow.id)
            raise CallerError(Reason.WORKFLOW_CLOSED, "the workflow was closed while it opened")
        return "http://" + address

    async def _listen(self, name: str, mode: Mode, host: str, port: int, workflow: str | None) -> str:
        loop = asyncio.get_running_loop()
        plane, connections = self._plane, self.connections
        server = await loop.create_server(
            lambda: Connection(plane, mode, connections, workflow), host, port, backlog=1024
        )
        self._servers[name] = server
        bound = server.sockets[0].getsockname()
        return f"{bound[0]}:{bound[1]}" if ":" not in bound[0] else f"[{bound[0]}]:{bound[1]}"

    def close_for(self, workflow: str) -> None:
        """Ends a workflow's own listener and its connections. A workflow without one is fine."""
        server = self._servers.pop(workflow, None)
        if server is None:
            return
        server.close()
        for connection in list(self.connections):
            if connection.caller.workflow == workflow and connection.flow is None:
                connection.close()

    def ports(self) -> frozenset[int]:
        """Every port that the data plane listens on."""
        return frozenset(s.getsockname()[1] for server in self._servers.values() for s in server.sockets)

    async def sweep(self, clock: Clock) -> None:
        """For ever: ends what takes too long. One timer for all connections, instead of one each."""
        while True:
            await clock.sleep(_SWEEP_SECONDS)
            now = clock.monotonic()
            for connection in list(self.connections):
                connection.expire(now)
            self._plane.pool.expire(now)

    def stop_accepting(self) -> None:
        """No new connections; the open ones go on."""
        for server in self._servers.values():
            server.close()

    def aclose(self) -> None:
        """Ends everything at once."""
        self.stop_accepting()
        self._servers.clear()
        for connection in list(self.connections):
            connection.abort()
