"""Exchange and Release over gRPC: what may be asked for, what is handed out, and that it dies with its workflow."""

import json
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from sidecar.cli.stage import Stage
from sidecar.control.token_exchange_service import ACCESS_TOKEN_TYPE, HANDLE_TYPE
from sidecar.wire.spanlock.v1 import token_exchange_pb2 as pb
from sidecar.wire.spanlock.v1 import token_exchange_pb2_grpc
from tests.stage import closed, opened, ready_stage, stub, two_agents

EXPORTING = """\
- {{name: exported, url: "https://exported.tool.test", issuer: demo-issuer, audience: tool-search, resource: "https://r.test/", scopes: ["search:read", "search:write"], export: true, introspection: {{client_id: tool-search, secret_file: tool-search.secret}}}}
"""


async def exchanged(
    stage: Stage, workflow: str, tool: str = "exported", socket: Path | None = None, **fields: Any
) -> pb.ExchangeResponse:
    async with stub(stage, token_exchange_pb2_grpc.TokenExchangeStub, socket=socket) as service:
        answer: pb.ExchangeResponse = await service.Exchange(
            pb.ExchangeRequest(workflow_id=workflow, tool=tool, **fields)
        )
        return answer


async def refused(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    metadata: Any = caught.value.trailing_metadata()
    return str(dict(metadata)["x-spanlock-reason"]), str(caught.value.details())


async def test_a_real_token_is_handed_out_where_the_tool_says_so_and_dies_with_the_workflow() -> None:
    async with ready_stage(more=EXPORTING, policy_for=("exported",)) as stage:
        workflow = (await opened(stage)).workflow.id
        token = await exchanged(stage, workflow, requested_token_type=ACCESS_TOKEN_TYPE, scope=["search:read"])
        assert (token.issued_token_type, token.token_type, list(token.scope)) == (
            ACCESS_TOKEN_TYPE,
            "Bearer",
            ["search:read"],
        )
        claims = stage.issuer.active(token.access_token)
        assert claims is not None and (claims["aud"], claims["scope"]) == (["tool-search"], "search:read")
        assert token.expires_at.seconds == claims["exp"]
        async with httpx.AsyncClient(verify=False, trust_env=False) as outside:  # noqa: S501 - the token's check is what matters
            direct = f"https://127.0.0.1:{stage.search.port}/v1/items"
            bearer = {"authorization": f"Bearer {token.access_token}", "host": "search.tool.test"}
            assert (await outside.get(direct, headers=bearer)).status_code == 200
            report = await closed(stage, workflow)
            assert [(end.tool, end.at_issuer) for end in report.leases] == [("exported", "confirmed")]
            assert (await outside.get(direct, headers=bearer)).status_code == 401


async def test_a_handle_is_one_for_a_lease_and_says_nothing() -> None:
    async with ready_stage() as stage:
        workflow = (await opened(stage)).workflow.id
        first, again = [await exchanged(stage, workflow, "search") for _ in range(2)]
        assert (first.access_token, first.lease_id) == (again.access_token, again.lease_id)
        assert (first.issued_token_type, first.token_type) == (HANDLE_TYPE, "N_A")
        assert stage.issuer.active(first.access_token) is None


@pytest.mark.parametrize(
    ("fields", "reason", "says"),
    [
        ({"tool": "nowhere"}, "unknown_tool", "no tool"),
        ({"scope": ["reports:read"]}, "invalid_argument", "scope: more than tool exported"),
        ({"audience": "tool-reports"}, "invalid_argument", "audience:"),
        ({"resource": "https://other.test/"}, "invalid_argument", "resource:"),
        (
            {"requested_token_type": "urn:ietf:params:oauth:token-type:saml2"},
            "invalid_argument",
            "requested_token_type:",
        ),
        ({"tool": "search", "requested_token_type": ACCESS_TOKEN_TYPE}, "export_refused", "does not allow export"),
        ({"workflow": "wf_none"}, "workflow_unknown", "no such workflow"),
    ],
)
async def test_what_may_not_be_asked_for_is_named_and_costs_no_exchange(
    fields: dict[str, Any], reason: str, says: str
) -> None:
    async with ready_stage(more=EXPORTING, policy_for=("exported",)) as stage:
        workflow = (await opened(stage)).workflow.id
        given = await refused(exchanged(stage, **{"workflow": workflow, **fields}))
        assert given[0] == reason and says in given[1]
        assert stage.issuer.minted == 0


async def test_audience_and_resource_may_be_repeated_when_they_are_the_tools_own() -> None:
    async with ready_stage(more=EXPORTING, policy_for=("exported",)) as stage:
        workflow = (await opened(stage)).workflow.id
        await exchanged(stage, workflow, audience="tool-search", resource="https://r.test/")
        await closed(stage, workflow)
        assert (await refused(exchanged(stage, workflow)))[0] == "workflow_closed"


async def test_release_names_one_lease_of_ones_own() -> None:
    async with ready_stage() as stage:
        workflow = (await opened(stage)).workflow.id
        lease = (await exchanged(stage, workflow, "search")).lease_id
        async with stub(stage, token_exchange_pb2_grpc.TokenExchangeStub) as service:
            assert (await refused(service.Release(pb.ReleaseRequest())))[0] == "invalid_argument"
            assert (await refused(service.Release(pb.ReleaseRequest(lease_id="ls_none"))))[0] == "lease_gone"
            assert (await refused(service.Release(pb.ReleaseRequest(access_token="slh_none"))))[0] == "handle_invalid"
            assert (await service.Release(pb.ReleaseRequest(lease_id=lease))).at_issuer == "confirmed"
            assert (await refused(service.Release(pb.ReleaseRequest(lease_id=lease))))[0] == "lease_gone"
        assert (await exchanged(stage, workflow, "search")).lease_id != lease


async def test_an_exported_token_is_released_by_itself_and_its_leaving_is_in_the_audit_log() -> None:
    async with ready_stage(more=EXPORTING, policy_for=("exported",)) as stage:
        workflow = (await opened(stage)).workflow.id
        token = await exchanged(stage, workflow, requested_token_type=ACCESS_TOKEN_TYPE)
        stage.app.audit.flush()
        lines = [json.loads(line) for line in (stage.dir / "audit.jsonl").read_text().splitlines()]
        (left,) = [line for line in lines if line.get("event") == "exported"]
        assert (left["kind"], left["agent"], left["tool"], left["workflow"]) == ("lease", "demo", "exported", workflow)
        assert left["lease"] == token.lease_id
        assert abs(left["expires_at"] - token.expires_at.ToNanoseconds() / 1e9) < 1, "that of the token, as it was told"
        assert token.access_token not in str(lines)
        async with stub(stage, token_exchange_pb2_grpc.TokenExchangeStub) as service:
            release = pb.ReleaseRequest(access_token=token.access_token)
            assert (await service.Release(release)).at_issuer == "confirmed"
            assert stage.issuer.active(token.access_token) is None
            assert (await refused(service.Release(release)))[0] == "handle_invalid"


async def test_another_agents_workflow_and_lease_are_nobodys_to_use_or_end() -> None:
    """An id is no secret, it stands in reports and logs: what it names is its own agent's alone."""
    async with two_agents() as stage:
        workflow = (await opened(stage)).workflow.id
        lease = (await exchanged(stage, workflow, "search")).lease_id
        minted = stage.issuer.minted
        theirs = exchanged(stage, workflow, "search", socket=stage.other_socket)
        assert (await refused(theirs))[0] == "workflow_unknown" and stage.issuer.minted == minted
        async with stub(stage, token_exchange_pb2_grpc.TokenExchangeStub, socket=stage.other_socket) as service:
            assert (await refused(service.Release(pb.ReleaseRequest(lease_id=lease))))[0] == "lease_gone"
        assert [held.id for held in stage.app.broker.leases()] == [lease] and not stage.issuer.revoked
