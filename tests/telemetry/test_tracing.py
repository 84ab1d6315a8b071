"""The sidecar's own spans at a real OTLP receiver: children of a sampled parent, none of any other, and no secret in them."""

import asyncio
import json
import random
import time
from typing import Any

import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sidecar.app import World
from sidecar.model.audit import FlowRecord
from sidecar.telemetry import tracing
from sidecar.telemetry.logging import configure
from sidecar.telemetry.tracing import Tracer
from tests.fakes.clock import FakeClock
from tests.stage import client, opened, ready_stage, url

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """What a collector gets."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.came = asyncio.Event()
        self.status = 200

    async def start(self) -> int:
        app = web.Application()
        app.router.add_post("/v1/traces", self._take)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return int(self._runner.addresses[0][1])

    async def _take(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.read())
        self.came.set()
        return web.Response(status=self.status, body=b"", content_type="application/x-protobuf")

    async def stop(self) -> None:
        await self._runner.cleanup()

    def spans(self) -> list[object]:
        requests = [ExportTraceServiceRequest.FromString(body) for body in self.bodies]
        return [
            s for r in requests for resource in r.resource_spans for scope in resource.scope_spans for s in scope.spans
        ]


async def test_a_sampled_parent_gets_a_child_and_another_none() -> None:
    collector = Collector()
    port = await collector.start()
    more = f'telemetry: {{{{otlp_endpoint: "http://127.0.0.1:{port}"}}}}\n'
    async with ready_stage(more=more) as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            for flags in ("00", "01"):
                headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
                assert (await agent.get(url(stage.search, "/v1/items?q=secret"), headers=headers)).status_code == 200
            for not_sampled in ("nonsense-1", f"cc-{TRACE}-{PARENT}-00-1", f"00-{TRACE.upper()}-{PARENT}-01"):
                answer = await agent.get(url(stage.search), headers={"traceparent": not_sampled})
                assert answer.status_code == 200
            assert (await agent.get(url(stage.search))).status_code == 200
        await asyncio.wait_for(collector.came.wait(), 10)
        token = stage.search.authorized[-1].removeprefix("Bearer ").encode()
    await collector.stop()
    (span,) = collector.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.name) == (TRACE, PARENT, "GET search")  # type: ignore[attr-defined]
    assert span.start_time_unix_nano < span.end_time_unix_nano  # type: ignore[attr-defined]
    everything = b"".join(collector.bodies)
    assert token not in everything and workflow.handle.encode() not in everything and b"q=secret" not in everything


async def test_a_collector_that_is_down_costs_spans_and_nothing_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure("info", "json")
    send, attempts = tracing._send, []

    async def noted(*arguments: Any) -> str:
        attempts.append(await send(*arguments))
        return attempts[-1]

    monkeypatch.setattr(tracing, "_send", noted)
    clock = FakeClock(time.time())  # the identities are of now
    more = 'telemetry: {{otlp_endpoint: "http://127.0.0.1:1"}}\n'
    async with ready_stage(more=more, around=World(clock, random.Random(1))) as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            for number in range(1, 4):
                answer = await agent.get(url(stage.search), headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
                assert answer.status_code == 200
                async with asyncio.timeout(10):
                    while not stage.app.tracer._queue:
                        await asyncio.sleep(0)
                    while stage.app.tracer._queue:
                        await clock.advance(1)
                    while len(attempts) < number:
                        await asyncio.sleep(0)
    assert attempts == ["ClientConnectorError"] * 3
    assert capsys.readouterr().err.count("spans_lost") == 1


FLOW = FlowRecord(
    time=1.0, agent="demo", uid=0, workflow="wf_1", tool="search", method="GET", path="/", status=200, outcome="ok", detail="",
    request_bytes=0, response_bytes=0, duration_ms=1.0, lease="", lease_epoch=0, policy_ids=(), trace_id="", mode="reverse", upstream="",
)  # fmt: skip


async def test_a_collector_that_refuses_is_said_once_when_it_begins_and_once_when_it_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure("info", "json")
    clock, collector = FakeClock(), Collector()
    tracer = Tracer(f"http://127.0.0.1:{await collector.start()}", clock)
    running = asyncio.ensure_future(tracer.run())
    for status in (200, 500, 400, 404, 200, 200, 503):
        collector.status = status
        tracer.flow(FLOW, f"00-{TRACE}-{PARENT}-01".encode())
        await clock.advance(1, sleepers=1)
        await asyncio.wait_for(clock.wait_for_sleepers(), 10)
    running.cancel()
    await collector.stop()
    assert len(collector.bodies) == 7
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(line["event"], line.get("error")) for line in said] == [
        ("spans_lost", "HTTP 500"), ("spans_recovered", None), ("spans_lost", "HTTP 503")
    ]  # fmt: skip
    assert "calls go on" in said[0]["effect"]
