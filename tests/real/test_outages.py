"""Outages and changes under traffic, on the real servers: nothing fails that need not, the rest says why, recovery is by itself."""

import asyncio
import os
import signal
from collections.abc import Callable

import aiohttp
import pytest

from sidecar.model.workflow import CloseReason
from sidecar.wire.spanlock.v1 import admin_pb2, admin_pb2_grpc
from tests.real.conftest import RealStage
from tests.real.steps import confirmed, traffic, used
from tests.stage import client, closed, opened, stub, url

pytestmark = [pytest.mark.real, pytest.mark.timeout(420)]


async def until(what: Callable[[], bool], seconds: float = 60) -> None:
    """Real servers have a pace of their own."""
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.05)


async def readiness(stage: RealStage) -> tuple[int, str]:
    health = stage.app.health
    assert health is not None
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{health.port}/readyz") as answer:
        return answer.status, await answer.text()


async def test_spire_agent_killed_and_restarted_under_traffic(stage: RealStage) -> None:
    workflow, other = await opened(stage, listener=True), await opened(stage, listener=True)
    token = await used(stage, workflow.proxy_url)
    async with traffic(stage, other.proxy_url, stage.search) as seen:
        await asyncio.to_thread(stage.spire.kill_agent)
        await seen.some()
        confirmed(await closed(stage, workflow.workflow.id))
        assert not await stage.search.active(token), "revocation outlives the outage: a JWT-SVID was held"
        await seen.some()
        await asyncio.to_thread(stage.spire.restart_agent)
        await until(lambda: stage.app.svids.health()[0]["ok"] is True)
        again = await opened(stage, listener=True)
        await used(stage, again.proxy_url)
        confirmed(await closed(stage, again.workflow.id))
    assert set(seen.counted()) == {"200"}, seen.counted()
    confirmed(await closed(stage, other.workflow.id))


async def test_svid_rotated_under_traffic(stage: RealStage) -> None:
    before = stage.app.svids.expiry("demo")
    workflow = await opened(stage, listener=True)
    async with traffic(stage, workflow.proxy_url, stage.search) as seen:
        await asyncio.to_thread(stage.spire.rotate)
        await until(lambda: stage.app.svids.expiry("demo") != before)
        fresh = await opened(stage, listener=True)
        await used(stage, fresh.proxy_url)
        confirmed(await closed(stage, fresh.workflow.id))
    assert set(seen.counted()) == {"200"}, seen.counted()
    confirmed(await closed(stage, workflow.workflow.id))


async def test_entry_deleted_no_new_credential_and_readiness_says_why(stage: RealStage) -> None:
    held = await opened(stage, listener=True)
    token = await used(stage, held.proxy_url)
    assert (await readiness(stage))[0] == 200
    await asyncio.to_thread(stage.spire.unregister)
    try:
        await until(lambda: stage.app.svids.problem("demo") != "")
        status, why = await readiness(stage)
        assert status == 503 and "no identity issued" in why, why
        fresh = await opened(stage, listener=True)
        async with client(stage, fresh.proxy_url) as agent:
            refused = await agent.get(url(stage.search))
        assert (refused.status_code, refused.headers["x-spanlock-reason"]) == (503, "no_identity")
        assert not (await closed(stage, fresh.workflow.id)).leases
        confirmed(await closed(stage, held.workflow.id))
        assert not await stage.search.active(token), "what is held is revoked all the same"
    finally:
        await asyncio.to_thread(stage.spire.register, os.getuid())
    await until(lambda: stage.app.svids.problem("demo") == "")
    again = await opened(stage, listener=True)
    await used(stage, again.proxy_url)
    confirmed(await closed(stage, again.workflow.id))


async def test_keycloak_frozen_and_thawed_under_traffic(stage: RealStage) -> None:
    workflow, live, fresh = [await opened(stage, listener=True) for _ in range(3)]
    token = await used(stage, workflow.proxy_url)
    async with traffic(stage, live.proxy_url, stage.lenient) as seen:
        os.killpg(stage.keycloak.process.pid, signal.SIGSTOP)
        try:
            noun = stage.app.registry.get(workflow.workflow.id)
            closing = stage.app.registry.close(noun, CloseReason.CLOSED)
            assert not stage.app.broker.leases(workflow=workflow.workflow.id), "dropped here at once, whoever is down"
            assert [str(end.at_issuer) for end in (await closing).ends] == ["failed"]
            async with client(stage, fresh.proxy_url) as agent:
                refused = await agent.get(url(stage.lenient), timeout=30)
            assert (refused.status_code, refused.headers["x-spanlock-reason"]) == (503, "issuer_unavailable")
            await seen.some()
        finally:
            os.killpg(stage.keycloak.process.pid, signal.SIGCONT)
        await until(lambda: stage.app.broker.revoker.backlog == 0)
        assert not await stage.search.active(token), "the revocation was tried until it was done"
        await used(stage, fresh.proxy_url)
    assert set(seen.counted()) == {"200"}, seen.counted()
    for each in (live, fresh):
        await closed(stage, each.workflow.id)


async def test_keycloak_stopped_and_started_under_traffic(stage: RealStage) -> None:
    live, fresh = await opened(stage, listener=True), await opened(stage, listener=True)
    async with traffic(stage, live.proxy_url, stage.lenient) as seen:
        await asyncio.to_thread(stage.keycloak.stop)
        try:
            async with client(stage, fresh.proxy_url) as agent:
                refused = await agent.get(url(stage.lenient), timeout=30)
            assert (refused.status_code, refused.headers["x-spanlock-reason"]) == (503, "issuer_unavailable")
            issuer = next(row for row in stage.app.broker.health() if row["name"] == "issuer keycloak")
            assert issuer["ok"] is False and issuer["last_error"]
            await seen.some()
        finally:
            await asyncio.to_thread(stage.keycloak.start)
        await used(stage, fresh.proxy_url)  # no restart of ours
    assert set(seen.counted()) == {"200"}, seen.counted()
    ends = {end.tool: end.at_issuer for end in (await closed(stage, fresh.workflow.id)).leases}
    assert ends.pop("search") == "confirmed"
    assert set(ends.values()) <= {"mint_unknown"}, "the exchange that the stop broke off: its answer was never seen"
    # Its memory is gone with it: what it says of the old token is no proof, and we do not call it one.
    (end,) = (await closed(stage, live.workflow.id)).leases
    assert end.at_issuer in ("acknowledged", "failed")


@pytest.mark.parametrize("reissue", [True, False])
async def test_operator_revokes(stage: RealStage, reissue: bool) -> None:
    workflow = await opened(stage, listener=True)
    token = await used(stage, workflow.proxy_url)
    async with stub(stage, admin_pb2_grpc.AdminStub, operator=True) as admin:
        report = await admin.Revoke(admin_pb2.RevokeRequest(tool="search", reissue=reissue))
    assert [end.at_issuer for end in report.ends] == ["confirmed"]
    assert not await stage.search.active(token)
    async with client(stage, workflow.proxy_url) as agent:
        after = await agent.get(url(stage.search))
    assert after.status_code == (200 if reissue else 503), after.text
    if reissue:
        assert stage.search.authorized[-1].removeprefix("Bearer ") != token
    else:
        assert after.headers["x-spanlock-reason"] == "lease_gone"
    await closed(stage, workflow.workflow.id)
