"""Background tasks: what must never end begins anew, and its failure is told."""

import asyncio

import pytest

from sidecar.model.workflow import CloseReason, Workflow
from sidecar.tasks import Background
from tests.stage import opened, timed_stage


async def test_what_must_never_end_is_told_and_begins_anew() -> None:
    told: list[tuple[str, str]] = []
    pauses, begun, running = 0, 0, asyncio.Event()

    async def work() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise RuntimeError(f"failure {begun}")
        running.set()
        await asyncio.Event().wait()

    async def pause() -> None:
        nonlocal pauses
        pauses += 1

    background = Background(lambda name, error: told.append((name, str(error))))
    background.keep(work, "expiry", pause)
    await asyncio.wait_for(running.wait(), 5)
    assert told == [("expiry", "failure 1"), ("expiry", "failure 2")] and pauses == 2
    await background.aclose()
    assert len(background) == 0


async def test_workflows_still_expire_after_a_bug_in_one_expiry(monkeypatch: pytest.MonkeyPatch) -> None:
    async with timed_stage(more="workflows: {{max_age: 60}}\n") as (stage, clock):
        registry, failed = stage.app.registry, asyncio.Event()
        close = registry.close

        def broken(workflow: Workflow, reason: CloseReason) -> object:
            monkeypatch.setattr(registry, "close", close)
            failed.set()
            raise RuntimeError("a bug of ours")

        monkeypatch.setattr(registry, "close", broken)
        await opened(stage)
        while not failed.is_set():
            await clock.advance(1)
        noun = registry.get((await opened(stage)).workflow.id)
        opened_at = clock.monotonic()
        while noun.is_open and clock.monotonic() < opened_at + 65:
            await clock.advance(1)
        assert noun.close_reason is CloseReason.MAX_AGE
