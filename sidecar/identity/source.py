"""The SVIDs of the declared agents, always current: one X.509 stream for all, JWT-SVIDs cached for each issuer.

Life with a SPIRE agent: its socket may not be there yet, it says `no identity issued` until an entry reaches it, it
restarts, ends streams cleanly, rotates, and loses entries. While it is merely down, what is held stays good until its own
expiry. When it says that an identity is gone, it is gone at once. Each stream message is the whole truth (redaction).
"""

import asyncio
import json
import random
from base64 import urlsafe_b64decode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sidecar.backoff import delays
from sidecar.clock import Clock
from sidecar.errors import IdentityError, Reason
from sidecar.identity.workload_api import HeldSvid, WorkloadApi
from sidecar.model.caller import Agent
from sidecar.secret import Secret
from sidecar.tasks import Background
from sidecar.telemetry.logging import logger

_FIRST, _CAP = 1.0, 30.0
"""Back-off in seconds. Precedent: go-spiffe's workload API client."""
_SKEW = 5.0
"""Seconds before `exp` at which a JWT-SVID counts as expired: it must still be good when it arrives."""
_REFRESH_EVERY = 1.0
_NAMED = 5
"""SPIFFE IDs that a message names at most."""


class _State(StrEnum):
    """How it stands with the SPIRE agent, in the words of `status`."""

    NEW = "not connected yet"
    UP = "ok"
    NONE = "no identity"
    """It answers, and has no entry for us."""
    DOWN = "down"


@dataclass(slots=True)
class _Cached:
    token: Secret
    spiffe_id: str
    expires_at: float
    """Wall seconds."""
    refresh_at: float
    """Monotonic seconds: half its life."""


