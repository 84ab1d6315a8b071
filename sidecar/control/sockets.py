"""The Unix sockets: one `grpc.aio` server each, whose file permissions are the authentication.

gRPC shows no peer credentials, and the socket's mode follows the umask: directories and modes are set here, explicitly.
"""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sidecar.clock import Clock
from sidecar.control.admin_service import AdminOps, AdminService
from sidecar.control.rescue import refusal
from sidecar.control.run_dir import agent_path, cannot_give, claim, operator_path, too_long
from sidecar.control.serving import HealthService
from sidecar.control.token_exchange_service import TokenExchangeService
from sidecar.control.unreadable import OnRefusal, RefuseUnreadable
from sidecar.control.workflows_service import Doors, WorkflowsService
from sidecar.errors import ConfigError, Reason, SpanlockError
from sidecar.model.caller import Agent
from sidecar.tools.router import Router
from sidecar.wire.spanlock.v1 import (
    admin_pb2_grpc,
    token_exchange_pb2_grpc,
    workflows_pb2_grpc,
)

_MAX_MESSAGE = 64 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 2_000),  # a connection that never speaks is put out
)
SPARE_CALLS = 256
"""Of one socket at one time: Watch, Open, Close and the like, beside a Hold for each workflow that may be open."""
_AGENT = ("spanlock.v1.Workflows", "spanlock.v1.TokenExchange")


class Socket:
    """One server on one socket, for `calls` calls and as many connections.

    `start` listens, `stop` ends it and removes the file, if it is still its own.
    """

    def __init__(
        self,
        path: Path,
        services: tuple[str, ...],
        add: Callable[[Any], None],
        owner: Agent | None,
        serving: Callable[[], bool],
        clock: Clock,
        calls: int,
        on_refusal: OnRefusal = lambda *_: None,
    ) -> None:
        self.path = path
        self._services = services
        self._add = add
        self._owner = owner
        self._serving = serving
        self._clock = clock
        self._calls = calls
        self._on_refusal = on_refusal
        self._server: Any = None
        self._made: tuple[int, int] | None = None
        """Device and inode of the file that we listen on."""

    def refuse_taken(self) -> None:
        """Raises `ConfigError` when somebody answers on the path, or none can be there. Asked of all before one is opened."""
        if why := too_long(self.path):
            raise ConfigError(Reason.CONFIG_INVALID, f"run_dir: {why}; set a shorter run_dir or SPANLOCK_RUN_DIR")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(self.path))
            except BlockingIOError:
                pass  # somebody listens, who is behind with accepting
            except OSError:
                return  # nobody does; whatever else is wrong with the path, `start` says
        raise ConfigError(
            Reason.CONFIG_INVALID,
            f"run_dir: another sidecar answers on {self.path}; stop it, or set another run_dir or SPANLOCK_RUN_DIR",
        )

    async def start(self) -> None:
        """Raises `ConfigError` when the path cannot be used; only a stale socket of a dead sidecar is replaced."""
        self.refuse_taken()
        directory = self.path.parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if self._owner is None:
                claim(directory, 0o700)
            else:
                claim(directory.parent, 0o755)
                claim(directory, 0o755)
            if self.path.exists() and not stat.S_ISSOCK(self.path.lstat().st_mode):
                raise ConfigError(Reason.CONFIG_INVALID, f"{self.path} exists and is not a socket; remove it")
            fresh = self._fresh()
            mask = os.umask(0o177)  # nobody else's, even between its making and `_protect`
            try:
                self._server = self._build(fresh)
            finally:
                os.umask(mask)
            await self._server.start()
            self._made = _identity(fresh)
            fresh.rename(self.path)
            self._protect()
        except OSError as error:
            raise ConfigError(
                Reason.CONFIG_INVALID,
                f"run_dir: cannot listen on {self.path}: {error.strerror}; set run_dir or SPANLOCK_RUN_DIR",
            ) from None

    def _fresh(self) -> Path:
        """Where gRPC binds, until the socket is renamed: at its end gRPC removes what lies where it bound, its own or not.

        As long a name as the real one: a socket's path has 107 bytes at most.
        """
        return self.path.with_suffix(".next")

    def _build(self, path: Path) -> Any:
        options = (*_OPTIONS, ("grpc.max_allowed_incoming_connections", self._calls))
        server = grpc.aio.server(
            interceptors=[RefuseUnreadable(self._on_refusal)], options=options, maximum_concurrent_rpcs=self._calls
        )
        self._add(server)
        health_pb2_grpc.add_HealthServicer_to_server(HealthService(self._serving, self._clock), server)
        names = (*self._services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        server.add_insecure_port(f"unix:{path}")
        return server

    def _protect(self) -> None:
        """0660 for an agent's socket, owned by the agent's uid when we may give it and of its group; 0600 for the operator's.

        The directory stays ours: an agent that could rename in it could lead this chown elsewhere.
        """
        agent = self._owner
        self.path.chmod(0o600 if agent is None else 0o660)
        if agent is not None:
            uid = agent.uid if os.geteuid() == 0 and agent.uid != os.getuid() else -1
            try:
                os.chown(self.path, uid, agent.gid if agent.gid is not None else -1, follow_symlinks=False)
            except PermissionError as error:
                what = cannot_give(agent) or f"agents: {agent.name}: {self.path} cannot be its own: {error.strerror}"
                raise ConfigError(Reason.CONFIG_INVALID, what) from None

    async def stop(self, grace: float) -> None:
        """Ends the server; calls under way get `grace` seconds."""
        if self._server is not None:
            await self._server.stop(grace)
        if self._made is not None and _identity(self.path) == self._made:
            self.path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file; None when there is none."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def agent_socket(
    run_dir: Path, agent: Agent, doors: Doors, router: Callable[[], Router], clock: Clock, most_open: int
) -> Socket:
    """`agents/<name>/agent.sock`: that agent's Workflows and TokenExchange, and nothing else. `most_open`: its workflows."""

    def add(server: Any) -> None:
        workflows_pb2_grpc.add_WorkflowsServicer_to_server(WorkflowsService(agent.name, doors), server)  # type: ignore[no-untyped-call]
        service = TokenExchangeService(agent.name, doors, router)
        token_exchange_pb2_grpc.add_TokenExchangeServicer_to_server(service, server)  # type: ignore[no-untyped-call]

    def serving() -> bool:
        return doors.accepting() and not doors.identity_problem(agent.name)

    def unreadable(rpc: str, error: SpanlockError) -> None:
        doors.refused(refusal(agent.name, rpc, None, error))

    path = agent_path(run_dir, agent.name)
    return Socket(path, _AGENT, add, agent, serving, clock, most_open + SPARE_CALLS, unreadable)


def operator_socket(run_dir: Path, ops: AdminOps, clock: Clock) -> Socket:
    """`operator/operator.sock`: Admin, in a directory that is never mounted beside an agent."""

    def add(server: Any) -> None:
        admin_pb2_grpc.add_AdminServicer_to_server(AdminService(ops), server)  # type: ignore[no-untyped-call]

    return Socket(operator_path(run_dir), ("spanlock.v1.Admin",), add, None, lambda: True, clock, SPARE_CALLS)
