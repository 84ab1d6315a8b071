"""Life with a SPIRE agent: late, absent, restarted, rotating, forgetful. A real Workload API over a real socket."""

import asyncio
import base64
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from sidecar.clock import SystemClock
from sidecar.demo.workload_api import DemoSpire
from sidecar.errors import IdentityError, Reason
from sidecar.identity.source import WorkloadSvids
from sidecar.identity.workload_api import HeldSvid, WorkloadApi
from sidecar.model.caller import Agent
from sidecar.secret import Secret
from sidecar.tasks import Background
from tests.fakes.clock import FakeClock

ID = "spiffe://demo.spanlock.test/agent"


class Hasty(SystemClock):
    """The machine's clock, but back-off waits are cut short."""

    offset = 0.0

    def now(self) -> float:
        return super().now() + self.offset

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.02))


@asynccontextmanager
async def source(socket: Path, hint: str | None = None) -> AsyncIterator[tuple[WorkloadSvids, Hasty]]:
    clock = Hasty()
    background = Background(lambda name, error: None)
    svids = WorkloadSvids(
        WorkloadApi(f"unix://{socket}"), [Agent("a", ID, hint)], clock, random.Random(1), lambda agent: True, background
    )
    background.spawn(svids.run(), "run")
    background.spawn(svids.keep_fresh(), "fresh")
    try:
        yield svids, clock
    finally:
        await background.aclose()
        await svids.aclose()


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(15):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_socket_that_appears_later(tmp_path: Path) -> None:
    socket = tmp_path / "s.sock"
    async with source(socket) as (svids, _):
        with pytest.raises(IdentityError) as caught:
            svids.require_identity("a")
        assert caught.value.reason is Reason.SPIRE_UNAVAILABLE and not svids.ready
        spire = DemoSpire([ID])
        await spire.start(str(socket))
        assert await svids.wait_ready(15)
        await spire.stop()


async def test_no_identity_issued_then_issued(tmp_path: Path) -> None:
    spire = DemoSpire([])
    await spire.start(str(tmp_path / "s.sock"))
    async with source(tmp_path / "s.sock") as (svids, _):
        await until(lambda: "no identity issued" in svids.problem("a"))
        await spire.update([ID])
        assert await svids.wait_ready(15)
    await spire.stop()


async def test_an_entry_that_is_deleted_is_gone_at_once(tmp_path: Path) -> None:
    spire = DemoSpire([ID, "spiffe://demo.spanlock.test/other"])
    await spire.start(str(tmp_path / "s.sock"))
    async with source(tmp_path / "s.sock") as (svids, _):
        assert await svids.wait_ready(15)
        await svids.jwt_svid("a", "aud")
        await spire.update(["spiffe://demo.spanlock.test/other"])
        await until(lambda: not svids.ready)
        with pytest.raises(IdentityError) as caught:
            await svids.jwt_svid("a", "aud")
        assert caught.value.reason is Reason.NO_IDENTITY
    await spire.stop()


async def test_an_agent_that_is_down_leaves_what_is_held_until_it_expires(tmp_path: Path) -> None:
    spire = DemoSpire([ID])
    await spire.start(str(tmp_path / "s.sock"))
    async with source(tmp_path / "s.sock") as (svids, clock):
        assert await svids.wait_ready(15)
        held = await svids.jwt_svid("a", "aud")
        await spire.stop()
        await until(lambda: not svids.health()[0]["ok"])
        svids.require_identity("a")
        assert await svids.jwt_svid("a", "aud") == held
        clock.offset = 7200
        with pytest.raises(IdentityError) as caught:
            svids.require_identity("a")
        assert caught.value.reason is Reason.SVID_EXPIRED
        clock.offset = 0
        await spire.start(str(tmp_path / "s.sock"))
        await until(lambda: svids.health()[0]["ok"])
    await spire.stop()


async def test_revocation_outlives_the_x509_svid_while_spire_is_down(tmp_path: Path) -> None:
    """A JWT-SVID that is still good serves to revoke with, and for nothing else."""
    spire = DemoSpire([ID], svid_seconds=600, jwt_seconds=3600)
    await spire.start(str(tmp_path / "s.sock"))
    async with source(tmp_path / "s.sock") as (svids, clock):
        assert await svids.wait_ready(15)
        held = await svids.jwt_svid("a", "aud")
        await spire.stop()
        await until(lambda: not svids.health()[0]["ok"])
        clock.offset = 1200
        with pytest.raises(IdentityError) as caught:
            await svids.jwt_svid("a", "aud")
        assert caught.value.reason is Reason.SVID_EXPIRED
        assert await svids.jwt_svid("a", "aud", revoking=True) == held
        clock.offset = 7200
        with pytest.raises(IdentityError):
            await svids.jwt_svid("a", "aud", revoking=True)


async def test_rotation_and_a_clean_end_of_the_stream(tmp_path: Path) -> None:
    spire = DemoSpire([ID])
    await spire.start(str(tmp_path / "s.sock"))
    async with source(tmp_path / "s.sock") as (svids, _):
        assert await svids.wait_ready(15)
        await spire.update()
        await until(lambda: spire.minted >= 2)
        await spire.end_streams()
        await until(lambda: spire.minted >= 3)
        await until(lambda: svids.health()[0]["ok"])
        assert svids.ready
    await spire.stop()


