"""The agents' sockets: each sees its own, malformed messages get a status, two agents of one uid need handles."""

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from sidecar.clock import SystemClock
from sidecar.control import sockets, workflows_service
from sidecar.control.sockets import Socket
from sidecar.errors import ConfigError
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from sidecar.workflows import registry as registry_module
from tests.stage import TwoAgents, closed, opened, port_of, raw, ready_stage, reason_of, stub, two_agents


@pytest.fixture
async def two() -> AsyncIterator[TwoAgents]:
    async with two_agents() as stage:
        yield stage


async def other_opens(stage: TwoAgents, **fields: Any) -> pb.OpenResponse:
    async with stub(stage, socket=stage.other_socket) as workflows:
        response: pb.OpenResponse = await workflows.Open(pb.OpenRequest(name="theirs", **fields))
        return response


async def test_two_agents_of_one_uid_need_handles(two: TwoAgents) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    mine, theirs = await opened(two, trace_id=trace), await other_opens(two)
    base = f"http://{two.app.addresses['reverse']}/search/v1/items"
    async with httpx.AsyncClient(trust_env=False) as agent:
        nobody = await agent.get(base, headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
        assert (nobody.status_code, nobody.headers["x-spanlock-reason"]) == (403, "no_workflow")
        assert "handle" in nobody.json()["detail"] + nobody.json()["fix"]
        for workflow, identity in ((mine, "/agent"), (theirs, "/other")):
            answer = await agent.get(base, headers={"x-spanlock-workflow": workflow.handle})
            assert answer.status_code == 200 and answer.json()["subject"].endswith(identity)


async def test_an_agent_sees_renews_closes_and_watches_its_own_only(two: TwoAgents) -> None:
    mine, theirs = await opened(two), await other_opens(two)
    async with stub(two) as workflows:
        listed = await workflows.List(pb.ListRequest())
        assert [w.id for w in listed.workflows] == [mine.workflow.id]
        for ask in (
            workflows.Close(pb.CloseRequest(workflow_id=theirs.workflow.id)),
            workflows.Renew(pb.RenewRequest(workflow_id=theirs.workflow.id)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await ask
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        assert two.app.registry.get(theirs.workflow.id).is_open
        watching = workflows.Watch(pb.WatchRequest())
        seen = [(await watching.read()).workflow]
        await other_opens(two)
        again = await opened(two)
        await closed(two, again.workflow.id)
        seen += [(await watching.read()).workflow for _ in range(3)]
        watching.cancel()
    assert [(w.id, w.state) for w in seen] == [
        (mine.workflow.id, "open"), (again.workflow.id, "open"), (again.workflow.id, "closing"), (again.workflow.id, "closed")
    ]  # fmt: skip
    async with asyncio.timeout(5):
        while any(two.app.registry._watchers.values()):
            await asyncio.sleep(0)


async def test_renew_never_passes_the_maximum_age() -> None:
    async with ready_stage() as stage:
        request = pb.OpenRequest(name="short")
        request.max_age.FromSeconds(60)
        async with stub(stage) as workflows:
            workflow = await workflows.Open(request)
            renewed = await workflows.Renew(pb.RenewRequest(workflow_id=workflow.workflow.id))
        assert abs(renewed.workflow.expires_at.ToNanoseconds() - workflow.workflow.expires_at.ToNanoseconds()) < 1e9


INVALID = {
    "a name with a line break": pb.OpenRequest(name="a\nb"),
    "a name that speaks to a terminal": pb.OpenRequest(name="a\x9b2Jb"),
    "a name that turns its direction": pb.OpenRequest(name="a\u202eb"),
    "a name too long": pb.OpenRequest(name="x" * 129),
    "a trace id of another shape": pb.OpenRequest(name="x", trace_id="ABC"),
    "an all-zero trace id": pb.OpenRequest(name="x", trace_id="0" * 32),
    "a root without a trace": pb.OpenRequest(name="x", root_span_id="b7ad6b7169203331"),
    "a subject token too long": pb.OpenRequest(name="x", subject_token="t" * 20_000),
}


@pytest.mark.parametrize("name", INVALID)
async def test_a_field_that_makes_no_sense_is_named(name: str) -> None:
    async with ready_stage() as stage, stub(stage) as workflows:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await workflows.Open(INVALID[name])
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (refused.value.details() or "").startswith("invalid_argument: ")
        assert stage.app.registry.open_count == 0


async def test_malformed_messages_get_a_status_and_lose_nothing() -> None:
    async with ready_stage() as stage:
        held = await opened(stage)
        options = [("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(f"unix:{stage.agent_socket}", options=options) as channel:
            for method in ("Workflows/Open", "Workflows/Close", "TokenExchange/Exchange", "TokenExchange/Release"):
                send = channel.unary_unary(
                    f"/spanlock.v1.{method}", request_serializer=bytes, response_deserializer=bytes
                )
                for body, code in (
                    (b"\xff\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
                    (b"\x0a\xff\xff\xff\xff\x7f", grpc.StatusCode.INVALID_ARGUMENT),
                    (bytes(70_000), grpc.StatusCode.RESOURCE_EXHAUSTED),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await send(body)
                    assert refused.value.code() is code
            held_open: Any = channel.stream_stream(
                "/spanlock.v1.Workflows/Hold", request_serializer=bytes, response_deserializer=bytes
            )
            hold = held_open()
            await hold.write(b"\xff\xff\xff")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await hold.read()
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert stage.app.registry.get(held.workflow.id).is_open and stage.app.registry.open_count == 1


async def test_a_hold_that_does_not_open_is_told_so() -> None:
    async with ready_stage() as stage, stub(stage) as workflows:
        hold = workflows.Hold()
        await hold.write(pb.HoldRequest(close=True))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await hold.read()
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "first message" in (
            refused.value.details() or ""
        )


async def test_too_many_workflows_are_refused_and_the_others_go_on() -> None:
    async with ready_stage(more="workflows: {{max_open_per_agent: 2}}\n") as stage:
        first, _ = await opened(stage), await opened(stage)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await opened(stage)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        request = f"GET /search/x HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: {first.handle}\r\nConnection: close\r\n\r\n"
        assert reason_of(await raw(port_of(stage.app.addresses["reverse"]), request.encode())) == ""
        await closed(stage, first.workflow.id)
        await opened(stage)


async def test_a_watcher_that_is_too_slow_is_told_and_hears_of_its_own_agent_only(two: TwoAgents) -> None:
    registry = two.app.registry
    with registry.watch("demo") as changes:
        for _ in range(10):
            registry.open("other", name="theirs")
        assert changes.empty(), "another agent's changes take no place here"
        for _ in range(registry_module._AHEAD + 5):
            registry.open("demo", name="mine")
        heard = [changes.get_nowait() for _ in range(changes.qsize())]
    assert heard[-1] is None and all(w is not None and w.agent == "demo" for w in heard[:-1])
    assert len(heard) == registry_module._AHEAD + 1


async def test_one_agent_cannot_make_each_change_dear_for_all(two: TwoAgents) -> None:
    async with stub(two) as workflows:
        watches = [workflows.Watch(pb.WatchRequest()) for _ in range(registry_module._WATCHERS)]
        async with asyncio.timeout(10):
            while len(two.app.registry._watchers.get("demo", ())) < registry_module._WATCHERS:
                await asyncio.sleep(0)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await workflows.Watch(pb.WatchRequest()).read()
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        with two.app.registry.watch("other"):
            pass
        for watch in watches:
            watch.cancel()


async def test_a_socket_is_nobody_elses_even_before_it_has_its_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, int] = {}
    protect = Socket._protect

    def noted(socket: Socket) -> None:
        made[socket.path.name] = stat.S_IMODE(socket.path.stat().st_mode)
        protect(socket)

    monkeypatch.setattr(Socket, "_protect", noted)
    mask = os.umask(0)
    try:
        async with ready_stage() as stage:
            assert made == {"agent.sock": 0o600, "operator.sock": 0o600}
            assert stat.S_IMODE(stage.agent_socket.stat().st_mode) == 0o660
            assert stat.S_IMODE(stage.operator_socket.parent.stat().st_mode) == 0o700
    finally:
        os.umask(mask)


def bound(path: Path) -> socket.socket:
    """A Unix socket that somebody else made and listens on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen(1)
    return listening


def bare(path: Path) -> Socket:
    return Socket(path, (), lambda _: None, None, lambda: True, SystemClock(), 16)


async def test_a_dead_sidecars_socket_is_replaced_and_a_live_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "run" / "operator.sock"
    listening = bound(path)
    inode = path.stat().st_ino
    with pytest.raises(ConfigError, match="another sidecar answers on"):
        await bare(path).start()
    callers = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for caller in callers:  # until its backlog is full: it lives all the same
        caller.setblocking(False)
        caller.connect_ex(str(path))
    with pytest.raises(ConfigError, match="another sidecar answers on"):
        await bare(path).start()
    assert path.stat().st_ino == inode and sorted(p.name for p in path.parent.iterdir()) == [path.name]
    for dead in (listening, *callers):
        dead.close()
    ours = bare(path)
    await ours.start()
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        await asyncio.wait_for(channel.channel_ready(), 10)
    await ours.stop(0)
    assert not list(path.parent.iterdir()), "nothing of ours is left"


async def test_the_end_removes_no_socket_but_its_own(tmp_path: Path) -> None:
    path = tmp_path / "run" / "operator.sock"
    ours = bare(path)
    await ours.start()
    path.unlink()
    with bound(path):
        await ours.stop(0)
        assert path.is_socket()


async def test_a_hold_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflows_service, "FIRST_SECONDS", 0.05, raising=False)
    async with ready_stage() as stage, stub(stage) as workflows:
        silent = workflows.Hold(timeout=10)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await silent.read()
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "request_timeout: " in (refused.value.details() or ""), "ours, not the client's own"
        hold = workflows.Hold(timeout=10)
        await hold.write(pb.HoldRequest(open=pb.OpenRequest(name="held")))
        opened = (await hold.read()).opened
        assert stage.app.registry.get(opened.workflow.id).is_open, "the deadline is for the first message alone"
        hold.cancel()


async def test_an_agents_calls_at_one_time_are_as_many_as_its_workflows_need() -> None:
    async with ready_stage(more="workflows: {{max_open_per_agent: 2}}\n") as stage, stub(stage) as workflows:
        silent = [workflows.Hold() for _ in range(2 + sockets.SPARE_CALLS + 1)]
        codes = asyncio.as_completed([call.code() for call in silent], timeout=8)
        assert await next(iter(codes)) is grpc.StatusCode.RESOURCE_EXHAUSTED, "one too many, and before any deadline"
        for call in silent:
            call.cancel()
        async with asyncio.timeout(10):
            while True:
                try:
                    await opened(stage)
                    break
                except grpc.aio.AioRpcError as busy:
                    assert busy.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_agents_connections_are_bounded_and_those_that_are_open_go_on() -> None:
    async with ready_stage(more="workflows: {{max_open_per_agent: 1}}\n") as stage, stub(stage) as workflows:
        await workflows.List(pb.ListRequest())
        idle = [await asyncio.open_unix_connection(str(stage.agent_socket)) for _ in range(sockets.SPARE_CALLS + 16)]
        for _, writer in idle:  # speaks HTTP/2, so that no timer for a silent one ends it
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        ends = [asyncio.ensure_future(reader.read()) for reader, _ in idle]
        ended, _ = await asyncio.wait(ends, timeout=10, return_when=asyncio.FIRST_COMPLETED)
        assert ended, "one too many"
        await workflows.List(pb.ListRequest())
        for _, writer in idle:
            writer.close()
        await asyncio.gather(*ends, return_exceptions=True)
