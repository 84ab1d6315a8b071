"""What Prometheus is told: counts by tool and outcome, ends by outcome, and times only where there were any."""

from prometheus_client.parser import text_string_to_metric_families

from sidecar.app import App
from sidecar.model.lease import CloseReport
from sidecar.model.workflow import CloseReason, Workflow, WorkflowState
from sidecar.secret import Secret
from tests.stage import client, closed, opened, ready_stage, url


def told(app: App) -> dict[tuple[str, ...], float]:
    """Sample name and sorted label values to the value."""
    families = text_string_to_metric_families(app.metrics.exposition().decode())
    return {(s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples}


async def test_calls_leases_and_ends_are_counted() -> None:
    async with ready_stage() as stage:
        idle, workflow = await opened(stage), await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            assert (await agent.get(url(stage.search))).status_code == 200
            assert (await agent.get(url(stage.search, "/a//b"))).status_code == 400
        await closed(stage, workflow.workflow.id)
        await closed(stage, idle.workflow.id)
        seen = told(stage.app)
        assert seen["spanlock_flows_total", "ok", "search"] == 1
        assert seen["spanlock_flow_seconds_count", "search"] == 1 and seen["spanlock_flow_seconds_sum", "search"] > 0
        assert seen["spanlock_flows_total", "", "ambiguous_path"] == 1
        assert seen["spanlock_lease_events_total", "issued", "search"] == 1
        assert seen["spanlock_revocations_total", "confirmed", "search"] == 1
        assert seen["spanlock_workflow_closes_total", "closed"] == 2
        assert seen["spanlock_close_to_dropped_seconds_count",] == 2
        assert seen["spanlock_close_to_revoked_seconds_count",] == 1, "a workflow without a lease tells no issuer"


async def test_what_a_crash_closed_has_no_times() -> None:
    async with ready_stage() as stage:
        crashed = Workflow(
            id="wf_1", agent="demo", name="n", handle=Secret(""), opened_at=0.0, deadline=0.0, idle_seconds=0.0,
            state=WorkflowState.CLOSED, close_reason=CloseReason.SIDECAR_RESTARTED,
        )  # fmt: skip
        stage.app._workflow_changed(crashed, CloseReport("wf_1", "demo", "sidecar_restarted", (), 0.0, 0.0))
        seen = told(stage.app)
        assert seen["spanlock_workflow_closes_total", "sidecar_restarted"] == 1
        assert seen["spanlock_close_to_dropped_seconds_count",] == 0
