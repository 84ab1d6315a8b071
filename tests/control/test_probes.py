"""What probes are told."""

import asyncio

import httpx

from tests.stage import ready_stage


async def test_readiness_is_a_status_and_a_reason() -> None:
    """An orchestrator reads the status alone; whoever is woken by it reads why."""
    async with ready_stage() as stage:
        assert stage.app.health is not None
        async with httpx.AsyncClient(trust_env=False, base_url=f"http://127.0.0.1:{stage.app.health.port}") as probe:
            ready = await probe.get("/readyz")
            assert (ready.status_code, ready.json()["ready"]) == (200, True)
            await stage.spire.update([])
            async with asyncio.timeout(10):
                while stage.app.svids.ready:
                    await asyncio.sleep(0)
            waiting = await probe.get("/readyz")
            assert (waiting.status_code, waiting.json()["ready"]) == (503, False)
            (identity,) = [row for row in waiting.json()["dependencies"] if row["name"] == "identity demo"]
            assert not identity["ok"] and "no identity issued" in identity["last_error"]
            assert (await probe.get("/healthz")).status_code == 200, "it lives: a restart would mend nothing"
            stage.app.plane.draining = True
            assert (await probe.get("/readyz")).status_code == 503
