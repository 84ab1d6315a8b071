"""One real SPIRE and one real Keycloak for the session, and a sidecar for each test."""

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from sidecar.app import App, world
from sidecar.cli.stage import config_of, tool_entry
from sidecar.config.load import parse
from sidecar.demo.pki import DemoPki
from tests.real.servers import AGENT_ID, BundleServer, Keycloak, Spire
from tests.real.tool import RealTool

POLICY = 'permit(principal == Spanlock::Agent::"demo", action, resource);\n'


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
        (self.dir / "tools-ca.pem").write_text(self.pki.pem)
        (self.dir / "tool-search.secret").write_text(self.secret)
        issuer = f'{{name: keycloak, kind: token_exchange, issuer: "{self.keycloak.issuer}"}}'
        text = config_of(self.dir, spire=self.spire.socket, agent=AGENT_ID, issuer=issuer)
        for name, tool in (("search", self.search), ("lenient", self.lenient)):
            check = "introspection" if tool is self.search else "unknown"
            text += tool_entry(
                self.dir,
                name=name,
                port=tool.port,
                issuer="keycloak",
                audience="tool-search",
                scope="search:read",
                check=check,
            )
        self.app = App(parse(text, "real", self.dir), self.dir / "spanlock.yaml", world())
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
