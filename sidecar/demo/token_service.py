"""An embedded token service: RFC 8693 exchange with a JWT-SVID client assertion, RFC 7009, RFC 7662, RFC 8414, JWKS."""

import asyncio
import base64
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet

_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_ACCESS = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a type
_JWT = "urn:ietf:params:oauth:token-type:jwt"
_ASSERTIONS = tuple(f"urn:ietf:params:oauth:client-assertion-type:{kind}" for kind in ("jwt-spiffe", "jwt-bearer"))


class _Refused(Exception):
    def __init__(self, error: str, status: int = 400) -> None:
        super().__init__(error)
        self.error, self.status = error, status


@dataclass
class DemoTokenService:
    """`jwks`: the Workload API's keys; `audiences`: each audience and the scopes it knows; `clients` may introspect."""

    jwks: Callable[[], Any]
    audiences: dict[str, set[str]]
    clients: dict[str, str]
    """Client id to secret; a client sees `active: true` only for tokens with itself in `aud`."""
    life: int = 300
    down: bool = False
    gate: asyncio.Event | None = None
    """Set to make token answers wait for it."""
    waiting: int = 0
    """Requests that wait for the gate now."""
    tamper: Callable[[dict[str, Any]], web.Response | dict[str, Any]] | None = None
    """May replace a token answer."""
    minted: int = 0
    revoked: set[str] = field(default_factory=set)
    revocations: int = 0
    issuer: str = ""
    _key: ECKey = field(default_factory=lambda: ECKey.generate_key("P-256", {"kid": "issuer-1", "use": "sig"}))
    _runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> None:
        """Listens on loopback; `issuer` is set."""
        app = web.Application()
        app.add_routes(
            [
                web.get("/.well-known/oauth-authorization-server", self._metadata),
                web.get("/jwks", self._jwks),
                web.post("/token", self._token),
                web.post("/revoke", self._revoke),
                web.post("/introspect", self._introspect),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port).start()
        self.issuer = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Ends the server."""
        if self._runner is not None:
            await self._runner.cleanup()

    def claims_of(self, token: str) -> dict[str, Any]:
        """Verified claims of a token of ours. Raises JoseError."""
        return dict(jwt.decode(token, self._key, algorithms=["ES256"]).claims)

    def active(self, token: str) -> dict[str, Any] | None:
        """The claims of a token that is neither expired nor revoked."""
        try:
            claims = self.claims_of(token)
        except (JoseError, ValueError):
            return None
        return claims if claims["exp"] > time.time() and claims["jti"] not in self.revoked else None

    def public_keys(self) -> dict[str, Any]:
        """What offline tools verify with."""
        return {"keys": [self._key.as_dict(private=False)]}

    # -- endpoints ----------------------------------------------------------------------------------------------

    async def _metadata(self, _: web.Request) -> web.Response:
        base = self.issuer
        return web.json_response(
            {
                "issuer": base,
                "token_endpoint": f"{base}/token",
                "revocation_endpoint": f"{base}/revoke",
                "introspection_endpoint": f"{base}/introspect",
                "jwks_uri": f"{base}/jwks",
                "grant_types_supported": [_EXCHANGE, "client_credentials"],
                "response_types_supported": [],
            }
        )

    async def _jwks(self, _: web.Request) -> web.Response:
        return web.json_response(self.public_keys())

    async def _token(self, request: web.Request) -> web.Response:
        if self.down:
            return web.Response(status=503)
        form = await request.post()
        if self.gate is not None:
            self.waiting += 1
            await self.gate.wait()
            self.waiting -= 1
        try:
            answer = self._grant({k: str(v) for k, v in form.items()})
        except _Refused as refused:
            return web.json_response({"error": refused.error}, status=refused.status)
        if self.tamper is not None:
            tampered = self.tamper(answer)
            return tampered if isinstance(tampered, web.Response) else web.json_response(tampered)
        return web.json_response(answer)

    def _grant(self, form: dict[str, str]) -> dict[str, Any]:
        client = self._authenticate(form)
        scopes = set(form.get("scope", "").split())
        if form.get("grant_type") == "client_credentials":
            return self._mint(
                client, client, sorted(a for a, known in self.audiences.items() if known & scopes), scopes
            )
        if form.get("grant_type") != _EXCHANGE:
            raise _Refused("unsupported_grant_type")
        subject = self._subject(form)
        audience = form.get("audience") or form.get("resource") or ""
        if audience not in self.audiences:
            raise _Refused("invalid_target")
        if not scopes <= self.audiences[audience]:
            raise _Refused("invalid_scope")
        return self._mint(subject, client, [audience], scopes) | {"issued_token_type": _ACCESS}

    def _subject(self, form: dict[str, str]) -> str:
        token = form.get("subject_token", "")
        if form.get("subject_token_type") == _JWT:
            return self._svid(token)
        claims = self.active(token) if form.get("subject_token_type") == _ACCESS else None
        if claims is None:
            raise _Refused("invalid_request")
        return str(claims["sub"])

    def _authenticate(self, form: dict[str, str]) -> str:
        if form.get("client_assertion_type") not in _ASSERTIONS:
            raise _Refused("invalid_client", 401)
        return self._svid(form.get("client_assertion", ""))

    def _svid(self, token: str) -> str:
        try:
            claims = jwt.decode(token, KeySet.import_key_set(self.jwks()), algorithms=["ES256"]).claims
        except (JoseError, ValueError):
            raise _Refused("invalid_client", 401) from None
        audience = claims.get("aud")
        if audience not in (self.issuer, [self.issuer]) or claims.get("exp", 0) <= time.time():
            raise _Refused("invalid_client", 401)
        return str(claims["sub"])

    def _mint(self, subject: str, client: str, audiences: list[str], scopes: set[str]) -> dict[str, Any]:
        now = int(time.time())
        claims = {
            "iss": self.issuer, "sub": subject, "client_id": client, "aud": audiences, "scope": " ".join(sorted(scopes)),
            "iat": now, "exp": now + self.life, "jti": secrets.token_hex(8),
        }  # fmt: skip
        token = jwt.encode(
            {"alg": "ES256", "kid": "issuer-1", "typ": "at+jwt"}, claims, self._key, algorithms=["ES256"]
        )
        self.minted += 1
        return {"access_token": token, "token_type": "Bearer", "expires_in": self.life, "scope": claims["scope"]}

    async def _revoke(self, request: web.Request) -> web.Response:
        if self.down:
            return web.Response(status=503)
        form = await request.post()
        try:
            client = self._authenticate({k: str(v) for k, v in form.items()})
        except _Refused as refused:
            return web.json_response({"error": refused.error}, status=refused.status)
        claims = self.active(str(form.get("token", "")))
        if claims is not None:
            if claims["client_id"] != client:
                return web.json_response({"error": "invalid_client"}, status=400)
            self.revoked.add(claims["jti"])
            self.revocations += 1
        return web.Response(status=200)

    async def _introspect(self, request: web.Request) -> web.Response:
        if self.down:
            return web.Response(status=503)
        form = await request.post()
        client = self._basic(request.headers.get("authorization", ""))
        if client is None:
            try:
                client = self._authenticate({k: str(v) for k, v in form.items()})
            except _Refused:
                return web.json_response({"error": "invalid_client"}, status=401)
        claims = self.active(str(form.get("token", "")))
        if claims is None or client not in claims["aud"]:
            return web.json_response({"active": False})
        return web.json_response({"active": True, **claims})

    def _basic(self, header: str) -> str | None:
        if not header.startswith("Basic "):
            return None
        client, _, secret = base64.b64decode(header[6:]).decode().partition(":")
        return client if secrets.compare_digest(self.clients.get(client, secrets.token_hex(8)), secret) else None
