"""An HTTPS tool that asks Keycloak about each token, with the same eyes as the proof of its death."""

import ssl

import aiohttp
from aiohttp import web

from tests.real.servers import Keycloak


class RealTool:
    def __init__(self, host: str, keycloak: Keycloak, secret: str, checks: bool = True) -> None:
        """`checks`: False for a tool that takes any bearer token, and so needs nothing of Keycloak during its outage."""
        self.host = host
        self._checks = checks
        self.keycloak = keycloak
        self.authorized: list[str] = []
        self._headers = {"authorization": aiohttp.encode_basic_auth("tool-search", secret)}

    async def start(self, tls: ssl.SSLContext) -> None:
        self._session = aiohttp.ClientSession(trust_env=False)
        app = web.Application()
        app.add_routes([web.route("*", "/{path:.*}", self._any)])
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls).start()
        self.port = int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        await self._session.close()
        await self._runner.cleanup()

    async def active(self, token: str) -> bool:
        """Keycloak's own introspection, as the audience's client: the only one that sees `active: true`."""
        url = f"{self.keycloak.issuer}/protocol/openid-connect/token/introspect"
        async with self._session.post(url, data={"token": token}, headers=self._headers) as answer:
            return bool((await answer.json())["active"])

    async def _any(self, request: web.Request) -> web.Response:
        authorization = request.headers.get("authorization", "")
        if self._checks and not await self.active(authorization.removeprefix("Bearer ")):
            return web.json_response({"error": "invalid_token"}, status=401)
        self.authorized.append(authorization)
        return web.json_response({"ok": True})
