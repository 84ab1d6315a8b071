"""What the registry remembers, and the races of a workflow's end with its beginning."""

import asyncio

import pytest

from sidecar.errors import CallerError, Reason
from sidecar.model.lease import CloseReport
from sidecar.model.workflow import CloseReason, Workflow, WorkflowState
from sidecar.secret import Secret
from sidecar.tasks import Background
from sidecar.workflows.config import WorkflowsConfig
from sidecar.workflows.registry import Registry
from tests.fakes.clock import FakeClock
from tests.stage import ready_stage


class Stream:
    """A call that goes on."""

    def cut(self) -> None:
        raise AssertionError("nobody closes its workflow")


def registry_of(clock: FakeClock, **config: float) -> Registry:
    background = Background(lambda name, error: None)

    def settle(workflow: Workflow) -> "asyncio.Task[CloseReport]":
        async def settled() -> CloseReport:
            return CloseReport(workflow.id, workflow.agent, str(workflow.close_reason))

        return background.spawn(settled(), "settle")

    return Registry(clock, WorkflowsConfig(**config), settle, lambda workflow, report: None, background)


async def test_nobody_opens_a_workflow_for_longer_than_the_operator_allows() -> None:
    clock = FakeClock()
    registry = registry_of(clock, max_age=100.0, idle=50.0)
    asking, modest, silent = (
        registry.open("a", name="w", max_age=age, idle=idle) for age, idle in ((1e6, 1e6), (10.0, 5.0), (None, None))
    )
    now = clock.monotonic()
    assert [(w.deadline - now, w.idle_seconds) for w in (asking, modest, silent)] == [(100, 50), (10, 5), (100, 50)]


async def test_a_stream_that_goes_on_for_longer_than_the_idle_time_keeps_its_workflow_open() -> None:
    clock, stream = FakeClock(), Stream()
    registry = registry_of(clock, max_age=1000.0, idle=50.0)
    workflow = registry.open("a", name="w")
    registry.enter(workflow, stream, clock.monotonic())
    for _ in range(5):
        await clock.advance(49.0)
        registry.expire()
        assert workflow.is_open
    registry.leave(workflow, stream, clock.monotonic())
    await clock.advance(49.0)
    registry.expire()
    assert workflow.is_open, "its idle time begins when the stream ends"
    await clock.advance(51.0)
    registry.expire()
    assert workflow.close_reason is CloseReason.IDLE


async def test_a_restart_tells_of_every_workflow_however_many_are_remembered() -> None:
    told: list[str] = []
    background = Background(lambda name, error: None)

    def settle(workflow: Workflow) -> "asyncio.Task[CloseReport]":
        raise AssertionError("nothing is left to settle")

    registry = Registry(
        FakeClock(), WorkflowsConfig(), settle, lambda workflow, report: told.append(workflow.id), background
    )
    left = [
        Workflow(
            f"wf_{number}", "agent", "w", Secret(""), 0.0, 0.0, 0.0,
            state=WorkflowState.CLOSED, close_reason=CloseReason.SIDECAR_RESTARTED,
        )
        for number in range(300)
    ]  # fmt: skip
    registry.restarted(left)
    assert told == [workflow.id for workflow in left]
    assert len(registry.remembered()) < 300, "memory is bounded all the same"


async def test_a_workflow_that_closes_while_its_listener_opens_leaves_none_behind() -> None:
    async with ready_stage() as stage:
        app = stage.app
        before = app.listeners.ports()
        workflow = app.registry.open("demo", name="w")
        opening = asyncio.ensure_future(app.listeners.open_for(workflow))
        await asyncio.sleep(0)
        await app.registry.close(workflow, CloseReason.CLOSED)
        with pytest.raises(CallerError) as caught:
            await opening
        assert caught.value.reason is Reason.WORKFLOW_CLOSED
        assert app.listeners.ports() == before
