"""How calls and connections end: in order on the wire, told to whoever waits, and without a place kept for the dead."""

import asyncio
import contextlib
import hashlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from sidecar.cli.stage import Stage
from sidecar.errors import CallerError, Reason
from sidecar.identity.callers import Callers
from sidecar.model.audit import FlowRecord
from sidecar.model.caller import Agent, Caller
from sidecar.model.tool import Authority, Tool
from sidecar.proxy.flow import Flow
from sidecar.proxy.http1 import MAX_HEAD
from sidecar.proxy.outbox import Outbox
from sidecar.proxy.pool import IDLE_SECONDS, Pool
from sidecar.proxy.upstream import Upstream
from sidecar.wire.spanlock.v1 import admin_pb2, admin_pb2_grpc
from tests.proxy.test_flow import SilentTool, Timed
from tests.proxy.test_tools import TOOL
from tests.stage import client, closed, opened, port_of, raw, ready_stage, reason_of, stub, tunnel, url


class EarlyTool:
    """Reads whatever comes and answers each head at once, without waiting for a body."""

    def __init__(self) -> None:
        self.received = b""
        self.reads = asyncio.Event()
        self.reads.set()

    async def start(self) -> int:
        self.server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        return int(self.server.sockets[0].getsockname()[1])

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while await self.reads.wait() and (data := await reader.read(1 << 16)):
                self.received += data
                for _ in range(data.count(b" HTTP/1.1\r\n")):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        writer.close()


@asynccontextmanager
async def early_tool(scopes: str = "search:read", **options: Any) -> AsyncIterator[tuple[Stage, EarlyTool, str]]:
    tool = EarlyTool()
    port = await tool.start()
    try:
        more = TOOL.format(port=port).replace("search:read", scopes)
        async with ready_stage(more=more, policy_for=("raw",), **options) as stage:
            yield stage, tool, (await opened(stage)).handle
    finally:
        tool.server.close()


def head(method: str, handle: str, *more: str, path: str = "/raw/x") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"x-spanlock-workflow: {handle}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def test_d1_an_empty_chunked_body_ends_on_the_wire_before_the_next_request_begins() -> None:
    """Without its last chunk a tool reads the next call's bytes as chunks of this one: a request that policy never saw."""
    async with early_tool() as (stage, tool, handle):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(stage.app.addresses["reverse"]))
        for _ in range(2):
            writer.write(head("POST", handle, "Transfer-Encoding: chunked") + b"0\r\n\r\n")
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\nok"), 10)
        writer.close()
        first, second, rest = tool.received.split(b"POST /x HTTP/1.1\r\n")[1:] + [b""]
        assert first.endswith(b"\r\n\r\n0\r\n\r\n") and second.endswith(b"\r\n\r\n0\r\n\r\n") and not rest


async def test_a_call_that_a_reload_forbids_while_it_dials_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async with early_tool() as (stage, tool, handle):
        dial, here, go_on = Pool.dial, asyncio.Event(), asyncio.Event()

        async def slow(self: Pool, *arguments: Any) -> Upstream:
            upstream = await dial(self, *arguments)
            here.set()
            await go_on.wait()
            return upstream

        monkeypatch.setattr(Pool, "dial", slow)
        port = port_of(stage.app.addresses["reverse"])
        asked = asyncio.ensure_future(raw(port, head("GET", handle, "Connection: close")))
        await here.wait()
        (stage.dir / "policy.cedar").write_text(
            'permit(principal, action == Spanlock::Action::"workflow.open", resource);'
        )
        assert (await stage.app.reload()).applied
        go_on.set()
        assert reason_of(await asked) == "policy_denied" and tool.received == b"" and stage.issuer.minted == 0


@pytest.mark.parametrize("obligation", ['@ttl("10")', '@scopes("search:read")'])
async def test_a_credential_handle_does_not_pass_by_the_obligations_of_a_path(obligation: str) -> None:
    policy = f"permit(principal, action, resource);{obligation} permit(principal, action, resource) when {{ PATH }};"
    policy = policy.replace("PATH", 'context has path && context.path like "/young*"')
    async with early_tool('search:read", "search:write') as (stage, tool, _):
        (stage.dir / "policy.cedar").write_text(policy)
        assert (await stage.app.reload()).applied
        workflow = stage.app.registry.open("demo", name="w")
        app, raw_tool = stage.app, stage.app.plane.router.by_name("raw")
        lease = await app.broker.lease(
            workflow, raw_tool, app.decider.decide_exchange(workflow, raw_tool, raw_tool.scopes)
        )
        bearer = f"Authorization: Bearer {app.broker.handle(lease)}"
        port = port_of(app.addresses["reverse"])
        for path, status in (("/raw/x", b"200"), ("/raw/young", b"403")):
            lines = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{bearer}\r\nConnection: close\r\n\r\n"
            assert (await raw(port, lines.encode())).split(b" ")[1] == status
        assert tool.received.count(b"GET ") == 1


