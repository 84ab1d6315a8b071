"""RFC 8693 token exchange, authenticated by JWT-SVID (RFC 7523, draft-ietf-oauth-spiffe-client-auth), with revocation by
RFC 7009 and look-up by RFC 7662.

Servers that take only access tokens as subject (Keycloak) need two steps: client_credentials for one tool's scopes, then
the exchange. Both tokens are leased and revoked, since revoking the first does not reach the second.
"""

from pathlib import Path
from typing import Any

from sidecar.clock import Clock
from sidecar.credentials.config import TokenExchangeConfig, issuer_url
from sidecar.credentials.exchangers.http import Answer, IssuerHttp
from sidecar.errors import AnswerLost, IssuerError, Reason
from sidecar.model.lease import Credential, IssuerOutcome, RevocationRecord
from sidecar.model.tool import Tool
from sidecar.model.workflow import Workflow
from sidecar.ports import SvidSource
from sidecar.secret import Secret

_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
_ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a type, not a token
_JWT = "urn:ietf:params:oauth:token-type:jwt"
_ENDPOINTS = ("token_endpoint", "revocation_endpoint", "introspection_endpoint")
_ASSERTION = "urn:ietf:params:oauth:client-assertion-type:"

DEFAULT_LIFE = 60.0
"""Seconds of use, when the answer has no expires_in (RFC 6749 only recommends it): short, so that a guess cannot do harm."""
DOUBTFUL_LIFE = 3600.0
"""Seconds for which a token is said to live, and tried to be taken back, when its answer does not say so plausibly."""
LONGEST_LIFE = 400 * 86400.0
"""Seconds. An answer that promises more is nonsense; what is used at most is the tool's `max_ttl` in any case."""


