"""What is refused over gRPC has one reason in the answer, its metadata, the audit log, the metrics, and the last denials."""

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from sidecar.cli.stage import Stage
from sidecar.model.audit import FlowRecord
from sidecar.wire.spanlock.v1 import admin_pb2, admin_pb2_grpc, token_exchange_pb2_grpc
from sidecar.wire.spanlock.v1 import token_exchange_pb2 as exchange
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from tests.stage import opened, ready_stage, stub
from tests.telemetry.test_metrics import told

DENIALS = """
forbid(principal, action == Spanlock::Action::"workflow.open", resource) when { context.workflow == "no" };
forbid(principal, action == Spanlock::Action::"token.exchange", resource == Spanlock::Tool::"reports");
"""


class Strict(Stage):
    """Workflows of one name and exchanges for one tool are denied."""

    def write_files(self) -> None:
        super().write_files()
        with (self.dir / "policy.cedar").open("a") as policy:
            policy.write(DENIALS)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with Strict() as stage:
        assert await stage.app.svids.wait_ready(10)
        yield stage


async def reason_of(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    metadata: Any = caught.value.trailing_metadata()
    reason = str(dict(metadata)["x-spanlock-reason"])
    assert (caught.value.details() or "").startswith(f"{reason}: ")
    return reason


def recorded(stage: Stage) -> dict[str, Any]:
    """The last line of the audit log, which is the last denial too."""
    stage.app.audit.flush()
    line: dict[str, Any] = json.loads((stage.dir / "audit.jsonl").read_text().splitlines()[-1])
    denial = stage.app.plane.denials[-1]
    assert [line[field] for field in ("agent", "tool", "outcome", "detail")] == [
        denial.agent, denial.tool, denial.outcome, denial.detail
    ]  # fmt: skip
    return line


def is_from(line: dict[str, Any], rpc: str, status: grpc.StatusCode) -> bool:
    shown = tuple(line[field] for field in ("kind", "mode", "method", "status", "agent", "uid"))
    return shown == ("flow", "grpc", rpc, status.value[0], "demo", -1)


@pytest.mark.parametrize("held", [False, True], ids=["Open", "Hold"])
async def test_a_denied_open(stage: Stage, held: bool) -> None:
    async with stub(stage) as workflows:
        if held:
            call = workflows.Hold()
            await call.write(pb.HoldRequest(open=pb.OpenRequest(name="no")))
            assert await reason_of(call.read()) == "policy_denied"
        else:
            assert await reason_of(workflows.Open(pb.OpenRequest(name="no"))) == "policy_denied"
    line = recorded(stage)
    assert is_from(line, "Hold" if held else "Open", grpc.StatusCode.PERMISSION_DENIED)
    assert (line["outcome"], line["workflow"], line["tool"]) == ("policy_denied", "", "")
    assert told(stage.app)["spanlock_flows_total", "", "policy_denied"] == 1


async def test_a_denied_exchange(stage: Stage) -> None:
    workflow = (await opened(stage)).workflow.id
    async with stub(stage, token_exchange_pb2_grpc.TokenExchangeStub) as service:
        ask = service.Exchange(exchange.ExchangeRequest(workflow_id=workflow, tool="reports"))
        assert await reason_of(ask) == "policy_denied"
    line = recorded(stage)
    assert is_from(line, "Exchange", grpc.StatusCode.PERMISSION_DENIED)
    assert (line["workflow"], line["tool"]) == (workflow, "reports") and "token.exchange" in line["detail"]
    assert told(stage.app)["spanlock_flows_total", "policy_denied", "reports"] == 1
    async with stub(stage) as workflows:
        report = await workflows.Close(pb.CloseRequest(workflow_id=workflow))
    assert dict(report.refused) == {"policy_denied": 1}


async def test_the_operator_is_told_of_it_among_the_last_denials(stage: Stage) -> None:
    async with stub(stage) as workflows:
        await reason_of(workflows.Open(pb.OpenRequest(name="no")))
    async with stub(stage, admin_pb2_grpc.AdminStub, operator=True) as admin:
        (denial,) = (await admin.Status(admin_pb2.StatusRequest())).last_denials
        assert (denial.agent, denial.reason) == ("demo", "policy_denied") and "workflow.open" in denial.detail
        await reason_of(admin.CloseWorkflow(admin_pb2.CloseWorkflowRequest(workflow_id="wf_none")))
    assert len(stage.app.plane.denials) == 1, "what the operator is refused is nobody's denial"


async def test_messages_that_cannot_be_read_are_recorded_too(stage: Stage) -> None:
    bare: Any = {"request_serializer": bytes, "response_deserializer": bytes}
    async with grpc.aio.insecure_channel(f"unix:{stage.agent_socket}") as channel:
        for method in ("Workflows/Open", "TokenExchange/Exchange", "Workflows/Hold"):
            if method.endswith("Hold"):
                hold: Any = channel.stream_stream(f"/spanlock.v1.{method}", **bare)
                call = hold()
                await call.write(b"\xff\xff\xff")
                reason = await reason_of(call.read())
            else:
                reason = await reason_of(channel.unary_unary(f"/spanlock.v1.{method}", **bare)(b"\xff"))
            assert reason == "invalid_argument"
            assert is_from(recorded(stage), method.rpartition("/")[2], grpc.StatusCode.INVALID_ARGUMENT)


async def test_anothers_workflow_is_not_named_and_counts_no_refusal() -> None:
    async with ready_stage() as stage:
        theirs = stage.app.registry.open("other", name="theirs")
        async with stub(stage) as workflows:
            await reason_of(workflows.Renew(pb.RenewRequest(workflow_id=theirs.id)))
        assert (recorded(stage)["workflow"], dict(theirs.refused)) == ("", {})


async def test_a_flood_of_refused_calls_does_not_grow_what_is_kept(stage: Stage) -> None:
    async with stub(stage, token_exchange_pb2_grpc.TokenExchangeStub) as service:
        workflow = (await opened(stage)).workflow.id
        series = 0
        for number in range(200):
            asked = exchange.ExchangeRequest(workflow_id=workflow, tool=f"{number}" + "x" * 10_000)
            assert await reason_of(service.Exchange(asked)) == "unknown_tool"
            asked = exchange.ExchangeRequest(workflow_id=f"{number}" + "w" * 10_000, tool="search")
            assert await reason_of(service.Exchange(asked)) == "workflow_unknown"
            series = series or len(told(stage.app))
    kept = stage.app.plane.denials
    assert len(told(stage.app)) == series and len(kept) == kept.maxlen and len(stage.app.audit._queue) < 50
    assert max(len(str(field)) for record in kept for field in record) < 200
    assert isinstance(kept[-1], FlowRecord)