@pytest.mark.parametrize("body", [b"x" * 100, b"x" * (3 << 20)], ids=["small", "large"])
async def test_the_refusal_of_an_upload_arrives_although_it_is_not_read(body: bytes) -> None:
    """Closing with unread input resets the connection, and the answer is lost with it."""
    async with early_tool() as (stage, _, handle):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(stage.app.addresses["reverse"]))
        writer.write(head("PUT", handle, f"Content-Length: {max(len(body), 1000)}") + body)
        await asyncio.wait_for(writer.drain(), 10)
        answer = await asyncio.wait_for(reader.read(), 10)
        assert reason_of(answer) == "method_refused" and b"connection: close" in answer
        writer.close()


async def test_a_bug_in_one_call_is_answered_and_ends_both_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    async with early_tool() as (stage, tool, handle):
        with monkeypatch.context() as patch:
            patch.setattr(Flow, "_stream_back", lambda *_: 1 / 0)
            answer = await raw(port_of(stage.app.addresses["reverse"]), head("GET", handle))
        assert answer.startswith(b"HTTP/1.1 500") and reason_of(answer) == "internal_error"
        assert stage.app.plane.denials[-1].outcome == "internal_error"
        assert not stage.app.pool._idle and not stage.app.listeners.connections
        assert b" 200 " in await raw(port_of(stage.app.addresses["reverse"]), head("GET", handle, "Connection: close"))


async def test_a_body_is_asked_for_only_when_the_call_is_permitted() -> None:
    """An agent that waits for `100 Continue` sends a refused call's body nowhere; one that is permitted is not left waiting."""
    async with ready_stage() as stage:
        handle, port = (await opened(stage)).handle, port_of(stage.app.addresses["reverse"])
        expects = "Expect: 100-continue", "Content-Length: 4", "Connection: close"
        refused = await raw(port, head("POST", handle, *expects, path="/search/admin"))
        assert reason_of(refused) == "policy_denied" and refused.startswith(b"HTTP/1.1 403")
        assert (stage.search.requests, stage.issuer.minted) == (0, 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head("POST", handle, *expects, path="/search/x"))
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"body")
        answer = await asyncio.wait_for(reader.read(), 10)
        assert answer.startswith(b"HTTP/1.1 200") and hashlib.sha256(b"body").hexdigest().encode() in answer
        writer.close()


async def test_a_connection_that_is_kept_gets_no_call_through_while_we_drain() -> None:
    async with early_tool() as (stage, tool, handle):
        reader, writer = await asyncio.open_connection("127.0.0.1", port_of(stage.app.addresses["reverse"]))
        for draining, outcome in ((False, ""), (True, "draining")):
            stage.app.plane.draining = draining
            writer.write(head("GET", handle))
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            assert (answer[9:12], reason_of(answer)) == (b"503" if draining else b"200", outcome)
            if not draining:
                await asyncio.wait_for(reader.readexactly(2), 10)
        assert tool.received.count(b"GET ") == 1
        writer.close()


async def test_a_closed_workflow_leaves_no_port_no_tunnel_and_no_connection_to_a_tool() -> None:
    async with ready_stage() as stage:
        own, app = await opened(stage, listener=True), stage.app
        workflow = app.registry.get(own.workflow.id)
        explicit = port_of(app.addresses["explicit"])
        async with (
            tunnel(stage, explicit, stage.search, handle=own.handle) as (by_handle, _),
            tunnel(stage, port_of(own.proxy_url), stage.search) as (by_listener, writer),
        ):
            host = f"search.tool.test:{stage.search.port}"
            writer.write(f"GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert b" 200 " in await asyncio.wait_for(by_listener.readuntil(b"\r\n\r\n"), 10)
            await until(lambda: app.pool._idle)
            (idle,) = app.pool._idle[workflow.id]["search"]
            spare = await app.pool.dial(workflow, app.plane.router.by_name("reports"))  # no lease's drop will close it
            app.pool._idle[workflow.id]["reports"] = [spare]
            app.pool._idle_count += 1
            await closed(stage, workflow.id)
            assert await asyncio.wait_for(by_handle.read(), 10) == b"", (
                "it has nothing in flight and could begin something"
            )
            await asyncio.wait_for(by_listener.read(), 10)
            assert not idle.alive and not spare.alive and not app.pool._idle
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port_of(own.proxy_url))


