"""Connections to tools: dialled, verified, kept for the workflow that paid for them.

The key is workflow and tool, and an authority has one tool: no connection is shared across workflows (H12), and the
handshake is finished and verified on a socket of ours before anything is written (L6, L6b). There is no switch to turn
verification off.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable

from sidecar.errors import Reason, SpanlockError, UpstreamError
from sidecar.model.tool import Tool
from sidecar.model.workflow import Workflow
from sidecar.proxy.egress import Resolve, addresses
from sidecar.proxy.outbox import Outbox
from sidecar.proxy.upstream import Upstream
from sidecar.tasks import Background

MAX_IDLE, MAX_IDLE_ALL = 32, 1024
"""Idle connections kept for one workflow and tool, and in all. Precedents: Go keeps 2 a host, nginx upstreams use 32."""
IDLE_SECONDS = 60.0
"""Precedents: nginx and most servers keep an idle connection for 60 to 75 s, Go's client for 90 s."""

Own = Callable[[], frozenset[int]]
"""The ports that this sidecar listens on."""


def _abandon(dialled: "asyncio.Task[Upstream]") -> None:
    if not dialled.cancelled() and dialled.exception() is None:
        dialled.result().abort()


def _socket(address: str, tool: Tool) -> socket.socket:
    try:
        return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        what = f"no connection to tool {tool.name} can be made here: {error.strerror}; raise the limit of open files"
        raise UpstreamError(Reason.UPSTREAM_UNREACHABLE, what) from None


class Pool:
    """Owns idle connections. `drop_workflow` when one closes, `aclose` at the end."""

    def __init__(self, background: Background, outbox: Outbox, resolve: Resolve, own_ports: Own) -> None:
        self._background = background
        self._outbox = outbox
        self._resolve = resolve
        self._own_ports = own_ports
        self._idle: dict[str, dict[str, list[Upstream]]] = {}
        self._idle_count = 0
        self._trust: dict[str | None, ssl.SSLContext] = {}

    def trust(self, ca_file: str | None) -> ssl.SSLContext:
        """One client context per trust set: building one costs 31 ms. Raises `UpstreamError` for an unreadable `ca_file`."""
        context = self._trust.get(ca_file)
        if context is None:
            context = ssl.create_default_context()
            if ca_file is not None:
                try:
                    context.load_verify_locations(cafile=ca_file)
                except (OSError, ssl.SSLError):
                    raise UpstreamError(Reason.UPSTREAM_TLS, f"ca_file {ca_file} cannot be read as PEM") from None
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_alpn_protocols(["http/1.1"])
            self._trust[ca_file] = context
        return context

    def take(self, workflow: Workflow, tool: Tool) -> Upstream | None:
        """An idle verified connection, or None. Never waits."""
        by_tool = self._idle.get(workflow.id)
        if by_tool is None:
            return None
        idle = by_tool.get(tool.name)
        while idle:
            upstream = idle.pop()
            self._idle_count -= 1
            if upstream.alive and upstream.tool is tool:
                return upstream
            upstream.abort()
        return None

    def give(self, upstream: Upstream, workflow: Workflow, now: float) -> None:
        """Takes a connection back after its flow; closes it when it cannot or may not be used again. `now`: monotonic."""
        if not upstream.release():
            return
        if not workflow.is_open:
            upstream.abort()
            return
        idle = self._idle.setdefault(workflow.id, {}).setdefault(upstream.tool.name, [])
        if len(idle) >= MAX_IDLE or self._idle_count >= MAX_IDLE_ALL:
            upstream.abort()
        else:
            upstream.idle_since = now
            idle.append(upstream)
            self._idle_count += 1

    def expire(self, now: float) -> None:
        """Closes what has been idle for too long (called once a second)."""
        for by_tool in self._idle.values():
            for name, idle in by_tool.items():
                # The oldest stand first: the newest are taken and given at the end.
                fresh = next((at for at, u in enumerate(idle) if now - u.idle_since <= IDLE_SECONDS), len(idle))
                for upstream in idle[:fresh]:
                    upstream.abort()
                self._idle_count -= fresh
                by_tool[name] = idle[fresh:] if fresh else idle

    def forget_trust(self) -> None:
        """A reload reads the CA files again."""
        self._trust.clear()

    def drop_workflow(self, workflow: str, tool: str | None = None) -> None:
        """Closes the idle connections of a workflow (to one tool)."""
        by_tool = self._idle.get(workflow, {})
        for name in [tool] if tool is not None else list(by_tool):
            idle = by_tool.pop(name, [])
            self._idle_count -= len(idle)
            for upstream in idle:
                upstream.abort()
        if not by_tool:
            self._idle.pop(workflow, None)

    async def dial(self, workflow: Workflow, tool: Tool) -> Upstream:
        """A new verified connection, in a task of its own (deadlines need one). Raises `UpstreamError`."""
        dialled = self._background.spawn(self._dial(workflow.id, tool), f"dial {tool.name}")
        try:
            return await dialled
        except asyncio.CancelledError:
            dialled.cancel()
            dialled.add_done_callback(_abandon)  # it may come in this very step, and nobody else would close it
            raise

    async def _dial(self, workflow: str, tool: Tool) -> Upstream:
        try:
            async with asyncio.timeout(tool.timeouts.connect):
                error: SpanlockError | None = None
                for address in await addresses(tool, self._resolve):
                    try:
                        return await self._connect(workflow, tool, address)
                    except UpstreamError as failure:
                        error = failure
                raise error or UpstreamError(Reason.DNS_FAILED, f"tool {tool.name} has no address")
        except TimeoutError:
            raise UpstreamError(
                Reason.UPSTREAM_TIMEOUT, f"tool {tool.name} did not connect within {tool.timeouts.connect:g} s"
            ) from None

    async def _connect(self, workflow: str, tool: Tool, address: str) -> Upstream:
        loop = asyncio.get_running_loop()
        sock = _socket(address, tool)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(sock, (address, tool.authority.port))
            self._refuse_self(sock, tool)
            secure = tool.scheme == "https"
            _, upstream = await loop.create_connection(
                lambda: Upstream(self._outbox, workflow, tool, address),
                sock=sock,
                ssl=self.trust(tool.ca_file) if secure else None,
                server_hostname=tool.authority.host if secure else None,
            )
            return upstream
        except ssl.SSLError as error:
            sock.close()
            why = error.verify_message if isinstance(error, ssl.SSLCertVerificationError) else "handshake failed"
            raise UpstreamError(Reason.UPSTREAM_TLS, f"TLS to tool {tool.name}: {why}") from None
        except OSError:
            sock.close()
            raise UpstreamError(
                Reason.UPSTREAM_UNREACHABLE, f"tool {tool.name} at {address} refused or dropped"
            ) from None
        except BaseException:
            sock.close()
            raise

    def _refuse_self(self, sock: socket.socket, tool: Tool) -> None:
        """Our own listeners, known by identity and not by number: both ends have one address and the port is ours (N8)."""
        if sock.getsockname()[0] == sock.getpeername()[0] and tool.authority.port in self._own_ports():
            raise UpstreamError(Reason.ADDRESS_REFUSED, f"tool {tool.name} leads back to this sidecar")

    def aclose(self) -> None:
        """Closes every idle connection."""
        for workflow in list(self._idle):
            self.drop_workflow(workflow)
