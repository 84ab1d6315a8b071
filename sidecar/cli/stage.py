"""The embedded world: identity, issuer and two tools from `sidecar.demo`, and a real sidecar configured for them."""

import os
import secrets
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sidecar.app import App, World, world
from sidecar.config.load import parse
from sidecar.demo.pki import DemoPki
from sidecar.demo.token_service import DemoTokenService
from sidecar.demo.tools import DemoTool
from sidecar.demo.workload_api import DemoSpire

AGENT_ID = "spiffe://demo.spanlock.test/agent"
POLICY = """\
@id("demo-open") permit(principal == Spanlock::Agent::"demo", action == Spanlock::Action::"workflow.open", resource);
@id("demo-search") @ttl("300") @scopes("search:read")
permit(principal == Spanlock::Agent::"demo", action, resource == Spanlock::Tool::"search");
@id("demo-reports") @ttl("300") @scopes("reports:read")
permit(principal == Spanlock::Agent::"demo", action, resource == Spanlock::Tool::"reports");
@id("no-admin") forbid(principal, action == Spanlock::Action::"http.request", resource)
when { context.path like "/admin*" };
"""
_CONFIG = """\
spiffe: {{socket: "unix://{spire}"}}
agents: [{{name: demo, spiffe_id: "{agent}", uid: {uid}}}]
issuers: [{issuer}]
policy: {{files: [policy.cedar], environment: demo}}
listeners: {{explicit: "127.0.0.1:0", reverse: "127.0.0.1:0"}}
otlp: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0"}}
health: "127.0.0.1:{health}"
limits: {{drain_seconds: 0.2}}
audit: {{file: "{dir}/audit.jsonl"}}
run_dir: "{dir}/run"
tools:
"""
_TOOL = """\
- name: {name}
  url: https://{name}.tool.test:{port}
  address: 127.0.0.1
  issuer: {issuer}
  audience: {audience}
  scopes: ["{scope}"]
  ca_file: {dir}/tools-ca.pem
  token_check: {check}
  introspection: {{client_id: {audience}, secret_file: "{dir}/{audience}.secret"}}
"""


def config_of(directory: Path, *, spire: Path, agent: str, issuer: str, health: int = 0) -> str:
    """spanlock.yaml of a sidecar on loopback for one agent, up to its tools. `issuer`: one entry, in flow style."""
    return _CONFIG.format(dir=directory, spire=spire, agent=agent, uid=os.getuid(), issuer=issuer, health=health)


def tool_entry(directory: Path, *, name: str, port: int, issuer: str, audience: str, scope: str, check: str) -> str:
    """A tool's entry; its CA and its introspection secret are files in `directory`."""
    return _TOOL.format(dir=directory, name=name, port=port, issuer=issuer, audience=audience, scope=scope, check=check)


def _permit(tool: str) -> str:
    return f'permit(principal, action, resource == Spanlock::Tool::"{tool}");\n'


class Servers:
    """Identity, issuer and tools, and the files of a sidecar for them. An async context: gone with its directory after."""

    def __init__(
        self, *, subject: str = "client_credentials", more: str = "", policy_for: Sequence[str] = (), health: int = 0
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="spanlock-demo-")
        self.dir = Path(self._temporary.name)
        self.pki = DemoPki()
        self.spire = DemoSpire([AGENT_ID])
        secret = {name: secrets.token_hex(16) for name in ("tool-search", "tool-reports")}
        audiences = {"tool-search": {"search:read", "search:write"}, "tool-reports": {"reports:read"}}
        self.issuer = DemoTokenService(self.spire.jwks, audiences, secret)
        self._secrets = secret
        self._subject = subject
        self._more = more
        self._policy_for = policy_for
        self._health = health
        self.search: DemoTool
        self.reports: DemoTool

    async def __aenter__(self) -> Self:
        await self.issuer.start()
        self.search = DemoTool(
            "search.tool.test", "introspection", self.issuer.issuer, ("tool-search", self._secrets["tool-search"])
        )
        self.reports = DemoTool(
            "reports.tool.test", "offline", self.issuer.issuer, ("tool-reports", self._secrets["tool-reports"])
        )
        for tool in (self.search, self.reports):
            await tool.start(self.pki.server_context(tool.host))
        await self.spire.start(f"{self.dir}/spire.sock")
        self.write_files()
        return self

    def write_files(self) -> None:
        """The configuration as files, so that `run`, `reload` and other commands read it."""
        (self.dir / "tools-ca.pem").write_text(self.pki.pem)
        (self.dir / "policy.cedar").write_text(POLICY + "".join(_permit(tool) for tool in self._policy_for))
        for name, secret in self._secrets.items():
            path = self.dir / f"{name}.secret"
            path.touch(mode=0o600)
            path.write_text(secret)
        (self.dir / "spanlock.yaml").write_text(self.config_text())

    def config_text(self) -> str:
        """spanlock.yaml of this world."""
        issuer = (
            f'{{name: demo-issuer, kind: token_exchange, issuer: "{self.issuer.issuer}", subject: {self._subject}}}'
        )
        text = config_of(self.dir, spire=self.dir / "spire.sock", agent=AGENT_ID, issuer=issuer, health=self._health)
        for tool, check in ((self.search, "introspection"), (self.reports, "offline")):
            name = tool.host.partition(".")[0]
            text += tool_entry(
                self.dir, name=name, port=tool.port, issuer="demo-issuer", audience=f"tool-{name}", scope=f"{name}:read",
                check=check,
            )  # fmt: skip
        return text + self._more.format(dir=self.dir)

    @property
    def agent_socket(self) -> Path:
        """Where the demo agent opens workflows."""
        return self.dir / "run/agents/demo/agent.sock"

    @property
    def operator_socket(self) -> Path:
        """Where the operator asks."""
        return self.dir / "run/operator/operator.sock"

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.spire.stop()
        for tool in (self.search, self.reports):
            await tool.stop()
        await self.issuer.stop()
        self._temporary.cleanup()


class Stage(Servers):
    """The servers, and a real sidecar on them in this process. `options` are those of `Servers`."""

    def __init__(self, *, around: World | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._around = around
        self.app: App

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        try:
            settings = parse(self.config_text(), "demo", self.dir)
            self.app = App(settings, self.dir / "spanlock.yaml", self._around or world())
            await self.app.start()
        except BaseException:
            await super().__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.app.stop()
        await super().__aexit__(kind, error, trace)
