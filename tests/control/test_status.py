"""What the operator and the probes are told when something is not as it should be."""

from typing import Any

import httpx
from structlog.testing import capture_logs

from sidecar.cli.stage import Stage
from tests.identity.test_source import until
from tests.stage import ready_stage


async def readiness(stage: Stage) -> tuple[int, dict[str, Any]]:
    """The status of /readyz, and its rows by name."""
    assert stage.app.health is not None
    async with httpx.AsyncClient(trust_env=False) as probe:
        answer = await probe.get(f"http://127.0.0.1:{stage.app.health.port}/readyz")
    return answer.status_code, {row["name"]: row for row in answer.json()["dependencies"]}


async def test_readiness_lists_every_issuer_before_it_is_asked() -> None:
    async with ready_stage() as stage:
        status, rows = await readiness(stage)
        assert status == 200 and rows["issuer demo-issuer"]["ok"] is True
        assert rows["issuer demo-issuer"]["state"] == "not asked yet"


async def test_readiness_names_an_entry_that_is_missing() -> None:
    async with ready_stage() as stage:
        await stage.spire.update([])
        await until(lambda: not stage.app.svids.ready)
        status, rows = await readiness(stage)
        assert status == 503 and rows["spire_agent"]["state"] == "no identity"
        assert "no identity issued" in rows["identity demo"]["last_error"]


async def test_a_refused_reload_stays_in_the_status_until_the_next_good_one() -> None:
    async with ready_stage() as stage:
        config = stage.dir / "spanlock.yaml"
        good, (started, *_) = config.read_text(), configuration(stage)
        assert started == "ok"
        config.write_text(good.replace("audience:", "audiense:"))
        with capture_logs() as said:
            await stage.app.reload()
            state, ok, since, error, effect = configuration(stage)
            assert (state, ok) == ("reload refused", False) and "tools[0].audiense" in error and "last good" in effect
            await stage.app.reload()
            assert configuration(stage)[2] == since, "since the first refusal"
        assert [line["event"] for line in said] == ["reload_refused"] * 2 and stage.app.page.response().ready
        config.write_text(good)
        await stage.app.reload()
        assert configuration(stage)[:2] == ("ok", True)


def configuration(stage: Stage) -> tuple[str, bool, float, str, str]:
    """Its row of `status`."""
    (row,) = [row for row in stage.app.page.response().dependencies if row.name == "configuration"]
    return row.state, row.ok, row.since.ToNanoseconds() / 1e9, row.last_error, row.effect
