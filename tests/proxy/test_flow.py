"""The way of a request when it is broken off: at each suspension, from inside its own stack, and by time."""

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import pytest

from sidecar.cli.stage import Stage
from sidecar.errors import CallerError, Reason
from sidecar.identity.callers import Callers
from sidecar.model.audit import FlowRecord
from sidecar.model.caller import Agent, Caller
from sidecar.model.workflow import CloseReason
from sidecar.proxy.flow import Flow
from sidecar.proxy.upstream import Upstream
from tests.stage import call, closed, opened, port_of, ready_stage, reason_of, timed_stage


class Interrupted:
    """A flow's coroutine, which is broken off right after its `number`th suspension."""

    def __init__(self, flow: Flow, inner: Coroutine[Any, None, None], number: int, how: str) -> None:
        self.flow, self.inner, self.left, self.how = flow, inner, number, how

    def send(self, value: None) -> Any:
        return self._counted(self.inner.send(value))

    def throw(self, error: BaseException) -> Any:
        return self._counted(self.inner.throw(error))

    def _counted(self, yielded: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            asyncio.get_running_loop().call_soon(self._break)
        return yielded

    def _break(self) -> None:
        if self.how == "cut":
            self.flow.cut()
        elif self.how == "gone":
            self.flow.fail(CallerError(Reason.CLIENT_GONE, "the agent closed the connection"))
        elif self.flow._task is not None:
            self.flow._task.cancel()
        else:
            self.flow.cut()


class Watched:
    """Notes each flow's record and each connection to a tool."""

    def __init__(self, stage: Stage, patch: pytest.MonkeyPatch) -> None:
        self.records: list[FlowRecord] = []
        self.upstreams: list[Upstream] = []
        patch.setattr(stage.app.audit, "flow", self.records.append)
        made = Upstream.connection_made

        def connection_made(upstream: Upstream, transport: Any) -> None:
            self.upstreams.append(upstream)
            made(upstream, transport)

        patch.setattr(Upstream, "connection_made", connection_made)


@pytest.mark.parametrize("how", ["cut", "gone", "cancelled"])
async def test_broken_off_at_every_suspension_nothing_leaks(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ready_stage() as stage:
        start = Flow.start
        seen = 0
        for number in range(1, 100):
            with monkeypatch.context() as patch:
                watched = Watched(stage, patch)
                interrupted: list[Interrupted] = []

                def broken(flow: Flow, inner: Any, number: int = number, made: list[Any] = interrupted) -> None:
                    made.append(Interrupted(flow, inner, number, how))
                    start(flow, made[-1])

                patch.setattr(Flow, "start", broken)
                workflow = await opened(stage)  # a new one each time: dial and exchange are on the way
                answer = await call(stage, workflow.handle, method="PUT", body=b"body")
                noun = stage.app.registry.get(workflow.workflow.id)
                async with asyncio.timeout(10):
                    while noun.flows or not watched.records:
                        await asyncio.sleep(0)
                (record,) = watched.records
                idle = stage.app.pool._idle.get(noun.id, {}).get("search", [])
                alive = [u for u in watched.upstreams if u.alive and u not in idle]
                assert not alive, f"suspension {number}: a connection to the tool leaked"
                if interrupted[0].left > 0:
                    assert record.outcome == "ok"
                    break
                seen += 1
                assert record.outcome in ("workflow_closed", "client_gone", "ok"), (number, record)
                assert b"200 OK" not in answer or answer.endswith(b"}"), "never half an answer that looks whole"
        assert seen >= 3, "a dial, an exchange and the answer were waited for"
        assert not stage.app.listeners.connections or all(c.flow is None for c in stage.app.listeners.connections)


async def test_a_cut_from_inside_its_own_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tool's bytes arrive, and what handles them closes the workflow: the flow that is running is cut by itself."""
    async with ready_stage() as stage:
        relay = Flow.relay

        def closing(flow: Flow, payload: bytes) -> None:
            relay(flow, payload)
            flow.cut()

        with monkeypatch.context() as patch:
            watched = Watched(stage, patch)
            patch.setattr(Flow, "relay", closing)
            workflow = await opened(stage)
            answer = await call(stage, workflow.handle)
        assert reason_of(answer) == "workflow_closed" and len(watched.records) == 1
        assert not any(u.alive for u in watched.upstreams)

        with monkeypatch.context() as patch:
            watched = Watched(stage, patch)
            use = stage.app.broker.use

            def cutting(lease: Any, noun: Any, counted: bool = False) -> bytes:
                header = use(lease, noun, counted)
                for flow in list(noun.flows):
                    flow.cut()
                return header

            patch.setattr(stage.app.broker, "use", cutting)
            workflow = await opened(stage)
            assert reason_of(await call(stage, workflow.handle)) == "workflow_closed" and len(watched.records) == 1


async def test_a_close_in_the_step_of_the_write_keeps_the_credential_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liveness was checked and the head written, but it leaves at the step's end: a close that comes before takes it back."""
    async with ready_stage() as stage:
        send = Upstream.send

        def closing(upstream: Upstream, request: Any, flow: Any) -> None:
            asyncio.get_running_loop().call_soon(stage.app.registry.close, flow.workflow, CloseReason.OPERATOR)
            send(upstream, request, flow)
            assert upstream.unsent, "the head waits for the end of the step"

        workflow = await opened(stage)
        assert b"200 OK" in await call(stage, workflow.handle)
        served = stage.search.requests
        monkeypatch.setattr(Upstream, "send", closing)
        assert reason_of(await call(stage, workflow.handle)) == "workflow_closed"
        report = await closed(stage, workflow.workflow.id)
        assert stage.search.requests == served, "the tool saw nothing of the second call"
        assert report.reason == "operator"


async def test_a_bug_in_one_call_costs_that_call_and_holds_up_no_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wakes a flow (a close, above all) is not where its exception belongs: the leases must still be dropped."""
    async with ready_stage() as stage:
        told: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(str(context["exception"])))
        workflow = await opened(stage)
        await call(stage, workflow.handle)  # dials and exchanges, so that the next call needs no task
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(stage.app.addresses["reverse"]))
        head = f"GET /search/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: {workflow.handle}\r\n\r\n"
        writer.write(head.encode())
        assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"data: 1"), 10)

        def broken(record: FlowRecord) -> None:
            raise RuntimeError("a bug of ours")

        monkeypatch.setattr(stage.app.audit, "flow", broken)
        report = await closed(stage, workflow.workflow.id)
        assert [end.at_issuer for end in report.leases] == ["confirmed"] and told == ["a bug of ours"]
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert not stage.app.broker.leases()


async def test_one_uids_flood_does_not_shut_out_another(monkeypatch: pytest.MonkeyPatch) -> None:
    async with ready_stage() as stage:
        app = stage.app
        monkeypatch.setattr(app.plane, "limits", app.plane.limits.model_copy(update={"connections": 8}))
        mine = app.callers.by_agent("demo")
        declared = Callers(
            [*app.callers.agents.values(), Agent("other", "spiffe://demo.spanlock.test/other", uid=mine.uid + 1)]
        )
        monkeypatch.setattr(app.plane, "callers", declared)
        who = [mine]
        monkeypatch.setattr(app.plane, "find_caller", lambda local, peer: who[0])
        workflow, port = await opened(stage), port_of(app.addresses["reverse"])
        flood = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
        async with asyncio.timeout(5):
            while len(app.listeners.connections) < 4:
                await asyncio.sleep(0)
        assert reason_of(await call(stage, workflow.handle)) == "too_many_connections"
        who[0] = Caller(mine.uid + 1, mine.agents)
        assert b"200 OK" in await call(stage, workflow.handle), "the other's calls go on"
        for _, writer in flood:
            writer.close()


# -- time -----------------------------------------------------------------------------------------------------------------

SILENT = """\
- {{{{name: silent, url: "http://127.0.0.1:{port}", issuer: demo-issuer, audience: tool-search, scopes: ["search:read"], allow_networks: [127.0.0.0/8], timeouts: {{{{response: 5, idle: 7}}}}}}}}
"""


class SilentTool:
    """Reads requests and answers with what it is told, or not at all."""

    def __init__(self) -> None:
        self.says = b""
        self.got = asyncio.Event()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            writer.write(self.says)
            self.got.set()
        writer.close()


class Timed:
    """A stage whose clock is turned by hand, with a silent tool."""

    async def __aenter__(self) -> "Timed":
        self.tool = SilentTool()
        port = await self.tool.start()
        self._stage = timed_stage(more=SILENT.format(port=port), policy_for=("silent",))
        self.stage, self.clock = await self._stage.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.tool._server.close()
        await self._stage.__aexit__(None, None, None)

    async def connect(self, request: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(self.stage.app.addresses["reverse"]))
        writer.write(request.encode())
        async with asyncio.timeout(5):
            while not self.stage.app.listeners.connections:
                await asyncio.sleep(0)
        return reader, writer

    async def to_the_tool(self, more: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A request that has reached the silent tool."""
        workflow = await opened(self.stage)
        head = f"POST /silent/x HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: {workflow.handle}\r\n"
        streams = await self.connect(head + (more or "\r\n"))
        async with asyncio.timeout(10):
            while not self.tool.got.is_set():
                await asyncio.sleep(0)
        return streams

    async def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            await self.clock.advance(1)

    def outcome(self) -> tuple[str, str]:
        record = self.stage.app.plane.denials[-1]
        return record.outcome, record.detail


async def test_a_head_that_never_ends_is_answered_408() -> None:
    async with Timed() as timed:
        reader, writer = await timed.connect("GET /silent/ HTTP/1.1\r\nHost:")
        async with asyncio.timeout(5):
            while not any(c._buffer for c in timed.stage.app.listeners.connections):
                await asyncio.sleep(0)
        await timed.pass_time(20)
        assert timed.stage.app.listeners.connections, "not before its time"
        await timed.pass_time(12)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert answer.startswith(b"HTTP/1.1 408") and reason_of(answer) == "request_timeout"
        writer.close()


async def test_an_idle_connection_is_closed_without_a_word() -> None:
    async with Timed() as timed:
        reader, writer = await timed.connect("")
        await timed.pass_time(32)
        assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_a_tool_that_never_answers_is_504() -> None:
    async with Timed() as timed:
        reader, writer = await timed.to_the_tool()
        await timed.pass_time(8)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 504") and reason_of(head) == "upstream_timeout"
        writer.close()


async def test_a_tool_that_falls_silent_in_mid_answer_is_cut_and_told() -> None:
    async with Timed() as timed:
        timed.tool.says = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf"
        reader, writer = await timed.to_the_tool()
        await asyncio.wait_for(reader.readuntil(b"half"), 5)
        await timed.pass_time(10)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(96), 5)
        assert timed.outcome()[0] == "upstream_timeout"
        writer.close()


async def test_an_agent_that_stops_in_mid_body_is_told_so_and_not_the_tool() -> None:
    async with Timed() as timed:
        reader, writer = await timed.to_the_tool("Content-Length: 100\r\n\r\nhalf")
        await timed.pass_time(8)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 408") and reason_of(head) == "request_timeout"
        assert "body" in timed.outcome()[1]
        writer.close()


async def test_idle_and_old_workflows_close_by_the_clock() -> None:
    async with Timed() as timed:
        request_idle = await opened(timed.stage)
        registry = timed.stage.app.registry
        noun = registry.get(request_idle.workflow.id)
        await timed.pass_time(899)
        assert noun.is_open
        registry.renew(noun)
        await timed.pass_time(899)
        assert noun.is_open, "Renew pushes the idle time back"
        await timed.pass_time(3)
        assert noun.close_reason == "idle"
        old = registry.get((await opened(timed.stage)).workflow.id)
        for _ in range(5):
            await timed.pass_time(800)
            if old.is_open:
                registry.renew(old)
        assert old.close_reason == "max_age", "and never the maximum age"
