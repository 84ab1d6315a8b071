"""The README's table: each row's losses, and that the tests which it names are there."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import grpc.aio
import httpx
import pytest

from sidecar.identity.workload_api import WorkloadApi
from sidecar.wire.spanlock.v1 import admin_pb2, admin_pb2_grpc, token_exchange_pb2, token_exchange_pb2_grpc
from tests.stage import client, closed, opened, ready_stage, stub, url

ROOT = Path(__file__).parents[1]
_ANOTHER = """
import sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"x-spanlock-workflow": sys.stdin.read()})
try:
    print(urllib.request.urlopen(request).status)
except urllib.error.HTTPError as error:
    print(error.code, error.headers["x-spanlock-reason"])
"""


async def test_a_prompt_injected_agent_has_the_use_of_its_tools_within_policy_and_no_value() -> None:
    """All that ever reaches it is looked through for what the tools and the issuer saw."""
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        got = [workflow.SerializeToString()]
        async with stub(stage, token_exchange_pb2_grpc.TokenExchangeStub) as exchange:
            asked = token_exchange_pb2.ExchangeRequest(workflow_id=workflow.workflow.id, tool="search")
            got.append((await exchange.Exchange(asked)).SerializeToString())
        async with stub(stage, admin_pb2_grpc.AdminStub) as admin:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await admin.Leases(admin_pb2.LeasesRequest())
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        async with client(stage, workflow.proxy_url) as agent:
            answers = [await agent.get(url(tool)) for tool in (stage.search, stage.reports)]
            answers.append(await agent.get(url(stage.search, "/admin")))
        got += [answer.content + repr(answer.headers).encode() for answer in answers]
        assert [answer.status_code for answer in answers] == [200, 200, 403]
        tokens = {a.removeprefix("Bearer ") for tool in (stage.search, stage.reports) for a in tool.authorized}
        svids = {cached.token.reveal() for cached in stage.app.svids._cache.values()}
        assert len(tokens) >= 2 and svids
        assert not [value for value in tokens | svids if value.encode() in b"".join(got)]
        await closed(stage, workflow.workflow.id)
        with pytest.raises(httpx.HTTPError):
            async with client(stage, workflow.proxy_url) as agent:
                await agent.get(url(stage.search))


async def test_another_process_of_the_agents_uid_has_the_same_use_until_the_close_and_on_same_uid_the_svid() -> None:
    """A uid is all that can be told apart here; on a set-up where the sidecar has the agent's uid, SPIRE cannot either."""
    async with ready_stage() as stage:
        workflow = await opened(stage)
        words = [sys.executable, "-I", "-c", _ANOTHER, f"http://{stage.app.addresses['reverse']}/search/v1/items"]

        async def another() -> str:
            done = await asyncio.to_thread(
                subprocess.run, words, input=workflow.handle, capture_output=True, text=True, check=True
            )
            return str(done.stdout).strip()

        assert await another() == "200"
        api = WorkloadApi(f"unix://{stage.dir}/spire.sock")
        async for svids in api.x509_svids():
            assert svids[0].spiffe_id.startswith("spiffe://")  # not prevented: `check` warns of it
            break
        await api.aclose()
        await closed(stage, workflow.workflow.id)
        assert await another() == "407 handle_invalid"


def test_every_test_that_the_readme_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    there = {
        name for path in ROOT.glob("tests/**/test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    for named in set(re.findall(r"`(test_\w+\*?)`", text)):
        assert any(re.fullmatch(named.replace("*", r"\w*"), name) for name in there), named
    for path in set(re.findall(r"`(tests/[\w./]+)`", text)):
        assert (ROOT / path).exists(), path
