"""What the tests on the real servers do again and again."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from tests.real.conftest import RealStage
from tests.real.tool import RealTool
from tests.stage import client, closed, url

_PACE = 0.02
"""Seconds between two calls of the traffic: real servers have a pace of their own."""


async def used(stage: RealStage, proxy: str) -> str:
    """One call through the workflow's listener; the token that the tool saw, which Keycloak says is active."""
    async with client(stage, proxy) as agent:
        answer = await agent.get(url(stage.search))
        assert answer.status_code == 200, answer.text
    token = stage.search.authorized[-1].removeprefix("Bearer ")
    assert await stage.search.active(token), "the positive control"
    return token


async def settled(stage: RealStage, workflow_id: str) -> pb.CloseResponse:
    """The report of a workflow that something else closes."""
    noun = stage.app.registry.find(workflow_id)
    assert noun is not None
    await asyncio.wait_for(stage.app.registry.wait_closed(noun), 20)
    return await closed(stage, workflow_id)


def confirmed(report: pb.CloseResponse) -> None:
    assert [(end.tool, end.at_issuer, end.residual.ToNanoseconds()) for end in report.leases] == [
        ("search", "confirmed", 0)
    ]


class Traffic:
    """Calls that never pause, and what came of each."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []
        """"200", or the reason."""

    async def some(self, number: int = 5) -> None:
        """Waits until `number` more calls have ended."""
        wanted = len(self.outcomes) + number
        async with asyncio.timeout(60):
            while len(self.outcomes) < wanted:
                await asyncio.sleep(_PACE)

    def counted(self) -> Counter[str]:
        return Counter(self.outcomes)


@asynccontextmanager
async def traffic(stage: RealStage, proxy: str, tool: RealTool) -> AsyncIterator[Traffic]:
    """Calls to `tool` through `proxy` for as long as the block lasts."""
    seen = Traffic()

    async def call() -> None:
        async with client(stage, proxy) as agent:
            while True:
                answer = await agent.get(url(tool))
                seen.outcomes.append(answer.headers.get("x-spanlock-reason") or str(answer.status_code))
                await asyncio.sleep(_PACE)

    calling = asyncio.ensure_future(call())
    try:
        await seen.some()
        yield seen
        await seen.some()
    finally:
        assert not calling.done(), calling.exception()
        calling.cancel()