async def test_jwt_svids_are_fetched_once_and_cached(tmp_path: Path) -> None:
    spire = DemoSpire([ID])
    await spire.start(str(tmp_path / "s.sock"))
    async with source(tmp_path / "s.sock") as (svids, _):
        assert await svids.wait_ready(15)
        tokens = await asyncio.gather(*(svids.jwt_svid("a", "aud") for _ in range(5)))
        assert all(token == tokens[0] for token in tokens) and "eyJ" not in repr(tokens)
        assert await svids.jwt_svid("a", "other") != tokens[0]
    await spire.stop()


@pytest.mark.parametrize(("hint", "is_there"), [(None, True), ("internal", True), ("external", False)])
async def test_a_declared_hint_chooses_among_the_svids_of_one_identity(
    tmp_path: Path, hint: str | None, is_there: bool
) -> None:
    class Hinting(DemoSpire):
        def _x509_response(self) -> Any:
            response = super()._x509_response()
            for svid in response.svids:
                svid.hint = "internal"
            return response

    spire = Hinting([ID])
    await spire.start(str(tmp_path / "s.sock"))
    async with source(tmp_path / "s.sock", hint) as (svids, _):
        await until(lambda: svids.health()[0]["ok"])
        assert svids.ready is is_there
    await spire.stop()


class Scripted(WorkloadApi):
    """A Workload API without a socket: its JWT-SVIDs live for `life` seconds, and say `claims` beside what was asked for."""

    def __init__(self, clock: FakeClock, **claims: Any) -> None:
        super().__init__("unix:///nowhere")
        self.clock, self.claims = clock, claims
        self.life = 100.0
        self.minted = 0
        self.down = False

    async def x509_svids(self) -> AsyncIterator[list[HeldSvid]]:
        yield [HeldSvid(ID, "", self.clock.now() + 3600.0)]
        await asyncio.Event().wait()

    async def jwt_svid(self, spiffe_id: str, audience: str) -> Secret:
        if self.down:
            raise IdentityError(Reason.SPIRE_UNAVAILABLE, "down")
        self.minted += 1
        claims = {
            "sub": spiffe_id,
            "aud": [audience],
            "exp": self.clock.now() + self.life,
            "n": self.minted,
            **self.claims,
        }
        payload = base64.urlsafe_b64encode(json.dumps({k: v for k, v in claims.items() if v is not None}).encode())
        return Secret(f"e30.{payload.decode().rstrip('=')}.x")


@asynccontextmanager
async def scripted(**claims: Any) -> AsyncIterator[tuple[WorkloadSvids, Scripted, FakeClock]]:
    clock = FakeClock()
    api, background = Scripted(clock, **claims), Background(lambda name, error: None)
    svids = WorkloadSvids(api, [Agent("a", ID)], clock, random.Random(1), lambda agent: True, background)
    background.spawn(svids.run(), "run")
    background.spawn(svids.keep_fresh(), "fresh")
    try:
        assert await svids.wait_ready(5)
        yield svids, api, clock
    finally:
        await background.aclose()
        await svids.aclose()


async def test_a_jwt_svid_is_fetched_anew_at_half_its_life_without_being_asked_for() -> None:
    """So that there is always one to revoke with that outlives an outage of SPIRE by half a life at least."""
    async with scripted() as (svids, api, clock):
        first = await svids.jwt_svid("a", "aud")
        await clock.advance(48.0, sleepers=1)
        assert api.minted == 1 and await svids.jwt_svid("a", "aud") == first
        for _ in range(4):
            await clock.advance(1.0, sleepers=1)
        assert api.minted == 2
        api.down = True
        await clock.advance(49.0, sleepers=1)
        assert await svids.jwt_svid("a", "aud", revoking=True) != first, "the first has expired by now"


@pytest.mark.parametrize(
    "claims",
    [{"sub": "spiffe://demo.spanlock.test/other"}, {"sub": None}, {"aud": ["another"]}, {"aud": ["aud", "another"]}, {"aud": None},
     {"aud": []}, {"exp": None}, {"exp": "soon"}],
    ids=str,
)  # fmt: skip
async def test_a_jwt_svid_for_somebody_else_is_shown_to_nobody(claims: dict[str, Any]) -> None:
    async with scripted(**claims) as (svids, _, __):
        with pytest.raises(IdentityError) as caught:
            await svids.jwt_svid("a", "aud")
        assert caught.value.reason is Reason.NO_IDENTITY


async def test_a_reload_gives_each_agent_its_own_identity_at_once(tmp_path: Path) -> None:
    """What the stream said last holds, and a JWT-SVID of the identity that had the name before is no longer used."""
    other = "spiffe://demo.spanlock.test/other"
    spire = DemoSpire([ID, other])
    await spire.start(str(tmp_path / "s.sock"))
    async with source(tmp_path / "s.sock") as (svids, _):
        assert await svids.wait_ready(15)
        before = await svids.jwt_svid("a", "aud")
        svids.replace_agents([Agent("b", other)])
        svids.require_identity("b")
        with pytest.raises(IdentityError):
            svids.require_identity("a")
        assert await svids.jwt_svid("a", "aud", revoking=True) == before, "to take back what it was minted"
        svids.replace_agents([Agent("a", other)])
        svids.require_identity("a")
        assert await svids.jwt_svid("a", "aud") != before
    await spire.stop()


