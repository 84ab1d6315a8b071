"""Two demo tools over HTTPS: one asks the token service about each token, one checks signature and expiry by itself."""

import asyncio
import base64
import hashlib
import json
import ssl
import time
from typing import Any, Literal

import aiohttp
from aiohttp import web
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet


def masked(token: str) -> str:
    """Enough of a token to tell two apart, too little to use."""
    return f"{token[:6]}…{token[-4:]} ({len(token)} characters)" if token else ""


class DemoTool:
    """One upstream. `host` names it in certificates; it listens on loopback."""

    def __init__(
        self, host: str, check: Literal["introspection", "offline"], issuer: str, client: tuple[str, str]
    ) -> None:
        self.host = host
        self.audience = client[0]
        self.requests = 0
        self.authorized: list[str] = []
        """Authorization headers that were accepted: the demo replays one, tests compare them."""
        self.headers: list[dict[str, str]] = []
        self.port = 0
        self.streams = 0
        self._check = check
        self._issuer = issuer
        self._auth = {"authorization": "Basic " + base64.b64encode(":".join(client).encode()).decode()}
        self._keys: KeySet | None = None
        self._session: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    async def start(self, tls: ssl.SSLContext | None) -> None:
        """Listens on an ephemeral loopback port."""
        self._session = aiohttp.ClientSession(trust_env=False)
        app = web.Application(client_max_size=64 << 20)
        app.add_routes([web.get("/stream", self._stream), web.route("*", "/{path:.*}", self._any)])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=tls).start()
        self.port = int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Ends the server."""
        if self._session is not None:
            await self._session.close()
        if self._runner is not None:
            await self._runner.cleanup()

    async def accepts(self, authorization: str) -> dict[str, Any] | None:
        """The token's claims when this tool accepts it now."""
        token = authorization.removeprefix("Bearer ")
        if self._session is None or not token or token == authorization:
            return None
        if self._check == "introspection":
            async with self._session.post(
                f"{self._issuer}/introspect", data={"token": token}, headers=self._auth
            ) as answer:
                claims: dict[str, Any] = await answer.json()
            return claims if claims.get("active") else None
        if self._keys is None:
            async with self._session.get(f"{self._issuer}/jwks") as answer:
                self._keys = KeySet.import_key_set(await answer.json())
        try:
            claims = dict(jwt.decode(token, self._keys, algorithms=["ES256"]).claims)
        except (JoseError, ValueError):
            return None
        return claims if claims["exp"] > time.time() and self.audience in claims["aud"] else None

    async def _any(self, request: web.Request) -> web.Response:
        self.requests += 1
        self.headers.append(dict(request.headers))
        authorization = request.headers.get("authorization", "")
        claims = await self.accepts(authorization)
        if claims is None:
            return web.json_response({"error": "invalid_token"}, status=401)
        self.authorized.append(authorization)
        body = await request.read()
        said = {
            "tool": self.host,
            "method": request.method,
            "path": request.path,
            "saw": masked(authorization.removeprefix("Bearer ")),
            "subject": claims["sub"],
            "scope": claims["scope"],
            "body_sha256": hashlib.sha256(body).hexdigest(),
        }
        return web.json_response(text=json.dumps(said) + "\n")  # a terminal's prompt stands on a line of its own

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        authorization = request.headers.get("authorization", "")
        if await self.accepts(authorization) is None:
            return web.json_response({"error": "invalid_token"}, status=401)
        self.authorized.append(authorization)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        self.streams += 1
        try:
            for number in range(100_000):
                await response.write(f"data: {number}\n\n".encode())
                await asyncio.sleep(0.02)
        except ConnectionError:
            pass
        finally:
            self.streams -= 1
        return response