async def test_an_operators_revoke_cuts_what_streams_and_closes_what_is_idle() -> None:
    async with ready_stage() as stage:
        workflow, app = await opened(stage, listener=True), stage.app
        async with (
            client(stage, workflow.proxy_url) as agent,
            agent.stream("GET", url(stage.search, "/stream")) as stream,
        ):
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("data:")
            assert (await agent.get(url(stage.search))).status_code == 200
            await until(lambda: app.pool._idle)
            (idle,) = app.pool._idle[workflow.workflow.id]["search"]
            async with stub(stage, admin_pb2_grpc.AdminStub, operator=True) as operator:
                await operator.Revoke(admin_pb2.RevokeRequest(workflow_id=workflow.workflow.id, reissue=True))
            with pytest.raises(httpx.HTTPError):
                async with asyncio.timeout(10):
                    async for _ in lines:
                        pass
            assert not idle.alive and app.registry.get(workflow.workflow.id).is_open
            await until(lambda: not stage.search.streams)


async def test_bytes_that_come_before_connect_is_answered_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would be read as the beginning of TLS, or as a request that was never bound to the tunnel's destination."""
    async with ready_stage() as stage:
        port, target = port_of((await opened(stage, listener=True)).proxy_url), f"search.tool.test:{stage.search.port}"
        connect = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
        for early in (b"\r\n\x16\x03\x01", b"Content-Length: 3\r\n\r\n", b"\r\nGET / HTTP/1.1\r\n\r\n"):
            assert reason_of(await raw(port, connect.encode() + early)) == "early_data"
        leaf, begun, go_on = stage.app.plane.ca.leaf, threading.Event(), threading.Event()

        def slow(host: str) -> ssl.SSLContext:
            begun.set()
            go_on.wait(10)
            return leaf(host)

        monkeypatch.setattr(stage.app.plane.ca, "leaf", slow)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{connect}\r\n".encode())
        await until(begun.is_set)
        writer.write(b"\x16\x03\x01")
        await until(lambda: stage.app.plane.denials[-1].outcome == "early_data" and len(stage.app.plane.denials) == 4)
        go_on.set()
        answer = await asyncio.wait_for(reader.read(), 10)
        assert reason_of(answer) == "early_data" and answer.count(b"HTTP/1.1 ") == 1
        writer.close()


