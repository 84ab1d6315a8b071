"""The main job end to end on the embedded stage: real gRPC, real TLS, real token exchange, every way to bind and to end."""

import asyncio
import os

import grpc
import httpx
import pytest
from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc_exporter
from opentelemetry.exporter.otlp.proto.http import trace_exporter as http_exporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter

from sidecar.errors import Reason
from sidecar.model.workflow import CloseReason
from sidecar.wire.spanlock.v1 import admin_pb2, admin_pb2_grpc, token_exchange_pb2, token_exchange_pb2_grpc
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from tests.stage import client, closed, opened, port_of, raw, ready_stage, stub, url


async def test_credentials_live_exactly_as_long_as_the_workflow() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            for tool in (stage.search, stage.reports):
                assert (await agent.get(url(tool))).status_code == 200
            token = stage.search.authorized[-1].removeprefix("Bearer ")
            assert stage.issuer.active(token) is not None
            report = await closed(stage, workflow.workflow.id)
            assert stage.issuer.active(token) is None
            with pytest.raises(httpx.HTTPError):
                (await agent.get(url(stage.search))).raise_for_status()
        ends = {end.tool: end for end in report.leases}
        assert {end.at_issuer for end in ends.values()} == {"confirmed"}
        assert ends["search"].residual.ToNanoseconds() == 0
        assert 200 < ends["reports"].residual.seconds <= 300


async def test_both_tokens_of_the_two_step_way_are_revoked() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            await agent.get(url(stage.search))
        assert stage.issuer.minted == 2
        await closed(stage, workflow.workflow.id)
        assert stage.issuer.revocations == 2


async def test_the_svid_itself_as_subject() -> None:
    async with ready_stage(subject="svid") as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            assert (await agent.get(url(stage.search))).status_code == 200
        assert stage.issuer.minted == 1


