"""One way to an issuer: bounded, no redirects, no environment proxies, verified TLS, JSON objects only."""

import base64
import json
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote_plus

import aiohttp

from sidecar.errors import AnswerLost, IssuerError, Reason
from sidecar.secret import Secret

MAX_ANSWER = 64 * 1024
"""Bytes. A token answer is 2–4 KiB."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `json` is None when the body is not a JSON object."""

    status: int
    json: dict[str, Any] | None


class IssuerHttp:
    """A session to one issuer. Made without I/O; the first call opens it, `aclose` ends it."""

    def __init__(self, name: str, ca_file: str | None, timeout: float) -> None:
        self._name = name
        self._ca_file = ca_file
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            context = ssl.create_default_context()
            if self._ca_file is not None:
                try:
                    context.load_verify_locations(cafile=self._ca_file)
                except (OSError, ssl.SSLError):
                    raise self._unavailable("ca_file cannot be read as PEM") from None
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=context, limit=64),
                timeout=self._timeout,
                trust_env=False,
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    def _unavailable(self, what: str) -> IssuerError:
        return IssuerError(Reason.ISSUER_UNAVAILABLE, f"issuer {self._name}: {what}")

    def _lost(self, what: str) -> AnswerLost:
        return AnswerLost(Reason.ISSUER_UNAVAILABLE, f"issuer {self._name}: {what}")

    async def get(self, url: str) -> Answer:
        """Raises `IssuerError` (issuer_unavailable, issuer_malformed). Nothing is lost with the answer: a GET mints nothing."""
        try:
            return await self._request("GET", url, None, None)
        except AnswerLost as error:
            raise IssuerError(error.reason, error.detail) from None

    async def post(self, url: str, form: dict[str, str], basic: tuple[str, Secret] | None = None) -> Answer:
        """Posts a form. Raises `IssuerError` (issuer_unavailable, issuer_malformed), of it `AnswerLost` once it was sent."""
        return await self._request("POST", url, form, basic)

    async def _request(
        self, method: str, url: str, form: dict[str, str] | None, basic: tuple[str, Secret] | None
    ) -> Answer:
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        if basic is not None:
            headers["authorization"] = _basic(*basic)
        try:
            async with self._open().request(method, url, data=form, headers=headers, allow_redirects=False) as response:
                body = await response.content.read(MAX_ANSWER + 1)
                while body and len(body) <= MAX_ANSWER and (more := await response.content.read(MAX_ANSWER)):
                    body += more
                status = response.status
        except aiohttp.ClientConnectorError:
            raise self._unavailable("cannot be reached") from None
        except TimeoutError:
            raise self._lost("no complete answer in time") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise self._lost(f"the connection broke ({type(error).__name__})") from None
        if len(body) > MAX_ANSWER:
            raise AnswerLost(Reason.ISSUER_MALFORMED, f"issuer {self._name}: the answer is over 64 KiB")
        if 300 <= status < 400:
            raise IssuerError(Reason.ISSUER_MALFORMED, f"issuer {self._name}: redirects are never followed")
        return Answer(status, _object(body))

    async def aclose(self) -> None:
        """Ends the session."""
        if self._session is not None:
            await self._session.close()


def _basic(client: str, secret: Secret) -> str:
    """RFC 6749 section 2.3.1: both parts form-encoded, then Basic."""
    return "Basic " + base64.b64encode(f"{quote_plus(client)}:{quote_plus(secret.reveal())}".encode()).decode()


def _object(body: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
