"""One real SPIRE and one real Keycloak for the session, and a sidecar for each test."""

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sidecar.app import App, world
from sidecar.config.load import parse
from sidecar.demo.pki import DemoPki
from tests.real.servers import AGENT_ID, BundleServer, Keycloak, Spire
from tests.real.tool import RealTool

POLICY = 'permit(principal == Spanlock::Agent::"demo", action, resource);\n'
CONFIG = """\
spiffe: {{socket: "unix://{spire}"}}
agents: [{{name: demo, spiffe_id: "{agent}", uid: {uid}}}]
issuers: [{{name: keycloak, kind: token_exchange, issuer: "{issuer}"}}]
policy: {{files: [policy.cedar], environment: test}}
listeners: {{explicit: "127.0.0.1:0", reverse: "127.0.0.1:0"}}
otlp: {{grpc: "127.0.0.1:0", http: "127.0.0.1:0"}}
health: "127.0.0.1:0"
limits: {{drain_seconds: 0.2}}
audit: {{file: "{dir}/audit.jsonl"}}
run_dir: "{dir}/run"
tools:
- name: search
  url: https://search.tool.test:{port}
  address: 127.0.0.1
  issuer: keycloak
  audience: tool-search
  scopes: ["search:read"]
  ca_file: {dir}/ca.pem
  token_check: introspection
  introspection: {{client_id: tool-search, secret_file: "{dir}/secret"}}
- name: lenient
  url: https://lenient.tool.test:{lenient_port}
  address: 127.0.0.1
  issuer: keycloak
  audience: tool-search
  scopes: ["search:read"]
  ca_file: {dir}/ca.pem
  introspection: {{client_id: tool-search, secret_file: "{dir}/secret"}}
"""


@pytest.fixture(scope="session")
def spire(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spire]:
    spire = Spire(tmp_path_factory.mktemp("spire"))
    spire.register(os.getuid())
    yield spire
    spire.stop()


@pytest.fixture(scope="session")
def secret() -> str:
    return secrets.token_hex(16)


@pytest.fixture(scope="session")
def keycloak(spire: Spire, secret: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keycloak]:
    bundle = BundleServer(spire)
    keycloak = Keycloak(tmp_path_factory.mktemp("kc"), bundle.url, secret)
    yield keycloak
    keycloak.stop()
    bundle.stop()


class RealStage:
    """What `tests.stage`'s helpers need, with the real servers behind it."""

    def __init__(self, directory: Path, spire: Spire, keycloak: Keycloak, secret: str) -> None:
        self.dir, self.spire, self.keycloak = directory, spire, keycloak
        self.pki = DemoPki()
        self.search = RealTool("search.tool.test", keycloak, secret)
        self.lenient = RealTool("lenient.tool.test", keycloak, secret, checks=False)
        self.secret = secret

    @property
    def agent_socket(self) -> Path:
        return self.dir / "run/agents/demo/agent.sock"

    @property
    def operator_socket(self) -> Path:
        return self.dir / "run/operator/operator.sock"

    async def start(self) -> None:
        for tool in (self.search, self.lenient):
            await tool.start(self.pki.server_context(tool.host))
        (self.dir / "policy.cedar").write_text(POLICY)
        (self.dir / "ca.pem").write_text(self.pki.pem)
        (self.dir / "secret").write_text(self.secret)
        text = CONFIG.format(
            spire=self.spire.socket,
            agent=AGENT_ID,
            uid=os.getuid(),
            issuer=self.keycloak.issuer,
            dir=self.dir,
            port=self.search.port,
            lenient_port=self.lenient.port,
        )
        self.app = App(parse(text, "real"), self.dir / "spanlock.yaml", world())
        await self.app.start()

    async def stop(self) -> None:
        await self.app.stop()
        await self.search.stop()
        await self.lenient.stop()


@pytest.fixture
async def stage(tmp_path: Path, spire: Spire, keycloak: Keycloak, secret: str) -> AsyncIterator[RealStage]:
    stage = RealStage(tmp_path, spire, keycloak, secret)
    await stage.start()
    assert await stage.app.svids.wait_ready(60), stage.app.svids.problem("demo")
    yield stage
    await stage.stop()