async def test_one_exchange_for_many_calls_at_once() -> None:
    async with ready_stage(subject="svid") as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            answers = await asyncio.gather(*(agent.get(url(stage.search, f"/{n}")) for n in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert stage.issuer.minted == 1


async def test_binding_by_handle_and_by_traceparent() -> None:
    async with ready_stage() as stage:
        trace = "0af7651916cd43dd8448eb211c80319c"
        workflow = await opened(stage, trace_id=trace)
        explicit = f"127.0.0.1:{port_of(stage.app.addresses['explicit'])}"
        async with client(stage, f"http://spanlock:{workflow.handle}@{explicit}") as agent:
            assert (await agent.get(url(stage.search))).status_code == 200
        async with client(stage, f"http://{explicit}") as agent:
            headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01"}
            assert (await agent.get(url(stage.search), headers=headers)).status_code == 200
            answer = await agent.get(url(stage.search))
            assert (answer.status_code, answer.headers["x-spanlock-reason"]) == (403, "no_workflow")


async def test_the_base_url_mode_binds_by_credential_handle() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage)
        async with stub(stage, token_exchange_pb2_grpc.TokenExchangeStub) as exchange:
            issued = await exchange.Exchange(
                token_exchange_pb2.ExchangeRequest(workflow_id=workflow.workflow.id, tool="search")
            )
            assert issued.token_type == "N_A" and issued.access_token.startswith("slh_")
            base = f"http://{stage.app.addresses['reverse']}"
            headers = {"authorization": f"Bearer {issued.access_token}"}
            async with httpx.AsyncClient(trust_env=False) as agent:
                assert (await agent.get(f"{base}/search/v1/items?q=1", headers=headers)).status_code == 200
                wrong = await agent.get(f"{base}/reports/v1/items", headers=headers)
                assert (wrong.status_code, wrong.headers["x-spanlock-reason"]) == (407, "handle_invalid")
                released = await exchange.Release(token_exchange_pb2.ReleaseRequest(access_token=issued.access_token))
                assert released.at_issuer == "confirmed"
                dead = await agent.get(f"{base}/search/v1/items", headers=headers)
                assert dead.status_code == 407
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await exchange.Exchange(
                    token_exchange_pb2.ExchangeRequest(
                        workflow_id=workflow.workflow.id,
                        tool="search",
                        requested_token_type="urn:ietf:params:oauth:token-type:access_token",
                    )
                )
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_admin_is_unimplemented_on_an_agents_socket() -> None:
    async with ready_stage() as stage:
        async with stub(stage, admin_pb2_grpc.AdminStub) as admin:
            calls = {
                "Status": admin_pb2.StatusRequest(), "ListWorkflows": admin_pb2.ListWorkflowsRequest(),
                "CloseWorkflow": admin_pb2.CloseWorkflowRequest(), "Leases": admin_pb2.LeasesRequest(),
                "Revoke": admin_pb2.RevokeRequest(all=True), "Reload": admin_pb2.ReloadRequest(),
            }  # fmt: skip
            assert set(calls) == set(admin_pb2.DESCRIPTOR.services_by_name["Admin"].methods_by_name)
            for name, request in calls.items():
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await getattr(admin, name)(request)
                assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        async with stub(stage, admin_pb2_grpc.AdminStub, operator=True) as admin:
            assert (await admin.Status(admin_pb2.StatusRequest())).ready
        assert stage.operator_socket.stat().st_mode & 0o777 == 0o600
        assert stage.operator_socket.parent.stat().st_mode & 0o777 == 0o700
        assert stage.agent_socket.stat().st_mode & 0o777 == 0o660


async def test_the_end_of_hold_closes() -> None:
    async with ready_stage() as stage:
        async with stub(stage) as workflows:
            stream = workflows.Hold()
            await stream.write(pb.HoldRequest(open=pb.OpenRequest(name="held")))
            workflow = (await stream.read()).opened.workflow
            noun = stage.app.registry.get(workflow.id)
            gone = stage.app.registry.wait_closed(noun)
            stream.cancel()
            await asyncio.wait_for(gone, 5)
        assert noun.close_reason is CloseReason.HOLDER_GONE


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_the_root_span_in_otlp_closes(protocol: str) -> None:
    async with ready_stage() as stage:
        exporter: SpanExporter = (
            http_exporter.OTLPSpanExporter(endpoint=f"http://127.0.0.1:{stage.app.otlp.http_port}/v1/traces")
            if protocol == "http"
            else grpc_exporter.OTLPSpanExporter(endpoint=f"127.0.0.1:{stage.app.otlp.grpc_port}", insecure=True)
        )
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        root = provider.get_tracer("test").start_span("invoke_workflow")
        trace_id = f"{root.get_span_context().trace_id:032x}"
        noun = stage.app.registry.get((await opened(stage, trace_id=trace_id)).workflow.id)
        gone = stage.app.registry.wait_closed(noun)
        await asyncio.to_thread(root.end)
        await asyncio.wait_for(gone, 5)
        assert noun.close_reason is CloseReason.SPAN_ENDED


async def test_an_operator_withdraws_with_and_without_reissue() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with (
            client(stage, workflow.proxy_url) as agent,
            stub(stage, admin_pb2_grpc.AdminStub, operator=True) as admin,
        ):
            await agent.get(url(stage.search))
            first = stage.search.authorized[-1]
            done = await admin.Revoke(admin_pb2.RevokeRequest(tool="search", reissue=True))
            assert [end.at_issuer for end in done.ends] == ["confirmed"]
            assert (await agent.get(url(stage.search))).status_code == 200
            assert stage.search.authorized[-1] != first
            await admin.Revoke(admin_pb2.RevokeRequest(workflow_id=workflow.workflow.id))
            barred = await agent.get(url(stage.search))
            assert (barred.status_code, barred.headers["x-spanlock-reason"]) == (503, str(Reason.LEASE_GONE))


async def test_a_failed_revocation_is_reported_as_failed_and_retried() -> None:
    more = "credentials: {{revoke_deadline: 0.3}}\n"
    async with ready_stage(more=more) as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            await agent.get(url(stage.search))
        token = stage.search.authorized[-1].removeprefix("Bearer ")
        stage.issuer.down = True
        report = await closed(stage, workflow.workflow.id)
        assert [end.at_issuer for end in report.leases] == ["failed"]
        assert report.leases[0].residual.seconds > 200
        assert stage.app.broker.revoker.backlog == 2
        stage.issuer.down = False
        async with asyncio.timeout(20):
            while stage.app.broker.revoker.backlog:
                await asyncio.sleep(0.02)
        assert stage.issuer.active(token) is None


async def test_uploads_and_expect_100_continue() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        body = os.urandom(3 << 20)
        async with client(stage, workflow.proxy_url) as agent:
            answer = await agent.put(url(stage.search), content=body, headers={"expect": "100-continue"})
        import hashlib

        assert answer.json()["body_sha256"] == hashlib.sha256(body).hexdigest()


async def test_a_report_counts_the_refused_calls_of_its_workflow_and_of_its_listener() -> None:
    """An agent whose client shows no body would see nothing but a 403 otherwise."""
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        port = port_of(workflow.proxy_url)
        await raw(port, b"CONNECT nowhere.test:443 HTTP/1.1\r\nHost: nowhere.test:443\r\n\r\n")
        for path in ("/admin/x", "/admin/y"):
            async with client(stage, workflow.proxy_url) as agent:
                assert (await agent.get(url(stage.search, path))).headers["x-spanlock-reason"] == "policy_denied"
        report = await closed(stage, workflow.workflow.id)
        assert dict(report.refused) == {"unknown_tool": 1, "policy_denied": 2} and not report.leases