async def test_a_head_that_is_too_long_is_answered_and_read_no_further() -> None:
    async with ready_stage() as stage:
        port = port_of(stage.app.addresses["reverse"])
        for end in (b"", b"\r\n\r\n"):
            answer = await raw(port, b"GET /search/x HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"y" * MAX_HEAD + end)
            assert (answer[9:12], reason_of(answer)) == (b"431", "request_too_large")


async def test_l8_what_the_kernel_has_not_sent_at_the_close_is_not_sent_after_it() -> None:
    """A close(2) goes on sending what is queued: a tool that reads late would get a credential after the close."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        tool = Tool(name="t", scheme="http", authority=Authority("127.0.0.1", 9), issuer="i")
        _, upstream = await asyncio.get_running_loop().create_connection(
            lambda: Upstream(Outbox(), "wf", tool, "127.0.0.1"), *listening.getsockname()
        )
        far, _ = listening.accept()
        with far:
            upstream.write(b"x" * 200_000)
            assert upstream.transport is not None and upstream.transport.get_write_buffer_size() == 0
            upstream.abort()
            await asyncio.sleep(0)
            received = 0
            far.settimeout(10)
            with pytest.raises(ConnectionResetError):
                while data := far.recv(1 << 16):
                    received += len(data)
            assert received < 200_000


async def test_a_tool_that_takes_no_body_is_not_blamed_on_the_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    over = asyncio.Event()

    async def never_again(self: SilentTool, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.got.set()
        await over.wait()
        writer.close()

    monkeypatch.setattr(SilentTool, "_talk", never_again)
    async with Timed() as timed:
        reader, writer = await timed.to_the_tool(f"Content-Length: {64 << 20}\r\n\r\n")
        sending = asyncio.ensure_future(_upload(writer))
        await until(
            lambda: any(c.flow is not None and c.flow._tool_full for c in timed.stage.app.listeners.connections)
        )
        await timed.pass_time(10)
        assert timed.outcome()[0] == "upstream_timeout" and "took no byte of the request" in timed.outcome()[1]
        await sending
        with contextlib.suppress(ConnectionError):
            assert reason_of(await asyncio.wait_for(reader.read(), 10)) == "upstream_timeout"
        writer.close()
        over.set()


async def _upload(writer: asyncio.StreamWriter) -> None:
    """As much as there is room for, until the other side ends it."""
    with contextlib.suppress(ConnectionError):
        for _ in range(1024):
            writer.write(b"x" * (1 << 16))
            await writer.drain()


async def until(true: Any) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


async def test_an_agent_that_does_not_read_its_answer_is_told_apart_from_a_silent_tool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with Timed() as timed:
        timed.tool.says = b"HTTP/1.1 200 OK\r\nContent-Length: 67108864\r\n\r\n" + b"x" * (32 << 20)
        _, writer = await timed.to_the_tool()
        await until(lambda: any(c.choked for c in timed.stage.app.listeners.connections))
        await timed.pass_time(20)
        assert timed.outcome()[0] == "request_timeout" and "the agent took no byte" in timed.outcome()[1]
        writer.close()


async def test_a_connection_whose_last_answer_is_not_followed_by_its_end_is_ended() -> None:
    async with Timed() as timed:
        _, writer = await timed.connect("nonsense\r\n\r\n")
        await until(lambda: any(c._discarding for c in timed.stage.app.listeners.connections))
        await timed.pass_time(4)
        await until(lambda: not timed.stage.app.listeners.connections)
        writer.close()


async def test_idle_connections_to_tools_have_an_age_and_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.proxy.pool.MAX_IDLE_ALL", 2)
    async with Timed() as timed:
        timed.tool.says = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
        pool = timed.stage.app.pool
        agents = [await timed.to_the_tool() for _ in range(4)]
        for reader, _ in agents:
            await asyncio.wait_for(reader.readuntil(b"ok"), 10)
        assert pool._idle_count == sum(len(i) for t in pool._idle.values() for i in t.values()) == 2
        await timed.pass_time(int(IDLE_SECONDS) // 2)
        assert pool._idle_count == 2
        await timed.pass_time(int(IDLE_SECONDS))
        assert pool._idle_count == 0 and not any(i for t in pool._idle.values() for i in t.values())
        for _, writer in agents:
            writer.close()


async def test_l1_a_foreign_uids_flood_takes_nobodys_place() -> None:
    async with ready_stage() as stage:
        few(stage)
        handle = (await opened(stage)).handle
        find = stage.app.plane.find_caller
        foreign = True

        def whose(*ends: Any) -> Caller:
            if foreign:
                raise CallerError(Reason.UNKNOWN_CALLER, "uid 65534 belongs to no declared agent")
            return find(*ends)

        stage.app.plane.find_caller = whose
        port = port_of(stage.app.addresses["reverse"])
        flood = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
        await until(lambda: len(stage.app.listeners.connections) >= 4)
        refused = [await asyncio.wait_for(reader.read(), 10) for reader, _ in flood[4:]]
        assert {reason_of(answer) for answer in refused} == {"unknown_caller"}
        foreign = False
        answer = await raw(port, head("GET", handle, "Connection: close", path="/search/v1/items"))
        assert answer.startswith(b"HTTP/1.1 200"), answer
        for _, writer in flood:
            writer.close()


async def test_beyond_the_limit_a_connection_is_refused_at_once_and_kept_no_longer() -> None:
    async with ready_stage() as stage:
        few(stage)
        stage.app.plane.callers = Callers(
            [Agent("demo", "spiffe://td/a", None, stage.app.callers.agents["demo"].uid, None)]
        )
        port = port_of(stage.app.addresses["reverse"])
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(8)]
        await until(lambda: len(stage.app.listeners.connections) == 8)
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert reason_of(await asyncio.wait_for(reader.read(), 10)) == "too_many_connections"
            writer.close()
        assert len(stage.app.listeners.connections) == 8
        for _, writer in held:
            writer.close()


def few(stage: Stage) -> None:
    """Leaves places for eight connections."""
    stage.app.plane.limits = stage.app.plane.limits.model_copy(update={"connections": 8})


async def test_the_record_says_how_much_went_out_and_how_much_came_back() -> None:
    """What a permitted tool is given is the way out of data: the audit has its size."""
    async with early_tool() as (stage, _, handle):
        records: list[FlowRecord] = []
        stage.app.audit.flow = records.append  # type: ignore[method-assign, assignment]
        port = port_of(stage.app.addresses["reverse"])
        for more, body in (
            ("Content-Length: 1000", b"x" * 1000),
            ("Transfer-Encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n"),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head("POST", handle, more) + body)
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\nok"), 10)
            writer.close()
        assert [(r.request_bytes, r.response_bytes) for r in records] == [(1000, 2), (3, 2)]
