"""The `spiffe:` and `agents:` sections."""

import os

from pydantic import Field, field_validator
from spiffe import SpiffeId
from spiffe.errors import PySpiffeError

from sidecar.address import MAX_SOCKET_PATH, host_and_port, is_literal
from sidecar.model.caller import Agent
from sidecar.section import Name, Section, path_text

_MAX_ID = 2**32 - 2
"""The last uid or gid: the one above it means "leave it as it is" to the kernel."""


class SpiffeConfig(Section):
    """Where the SPIFFE Workload API is."""

    socket: str = Field(
        default_factory=lambda: os.environ.get("SPIFFE_ENDPOINT_SOCKET", "unix:///run/spire/sockets/agent.sock"),
        description="unix:///absolute/path or tcp://IP:PORT. Default: SPIFFE_ENDPOINT_SOCKET, then SPIRE's usual place.",
    )

    @field_validator("socket")
    @classmethod
    def _socket(cls, value: str) -> str:
        if value.startswith("unix:///") and len(os.fsencode(path_text(value))) <= len("unix://") + MAX_SOCKET_PATH:
            return value
        if value.startswith("tcp://") and is_literal(host_and_port(value.removeprefix("tcp://"))[0]):
            return value
        raise ValueError(
            f"write unix:///absolute/path/to/agent.sock, of {MAX_SOCKET_PATH} bytes at most, or tcp://IP:PORT"
        )


class AgentConfig(Section):
    """One AI agent beside this sidecar."""

    name: Name = Field(description="Its socket is RUN_DIR/agents/<name>/agent.sock.")
    spiffe_id: str = Field(description="The identity that the sidecar holds for it.")
    hint: str | None = Field(default=None, max_length=1024, description="Chooses among several SVIDs of that ID.")
    uid: int | None = Field(
        default=None, ge=0, le=_MAX_ID, description="The uid its processes run as. Default: the sidecar's own."
    )
    gid: int | None = Field(
        default=None,
        ge=0,
        le=_MAX_ID,
        description="Group of the agent's socket; the sidecar must be in it, or root. Default: ours.",
    )

    @field_validator("spiffe_id")
    @classmethod
    def _spiffe_id(cls, value: str) -> str:
        try:
            return str(SpiffeId(value))
        except PySpiffeError as error:
            raise ValueError(f"not a SPIFFE ID: {error}") from None

    def build(self) -> Agent:
        """The noun; a missing uid is the sidecar's own (isolation: same-uid)."""
        return Agent(self.name, self.spiffe_id, self.hint, os.getuid() if self.uid is None else self.uid, self.gid)