class TokenExchanger:
    """`ports.Exchanger` for one authorization server. `aclose` ends its sessions."""

    def __init__(self, config: TokenExchangeConfig, svids: SvidSource, clock: Clock) -> None:
        self.issuer = config.name
        self.server = config.issuer
        self._config = config
        self._svids = svids
        self._clock = clock
        self._http = IssuerHttp(config.name, config.ca_file, config.timeout)
        # Connections of its own: exchanges that hang must not hold up what takes access away.
        self._revoking = IssuerHttp(config.name, config.ca_file, config.timeout)
        self._endpoints: dict[str, str] | None = None

    # -- exchange -----------------------------------------------------------------------------------------------

    async def exchange(
        self, workflow: Workflow, tool: Tool, scopes: tuple[str, ...], ttl: float, minted: list[RevocationRecord]
    ) -> Credential:
        """One credential for one tool; its records include the first token's when there are two steps."""
        if self._config.subject == "client_credentials":
            form = {"grant_type": "client_credentials", **_scope(scopes)}
            first = await self._token(workflow.agent, form, tool, minted, exchanged=False)
            subject, subject_type = first.value, _ACCESS_TOKEN
        elif self._config.subject == "svid":
            subject, subject_type = await self._svids.jwt_svid(workflow.agent, self._audience), _JWT
        elif workflow.subject_token is not None:
            subject, subject_type = workflow.subject_token, _ACCESS_TOKEN
        else:
            raise IssuerError(
                Reason.ISSUER_REFUSED,
                f"issuer {self.issuer} exchanges the host application's token; give subject_token to Open",
            )
        form = {
            "grant_type": _EXCHANGE,
            "subject_token": subject.reveal(),
            "subject_token_type": subject_type,
            "requested_token_type": _ACCESS_TOKEN,
            **_scope(scopes),
        }
        if tool.audience is not None:
            form["audience"] = tool.audience
        if tool.resource is not None:
            form["resource"] = tool.resource
        return await self._token(workflow.agent, form, tool, minted, exchanged=True)

    async def _token(
        self, agent: str, form: dict[str, str], tool: Tool, minted: list[RevocationRecord], *, exchanged: bool
    ) -> Credential:
        """One token. From the moment that it can be read it is in `minted`, whatever else is wrong with the answer."""
        endpoint = await self._endpoint("token_endpoint")
        if endpoint is None:
            raise IssuerError(Reason.ISSUER_MALFORMED, f"issuer {self.issuer}: its metadata has no token_endpoint")
        answer = await self._http.post(endpoint, form | await self._client(agent))
        _raise_for(self.issuer, answer)
        body, value = _minted(self.issuer, answer.json)
        now = self._clock.now()
        try:
            _check(self.issuer, body, exchanged)
            life = _life(self.issuer, body.get("expires_in"))
        except IssuerError:
            minted.append(self._record(tool, value, now + DOUBTFUL_LIFE, agent))
            raise
        minted.append(self._record(tool, value, now + (life or DOUBTFUL_LIFE), agent))
        expires_at = now + (life or DEFAULT_LIFE)
        granted = tuple(sorted(str(body["scope"]).split())) if isinstance(body.get("scope"), str) else ()
        return Credential(value, now, expires_at, tuple(minted), granted)

    def _record(self, tool: Tool, value: Secret, expires_at: float, agent: str) -> RevocationRecord:
        return RevocationRecord(self.issuer, tool.name, value, expires_at, agent, minted_at=self.server)

    # -- look up and revoke -------------------------------------------------------------------------------------

    async def introspect(self, record: RevocationRecord, tool: Tool) -> bool | None:
        """RFC 7662 with the tool's own client, or ours. None when the server has no such endpoint."""
        endpoint = await self._endpoint("introspection_endpoint")
        if endpoint is None:
            return None
        form = {"token": record.token.reveal(), "token_type_hint": "access_token"}
        basic = None
        if tool.introspection is not None:
            basic = (tool.introspection.client_id, _client_secret(tool.introspection.secret_file))
        else:
            form |= await self._client(record.agent, revoking=True)
        answer = await self._revoking.post(endpoint, form, basic)
        _raise_for(self.issuer, answer)
        active = (answer.json or {}).get("active")
        if not isinstance(active, bool):
            raise IssuerError(Reason.ISSUER_MALFORMED, f"issuer {self.issuer}: introspection without `active`")
        return active

    async def revoke(self, record: RevocationRecord) -> IssuerOutcome:
        """RFC 7009, once. LOCAL_ONLY when the server has no revocation endpoint."""
        endpoint = await self._endpoint("revocation_endpoint")
        if endpoint is None:
            return IssuerOutcome.LOCAL_ONLY
        form = {"token": record.token.reveal(), "token_type_hint": "access_token"}
        answer = await self._revoking.post(endpoint, form | await self._client(record.agent, revoking=True))
        _raise_for(self.issuer, answer)
        return IssuerOutcome.ACKNOWLEDGED

    # -- inside -------------------------------------------------------------------------------------------------

    @property
    def _audience(self) -> str:
        return self._config.assertion_audience or self._config.issuer

    async def _client(self, agent: str, revoking: bool = False) -> dict[str, str]:
        svid = await self._svids.jwt_svid(agent, self._audience, revoking=revoking)
        form = {"client_assertion_type": _ASSERTION + self._config.assertion_type, "client_assertion": svid.reveal()}
        if self._config.client_id is not None:
            form["client_id"] = self._config.client_id
        return form

    async def _endpoint(self, name: str) -> str | None:
        """Explicit configuration, else the server's metadata: read once it answers, then kept."""
        explicit = getattr(self._config, name)
        if explicit is not None:
            return str(explicit)
        if self._config.token_endpoint is not None:
            return None
        if self._endpoints is None:
            self._endpoints = await self._discover()
        return self._endpoints.get(name)

    async def _discover(self) -> dict[str, str]:
        """RFC 8414 (the well-known part goes between host and path), then OpenID Connect; `issuer` must be ours exactly."""
        issuer = self._config.issuer.rstrip("/")
        scheme, _, rest = issuer.partition("://")
        host, slash, path = rest.partition("/")
        candidates = (
            f"{scheme}://{host}/.well-known/oauth-authorization-server{slash}{path}",
            f"{issuer}/.well-known/openid-configuration",
        )
        for url in candidates:
            answer = await self._http.get(url)
            if answer.status == 200 and answer.json is not None:
                if answer.json.get("issuer") != self._config.issuer:
                    raise IssuerError(
                        Reason.ISSUER_MALFORMED, f"issuer {self.issuer}: its metadata names another issuer"
                    )
                return {name: self._usable(name, answer.json[name]) for name in _ENDPOINTS if name in answer.json}
        raise IssuerError(
            Reason.ISSUER_UNAVAILABLE, f"issuer {self.issuer}: no metadata; set token_endpoint explicitly"
        )

    def _usable(self, name: str, url: Any) -> str:
        """A server behind a proxy that it does not know of names itself http: our assertion does not go there."""
        try:
            return issuer_url(str(url))
        except ValueError:
            raise IssuerError(
                Reason.ISSUER_MALFORMED, f"issuer {self.issuer}: the {name} of its metadata is not an https URL"
            ) from None

    async def aclose(self) -> None:
        """Ends the sessions."""
        await self._http.aclose()
        await self._revoking.aclose()


