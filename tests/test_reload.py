"""A reload under life: nothing of the old configuration is used once the new one holds, and what was minted is still revoked."""

import asyncio
from typing import Any

import grpc
import httpx
import pytest

from sidecar.cli.stage import AGENT_ID, Stage
from sidecar.config.load import parse
from sidecar.credentials.broker import Broker
from sidecar.demo.pki import DemoPki
from sidecar.demo.token_service import DemoTokenService
from sidecar.model.lease import Lease
from sidecar.proxy.pool import Pool
from sidecar.proxy.upstream import Upstream
from sidecar.wire.spanlock.v1 import token_exchange_pb2, token_exchange_pb2_grpc
from tests.stage import call, client, closed, opened, port_of, ready_stage, reason_of, stub, tunnel, url

NO_EXCHANGE = """permit(principal, action, resource);
forbid(principal, action == Spanlock::Action::"token.exchange", resource);
"""


async def reloaded(stage: Stage, *changes: tuple[str, str]) -> Any:
    """The reload of a configuration file with these texts exchanged."""
    text = stage.config_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (stage.dir / "spanlock.yaml").write_text(text)
    return await stage.app.reload()


def living(stage: Stage) -> int:
    """Tokens that the issuer has minted and not taken back."""
    return stage.issuer.minted - len(stage.issuer.revoked)


def without_search(stage: Stage) -> str:
    """The configuration without the tool that most calls here go to."""
    head, _, rest = stage.config_text().partition("- name: search")
    return head + "- name: reports" + rest.partition("- name: reports")[2]


async def test_an_idle_connection_to_where_a_tool_was_is_not_used_for_where_it_is() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage)
        assert b"200 OK" in await call(stage, workflow.handle)
        noun = stage.app.registry.get(workflow.workflow.id)
        (idle,) = stage.app.pool._idle[noun.id]["search"]
        stage.app._apply(
            parse(stage.config_text().replace("address: 127.0.0.1", "address: 127.0.0.2"), "new", stage.dir)
        )
        assert stage.app.pool.take(noun, stage.app.plane.router.by_name("search")) is None
        assert not idle.alive


async def test_a_tunnel_to_a_tool_that_is_gone_carries_nothing_more() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage)
        port = port_of(stage.app.addresses["explicit"])
        async with tunnel(stage, port, stage.search) as (reader, writer):
            call = f"GET /v1/items HTTP/1.1\r\nHost: search.tool.test:{stage.search.port}\r\nx-spanlock-workflow: {workflow.handle}\r\n\r\n"
            writer.write(call.encode())
            assert b"200 OK" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            served = stage.search.requests
            stage.app._apply(parse(without_search(stage), "new", stage.dir))
            writer.write(call.encode())
            answer = b""
            while b"x-spanlock-reason" not in answer:
                answer += await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
            assert reason_of(answer) == "unknown_tool"
        assert stage.search.requests == served


async def test_a_route_of_the_old_tool_is_not_remembered_for_the_new_one() -> None:
    """The tunnel's own tool is the old one; the path that it asks for must not be kept in the new router's memo."""
    async with ready_stage() as stage:
        workflow = await opened(stage)
        assert b"200 OK" in await call(stage, workflow.handle)
        old = stage.app.plane.router.by_name("search")
        await reloaded(stage, ("audience: tool-search", "audience: tool-search\n  header: x-api-key"))
        router = stage.app.plane.router
        with pytest.raises(Exception, match="changed or removed"):
            router.route(old, b"/v1/items")
        assert router.route(router.by_name("search"), b"/v1/items").ours == b"x-api-key: "


@pytest.mark.parametrize("stage_of_call", ["dial", "exchange"])
async def test_a_call_under_way_to_a_tool_that_is_gone_sends_nothing(
    stage_of_call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage)
        dial, lease = Pool.dial, Broker.lease

        def reload() -> None:
            monkeypatch.undo()
            stage.app._apply(parse(without_search(stage), "new", stage.dir))

        async def dialled(pool: Pool, *of: Any) -> Upstream:
            upstream = await dial(pool, *of)
            reload()
            return upstream

        async def exchanged(broker: Broker, *of: Any) -> Lease:
            found = await lease(broker, *of)
            reload()
            return found

        if stage_of_call == "dial":
            monkeypatch.setattr(Pool, "dial", dialled)
        else:
            monkeypatch.setattr(Broker, "lease", exchanged)
        answer = await call(stage, workflow.handle)
        assert reason_of(answer) == "unknown_tool" and stage.search.requests == 0
        assert bool(stage.issuer.minted) is (stage_of_call == "exchange")
        await closed(stage, workflow.workflow.id)
        assert not living(stage), "what was minted for the tool that is gone is revoked"


async def test_an_agent_that_is_declared_otherwise_is_refused_whole() -> None:
    async with ready_stage() as stage:
        epoch = stage.app.decider.epoch
        for old, new in (('/agent"', '/other"'), ("name: demo, ", 'name: demo, hint: "x", ')):
            answer = await reloaded(stage, (old, new))
            assert not answer.applied and "demo cannot change while running" in answer.errors[0]
        assert stage.app.decider.epoch == epoch


