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
