"""grpc.health.v1 on an agent's socket, by its own client: Check, and a Watch that follows the identity by itself."""

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from sidecar.control import serving
from sidecar.control.unreadable import RefuseUnreadable
from tests.stage import ready_stage, stub

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def asked(service: str = "") -> Any:
    return health_pb2.HealthCheckRequest(service=service)


async def test_check_and_watch_answer_and_watch_follows_without_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LOOK_SECONDS", 0.01)
    async with ready_stage() as stage, stub(stage, health_pb2_grpc.HealthStub) as health:
        assert (await health.Check(asked(), timeout=10)).status == SERVING
        watch = health.Watch(asked(), timeout=30)
        assert (await watch.read()).status == SERVING
        held, stage.app.svids._held = stage.app.svids._held, {}
        assert (await watch.read()).status == NOT_SERVING
        stage.app.svids._held = held
        assert (await watch.read()).status == SERVING
        stage.app.plane.draining = True
        assert (await watch.read()).status == NOT_SERVING
        assert (await health.Check(asked(), timeout=10)).status == NOT_SERVING
        watch.cancel()


async def test_a_service_that_is_not_here() -> None:
    async with ready_stage() as stage, stub(stage, health_pb2_grpc.HealthStub) as health:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health.Check(asked("nobody"), timeout=10)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        watch = health.Watch(asked("nobody"), timeout=10)
        assert (await watch.read()).status == UNKNOWN
        watch.cancel()


async def test_the_operators_socket_watches_too_and_no_watch_outlives_its_client() -> None:
    async with ready_stage() as stage:
        before = len(asyncio.all_tasks())
        async with stub(stage, health_pb2_grpc.HealthStub, operator=True) as health:
            assert (await health.Watch(asked(), timeout=10).read()).status == SERVING
        async with asyncio.timeout(10):
            while len(asyncio.all_tasks()) > before + 1:
                await asyncio.sleep(0)


async def test_malformed_requests_of_both_get_a_status() -> None:
    async with ready_stage() as stage, grpc.aio.insecure_channel(f"unix:{stage.agent_socket}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff", timeout=10)  # type: ignore[call-arg]
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_stream("/grpc.health.v1.Health/Watch")(b"\xff", timeout=10).read()  # type: ignore[call-arg]
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_guard_fits_methods_that_write_by_themselves(tmp_path: Path) -> None:
    server = grpc.aio.server(interceptors=[RefuseUnreadable()])
    service = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its Watch is a coroutine
    health_pb2_grpc.add_HealthServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(asked(), timeout=10)
            assert (await watch.read()).status == SERVING
            await service.set("", NOT_SERVING)
            assert (await watch.read()).status == NOT_SERVING
    finally:
        await server.stop(0)