def _scope(scopes: tuple[str, ...]) -> dict[str, str]:
    """An empty scope parameter is an error at some servers: it is left out."""
    return {"scope": " ".join(scopes)} if scopes else {}


def _client_secret(path: str) -> Secret:
    try:
        return Secret(Path(path).read_text(encoding="utf-8").strip())
    except (OSError, UnicodeError):
        raise IssuerError(
            Reason.SECRET_UNAVAILABLE, f"the introspection client's secret_file {path} cannot be read"
        ) from None


def _raise_for(issuer: str, answer: Answer) -> None:
    """The server's own words stay out of the detail, but for the registered error code."""
    if answer.status == 200:
        return
    if answer.status >= 500 or answer.status == 429:
        what = f"issuer {issuer} answered {answer.status}"
        # Only these two say that nothing was done; a gateway's 504 may have a token behind it.
        refused = IssuerError if answer.status in (429, 503) else AnswerLost
        raise refused(Reason.ISSUER_UNAVAILABLE, what)
    code = (answer.json or {}).get("error")
    known = code if isinstance(code, str) and code in _ERRORS else "no registered error code"
    raise IssuerError(Reason.ISSUER_REFUSED, f"issuer {issuer} answered {answer.status}: {known}")


_ERRORS = frozenset(
    ("invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type", "invalid_scope",
     "invalid_target", "access_denied", "unsupported_token_type", "invalid_token")
)  # fmt: skip


def _minted(issuer: str, body: dict[str, Any] | None) -> tuple[dict[str, Any], Secret]:
    """The token of an answer that says that there is one. Raises `AnswerLost` (issuer_malformed) when it cannot be read."""
    value = (body or {}).get("access_token")
    if body is None or not isinstance(value, str) or not value:
        what = "the token answer is not a JSON object" if body is None else "the token answer has no access_token"
        raise AnswerLost(Reason.ISSUER_MALFORMED, f"issuer {issuer}: {what}")
    return body, Secret(value)


def _check(issuer: str, body: dict[str, Any], exchanged: bool) -> None:
    """What RFC 6749 section 5.1 and RFC 8693 section 2.2.1 require, or `IssuerError` (issuer_malformed)."""
    if str(body.get("token_type", "")).lower() != "bearer":
        raise IssuerError(Reason.ISSUER_MALFORMED, f"issuer {issuer}: the token_type is not Bearer")
    if exchanged and body.get("issued_token_type") != _ACCESS_TOKEN:
        raise IssuerError(Reason.ISSUER_MALFORMED, f"issuer {issuer}: the issued_token_type is not an access token")


def _life(issuer: str, expires_in: Any) -> float | None:
    """Seconds; None when the server does not say. Some write the number as a string."""
    if expires_in is None:
        return None
    if isinstance(expires_in, str) and expires_in.isdecimal() and len(expires_in) < 16:
        expires_in = int(expires_in)
    if isinstance(expires_in, bool) or not isinstance(expires_in, int | float) or not 0 < expires_in <= LONGEST_LIFE:
        raise IssuerError(Reason.ISSUER_MALFORMED, f"issuer {issuer}: expires_in is not a plausible number")
    return float(expires_in)