class WorkloadSvids:
    """`ports.SvidSource` over the Workload API. `run` and `keep_fresh` are kept running; `aclose` ends the channel."""

    def __init__(
        self,
        api: WorkloadApi,
        agents: Sequence[Agent],
        clock: Clock,
        rng: random.Random,
        needed: Callable[[str], bool],
        background: Background,
    ) -> None:
        self._api = api
        self._agents = {agent.name: agent for agent in agents}
        self._clock = clock
        self._rng = rng
        self._needed = needed
        self._background = background
        self._issued: Sequence[HeldSvid] = ()
        """What the stream said last."""
        self._held: dict[str, HeldSvid] = {}
        self._cache: dict[tuple[str, str], _Cached] = {}
        self._fetching: dict[tuple[str, str], asyncio.Task[Secret]] = {}
        self._lacking: set[str] = set()
        """The agents of which it was said that they have no SVID."""
        self._state = _State.NEW
        self._error = str(_State.NEW)
        self._since = clock.now()
        self._next_try: float | None = None
        self._changed = asyncio.Event()
        self._log = logger("identity")

    # -- ports.SvidSource ---------------------------------------------------------------------------------------

    def require_identity(self, agent: str) -> None:
        """Raises `IdentityError` unless `agent` has an unexpired identity now."""
        held = self._held.get(agent)
        if held is None:
            answers = self._state in (_State.UP, _State.NONE)
            reason = Reason.NO_IDENTITY if answers else Reason.SPIRE_UNAVAILABLE
            raise IdentityError(reason, f"no SVID is held for agent {agent}: {self._error or self._why_none(agent)}")
        if held.expires_at <= self._clock.now():
            raise IdentityError(Reason.SVID_EXPIRED, f"the SVID of agent {agent} has expired")

    def _why_none(self, agent: str) -> str:
        """SPIRE answers, and what it issues is not what this agent is declared to be."""
        declared = self._agents.get(agent)
        if declared is None:
            return "it is declared no more"
        hint = f" with hint {declared.hint}" if declared.hint is not None else ""
        issued = ", ".join(sorted({svid.spiffe_id for svid in self._issued})[:_NAMED]) or "nothing"
        return f"SPIRE does not issue {declared.spiffe_id}{hint} to us; it issues {issued}"

    async def jwt_svid(self, agent: str, audience: str, *, revoking: bool = False) -> Secret:
        """A JWT-SVID of `agent` for `audience`: cached to half its life, then until its expiry if SPIRE is down.

        `revoking`: one that is held will do even when the identity has been withdrawn or has expired, until its own expiry.
        """
        key = (agent, audience)
        cached = self._cache.get(key)
        if cached is not None and not self._usable(agent, cached):
            cached = None
        if revoking and cached is not None and self.problem(agent):
            return cached.token
        self.require_identity(agent)
        if cached is not None and self._clock.monotonic() < cached.refresh_at:
            return cached.token
        try:
            return await asyncio.shield(self._fetch(key))
        except IdentityError as error:
            if cached is not None and (revoking or error.reason is Reason.SPIRE_UNAVAILABLE):
                return cached.token
            raise

    # -- for status and readiness -------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Every declared agent has an unexpired identity."""
        return not any(self.problem(name) for name in self._agents)

    def problem(self, agent: str) -> str:
        """Why `agent` has no usable identity; empty when it has one."""
        try:
            self.require_identity(agent)
        except IdentityError as error:
            return error.detail
        return ""

    def expiry(self, agent: str) -> float | None:
        """Wall seconds at which the held X509-SVID ends; None without one."""
        held = self._held.get(agent)
        return held.expires_at if held is not None else None

    def health(self) -> list[dict[str, object]]:
        """One row for the SPIRE agent."""
        return [
            {
                "name": "spire_agent",
                "ok": self._state is _State.UP,
                "state": str(self._state),
                "since": self._since,
                "last_error": self._error,
                "next_try": self._next_try,
                "effect": self._effect(),
            }
        ]

    def _effect(self) -> str:
        match self._state:
            case _State.UP:
                return ""
            case _State.NONE:
                return "calls fail with no_identity"
            case _ if self._held:
                return "held SVIDs serve until they expire; then calls fail with svid_expired"
            case _:
                return "no SVID is held: calls fail with spire_unavailable"

    async def wait_ready(self, seconds: float) -> bool:
        """Waits until `ready`, at most `seconds`; False when it is not."""
        try:
            async with asyncio.timeout(seconds):
                while not self.ready:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def replace_agents(self, agents: Sequence[Agent]) -> None:
        """A reload changed the declared agents: what the stream said last is theirs from now on.

        The JWT-SVIDs of an agent that is gone stay until they expire, to revoke with.
        """
        self._agents = {agent.name: agent for agent in agents}
        self._assign()

    # -- the stream ---------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever: keeps the stream up."""
        waits = delays(_FIRST, _CAP, self._rng)
        while True:
            answered = False
            try:
                async for svids in self._api.x509_svids():
                    answered = True
                    self._take(svids)
                    waits = delays(_FIRST, _CAP, self._rng)
                if not answered:  # one that ends after a message is of no consequence: it is opened again
                    self._turn(_State.DOWN, f"{self._api.address}: the stream ended without a message")
            except IdentityError as error:
                none = error.reason is Reason.NO_IDENTITY
                self._turn(_State.NONE if none else _State.DOWN, error.detail)
                if none:
                    # SPIRE itself says so: what was held is withdrawn at once. JWT-SVIDs stay until they expire, to
                    # revoke with and for nothing else: everything else asks for the identity first.
                    self._issued = ()
                    self._assign()
            await self._api.reopen()
            wait = next(waits)
            self._next_try = self._clock.now() + wait
            await self._clock.sleep(wait)

    def _take(self, svids: list[HeldSvid]) -> None:
        """The full state: what is not in it is gone."""
        self._issued = svids
        self._next_try = None
        self._turn(_State.UP, "")
        self._assign()

    def _turn(self, state: _State, error: str) -> None:
        """What the SPIRE agent said last, or that it says nothing: logged when it is another state than before."""
        self._error = error
        if state is not self._state:
            self._state, self._since = state, self._clock.now()
            if state is _State.UP:
                self._log.info("spire_agent_up", socket=self._api.address, identities=len(self._issued))
            else:
                event = "no_identity_issued" if state is _State.NONE else "spire_agent_down"
                self._log.warning(event, socket=self._api.address, error=error, effect=self._effect())
        self._changed.set()

    def _assign(self) -> None:
        """Gives each declared agent the SVID that is its own, and says once which one has none."""
        before, self._held = self._held, {}
        for name, agent in self._agents.items():
            fitting = [s for s in self._issued if s.spiffe_id == agent.spiffe_id and agent.hint in (None, s.hint)]
            if fitting:
                self._held[name] = fitting[0]
                if name not in before:
                    self._log.info("identity_held", agent=name, spiffe_id=agent.spiffe_id)
            elif name in before or name not in self._lacking:
                event = "identity_gone" if name in before else "identity_missing"
                self._log.warning(event, agent=name, spiffe_id=agent.spiffe_id, why=self._error or self._why_none(name))
        self._lacking = self._agents.keys() - self._held.keys()
        self._changed.set()

    # -- JWT-SVIDs ----------------------------------------------------------------------------------------------

    def _usable(self, agent: str, cached: _Cached) -> bool:
        """Not expired, and not of an identity that another agent of this name had."""
        declared = self._agents.get(agent)
        its_own = declared is None or declared.spiffe_id == cached.spiffe_id
        return its_own and cached.expires_at - _SKEW > self._clock.now()

    def _fetch(self, key: tuple[str, str]) -> asyncio.Task[Secret]:
        """One fetch at a time for each (agent, audience); whoever asks waits for the same one."""
        task = self._fetching.get(key)
        if task is None:
            spiffe_id = self._agents[key[0]].spiffe_id  # a reload may take the agent away meanwhile
            task = self._fetching[key] = self._background.spawn(self._fetch_once(key, spiffe_id), f"jwt-svid {key[0]}")
            task.add_done_callback(lambda _: self._fetching.pop(key, None))
        return task

    async def _fetch_once(self, key: tuple[str, str], spiffe_id: str) -> Secret:
        _, audience = key
        token = await self._api.jwt_svid(spiffe_id, audience)
        expires_at = _expiry(token, spiffe_id, audience)
        life = expires_at - self._clock.now()
        if life <= _SKEW:
            raise IdentityError(Reason.SVID_EXPIRED, "SPIRE handed out a JWT-SVID that has expired; check the clocks")
        self._cache[key] = _Cached(token, spiffe_id, expires_at, self._clock.monotonic() + life / 2)
        return token

    async def keep_fresh(self) -> None:
        """For ever: one JWT-SVID stays valid per issuer while leases live, so that revocation outlives an outage of SPIRE."""
        while True:
            await self._clock.sleep(_REFRESH_EVERY)
            now = self._clock.monotonic()
            for key, cached in list(self._cache.items()):
                if not self._usable(key[0], cached):
                    self._cache.pop(key, None)
                elif (
                    now >= cached.refresh_at
                    and key[0] in self._held
                    and self._needed(key[0])
                    and self._state is _State.UP
                ):
                    cached.refresh_at = now + 5.0  # not again at once when SPIRE hands out the same one
                    self._fetch(key)

    async def aclose(self) -> None:
        """Ends the channel and forgets everything."""
        self._held.clear()
        self._cache.clear()
        await self._api.aclose()


def _expiry(token: Secret, spiffe_id: str, audience: str) -> float:
    """`exp` of a JWT-SVID that SPIRE handed us for ourselves: subject and audience must be what was asked for.

    The signature is for the issuer to verify; the socket is the authentication here. Raises `IdentityError`.
    """
    try:
        payload = token.reveal().split(".")[1]
        claims = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        audiences = claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]]
        if claims["sub"] != spiffe_id or audiences != [audience]:
            raise ValueError
        return float(claims["exp"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise IdentityError(Reason.NO_IDENTITY, "SPIRE's JWT-SVID is not for this agent and audience") from None