async def test_what_needs_a_restart_is_said_until_it_has_been() -> None:
    async with ready_stage() as stage:
        limits = ("drain_seconds: 0.2", "drain_seconds: 0.3")
        host = ("https://search.tool.test", "https://find.tool.test")
        for _ in range(2):
            answer = await reloaded(stage, limits, host)
            assert answer.applied and answer.needs_restart[0] == "limits"
            assert answer.needs_restart[1].startswith("tools (a new https host")
        assert not (await reloaded(stage)).needs_restart


async def test_an_agent_that_is_gone_opens_nothing_on_the_socket_that_is_left() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage)
        assert (await reloaded(stage, ("{name: demo,", "{name: renamed,"))).applied
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await opened(stage)
        assert "declared no more" in str(refused.value.details())
        assert (await closed(stage, workflow.workflow.id)).reason == "agent_removed"


async def test_an_issuer_that_a_reload_mends_takes_back_what_is_waiting() -> None:
    more = "credentials: {{revoke_deadline: 0.3}}\n"
    async with ready_stage(more=more) as stage:
        workflow = await opened(stage)
        assert b"200 OK" in await call(stage, workflow.handle)
        subject = "subject: client_credentials"
        broken = f'{subject}, token_endpoint: "http://127.0.0.1:1/", revocation_endpoint: "http://127.0.0.1:1/"'
        assert (await reloaded(stage, (subject, broken))).applied
        report = await closed(stage, workflow.workflow.id)
        assert [end.at_issuer for end in report.leases] == ["failed"] and living(stage)
        assert (await reloaded(stage)).applied
        async with asyncio.timeout(20):
            while stage.app.broker.revoker.backlog:
                await asyncio.sleep(0.02)
        assert not living(stage)


async def test_a_ca_file_is_read_again() -> None:
    async with ready_stage() as stage:
        right = (stage.dir / "tools-ca.pem").read_text()
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            (stage.dir / "tools-ca.pem").write_text(DemoPki().pem)
            assert (await agent.get(url(stage.search))).headers["x-spanlock-reason"] == "upstream_tls"
            (stage.dir / "tools-ca.pem").write_text(right)
            await reloaded(stage)
            answer: httpx.Response = await agent.get(url(stage.search))
            assert answer.status_code == 200


async def test_another_server_behind_an_issuers_name_never_sees_the_tokens_of_the_first() -> None:
    """What the first minted is revoked there, at once: a lease of the old server is not used on."""
    async with ready_stage() as stage:
        other = DemoTokenService(stage.spire.jwks, {}, {})
        await other.start()
        workflow = await opened(stage)
        assert b"200 OK" in await call(stage, workflow.handle)
        assert (await reloaded(stage, (stage.issuer.issuer, other.issuer))).applied
        async with asyncio.timeout(10):
            while living(stage):
                await asyncio.sleep(0.01)
        assert other.revocations == 0, "no token of the first was shown to the second"
        report = await closed(stage, workflow.workflow.id)
        assert [end.at_issuer for end in report.leases] == ["confirmed"]
        await other.stop()


async def test_the_name_of_an_agent_that_was_removed_goes_to_nobody_else() -> None:
    """Its socket is open still: whoever has it would be the new agent."""
    async with ready_stage() as stage:
        declared = "{name: demo,"
        assert (await reloaded(stage, (declared, "{name: renamed,"))).applied
        changed = stage.config_text().replace(AGENT_ID, AGENT_ID + "/payments")
        (stage.dir / "spanlock.yaml").write_text(changed)
        answer = await stage.app.reload()
        assert not answer.applied and "demo cannot change while running" in answer.errors[0]


async def test_a_token_that_a_reload_forbids_during_its_exchange_is_not_handed_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage)
        lease, here, go_on = Broker.lease, asyncio.Event(), asyncio.Event()

        async def slow(self: Broker, *arguments: Any) -> Lease:
            found = await lease(self, *arguments)
            here.set()
            await go_on.wait()
            return found

        monkeypatch.setattr(Broker, "lease", slow)
        async with stub(stage, token_exchange_pb2_grpc.TokenExchangeStub) as exchange:
            request = token_exchange_pb2.ExchangeRequest(workflow_id=workflow.workflow.id, tool="search")
            asked = asyncio.ensure_future(exchange.Exchange(request))
            await here.wait()
            (stage.dir / "policy.cedar").write_text(NO_EXCHANGE)
            assert (await stage.app.reload()).applied
            go_on.set()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await asked
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_call_that_begins_right_after_a_reload_keeps_its_lease() -> None:
    """The withdrawal of what the old tool had runs a step later, by name, and takes the new tool's first lease with it."""
    async with ready_stage() as stage:
        app = stage.app
        text = stage.config_text().replace("audience: tool-search\n", "audience: tool-search\n  max_ttl: 60\n", 1)
        (stage.dir / "spanlock.yaml").write_text(text)
        workflow = app.registry.open("demo", name="w")
        assert (await app.reload()).applied
        tool = app.plane.router.by_name("search")
        assert await app.broker.lease(workflow, tool, app.decider.decide_exchange(workflow, tool, tool.scopes))
