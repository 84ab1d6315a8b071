"""The demo's evidence: the issuer and the tools, asked over their own protocols by somebody who is no part of the sidecar."""

import base64
import ssl
from types import TracebackType
from typing import Self

import aiohttp

from sidecar.cli.stage import Servers
from sidecar.demo.tools import DemoTool

_SECONDS = 10.0
_FAILURES = (aiohttp.ClientError, TimeoutError, ValueError)


class Proof:
    """An async context: asks as often as wanted, over connections of its own."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._trust = ssl.create_default_context(cadata=servers.pki.pem)
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(trust_env=False, timeout=aiohttp.ClientTimeout(total=_SECONDS))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def active(self, tool: DemoTool, token: str) -> bool | None:
        """RFC 7662 at the issuer, as the tool's own client asks it; None when there is no answer: that proves nothing."""
        secret = (self._servers.dir / f"{tool.audience}.secret").read_text()
        client = "Basic " + base64.b64encode(f"{tool.audience}:{secret}".encode()).decode()
        address = f"{self._servers.issuer.issuer}/introspect"
        try:
            async with self._session.post(
                address, data={"token": token}, headers={"authorization": client}, raise_for_status=True
            ) as answer:
                said = await answer.json()
        except _FAILURES:
            return None
        active = said.get("active")
        return active if isinstance(active, bool) else None

    async def replay(self, tool: DemoTool, token: str) -> int | None:
        """The token as a thief sends it, past the sidecar, to the tool over HTTPS: the status, or None without an answer."""
        address = f"https://127.0.0.1:{tool.port}/v1/items"
        headers = {"authorization": f"Bearer {token}", "host": f"{tool.host}:{tool.port}"}
        try:
            async with self._session.get(
                address, headers=headers, ssl=self._trust, server_hostname=tool.host
            ) as answer:
                return answer.status
        except _FAILURES:
            return None