async def test_a_stream_that_ends_during_a_fetch_costs_that_fetch_a_reason(tmp_path: Path) -> None:
    """The channel is reopened under it, which gRPC tells as a cancellation: nobody here was cancelled."""

    class Slow(DemoSpire):
        asked = asyncio.Event()

        async def FetchJWTSVID(self, request: Any, context: Any) -> Any:
            self.asked.set()
            await asyncio.Event().wait()

    spire = Slow([ID])
    await spire.start(str(tmp_path / "s.sock"))
    async with source(tmp_path / "s.sock") as (svids, _):
        assert await svids.wait_ready(15)
        fetch = asyncio.ensure_future(svids.jwt_svid("a", "aud"))
        await spire.asked.wait()
        await spire.end_streams()
        with pytest.raises(IdentityError) as caught:
            await asyncio.wait_for(fetch, 10)
        assert caught.value.reason is Reason.SPIRE_UNAVAILABLE
    await spire.stop()


def events(said: list[Any]) -> list[tuple[str, str]]:
    return [(line["log_level"], line["event"]) for line in said]


async def retried(svids: WorkloadSvids, times: int) -> None:
    """Until it has tried `times` times again, each of which sets the time of the next."""
    for _ in range(times):
        before = svids.health()[0]["next_try"]
        await until(lambda before=before: svids.health()[0]["next_try"] != before)


async def test_a_socket_that_is_not_there_is_said_once_with_its_path_and_so_is_its_coming(tmp_path: Path) -> None:
    socket = tmp_path / "s.sock"
    with capture_logs() as said:
        async with source(socket) as (svids, _):
            await retried(svids, 3)
            (row,) = svids.health()
            assert (row["ok"], row["state"]) == (False, "down") and f"unix://{socket} (No such file" in str(
                row["last_error"]
            )
            assert row["effect"] == "no SVID is held: calls fail with spire_unavailable"
            assert events(said) == [("warning", "spire_agent_down")]
            assert said[0]["socket"] == f"unix://{socket}" and said[0]["error"] == row["last_error"]
            spire = DemoSpire([ID])
            await spire.start(str(socket))
            assert await svids.wait_ready(15)
            await spire.end_streams()
            await until(lambda: spire.minted >= 2)
            assert svids.health()[0]["state"] == "ok"
            await spire.stop()
            await until(lambda: svids.health()[0]["state"] == "down")
            assert (
                svids.health()[0]["effect"] == "held SVIDs serve until they expire; then calls fail with svid_expired"
            )
    assert events(said)[1:] == [("info", "spire_agent_up"), ("info", "identity_held"), ("warning", "spire_agent_down")]


async def test_no_identity_issued_is_a_state_of_its_own_said_once(tmp_path: Path) -> None:
    spire = DemoSpire([])
    await spire.start(str(tmp_path / "s.sock"))
    with capture_logs() as said:
        async with source(tmp_path / "s.sock") as (svids, clock):
            await until(lambda: svids.health()[0]["state"] == "no identity")
            (first,) = svids.health()
            clock.offset = 100
            await retried(svids, 3)
            (row,) = svids.health()
            assert row["since"] == first["since"] and not row["ok"] and "no identity issued" in str(row["last_error"])
            assert row["effect"] == "calls fail with no_identity"
    assert events(said) == [("warning", "no_identity_issued"), ("warning", "identity_missing")]
    assert said[1]["spiffe_id"] == ID
    await spire.stop()


async def test_an_identity_that_is_not_among_those_issued_is_said_and_named(tmp_path: Path) -> None:
    other = "spiffe://demo.spanlock.test/other"
    spire = DemoSpire([other])
    await spire.start(str(tmp_path / "s.sock"))
    with capture_logs() as said:
        async with source(tmp_path / "s.sock") as (svids, _):
            await until(lambda: svids.health()[0]["ok"])
            assert svids.problem("a").endswith(f"SPIRE does not issue {ID} to us; it issues {other}")
            await spire.update([other])
            await until(lambda: spire.minted >= 2)
            await spire.update([ID, other])
            assert await svids.wait_ready(15)
            await spire.update([other])
            await until(lambda: not svids.ready)
    assert events(said) == [
        ("info", "spire_agent_up"), ("warning", "identity_missing"), ("info", "identity_held"), ("warning", "identity_gone")
    ]  # fmt: skip
    assert said[1]["agent"] == "a" and ID in said[1]["why"] and other in said[1]["why"]
    await spire.stop()


async def test_a_file_that_is_no_socket_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "s.sock").write_text("")
    async with source(tmp_path / "s.sock") as (svids, _):
        await until(lambda: "it is not a socket" in svids.problem("a"))
