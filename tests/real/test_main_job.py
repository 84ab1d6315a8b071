"""The main job on real SPIRE and real Keycloak: five ways to end, each dead by Keycloak's own introspection."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from sidecar.model.workflow import CloseReason
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from tests.real.conftest import RealStage
from tests.stage import client, closed, opened, stub, url

pytestmark = [pytest.mark.real, pytest.mark.timeout(420)]


async def used(stage: RealStage, proxy: str) -> str:
    """One call through the workflow's listener; the token that the tool saw, which Keycloak says is active."""
    async with client(stage, proxy) as agent:
        answer = await agent.get(url(stage.search))
        assert answer.status_code == 200, answer.text
    token = stage.search.authorized[-1].removeprefix("Bearer ")
    assert await stage.search.active(token), "the positive control"
    return token


async def settled(stage: RealStage, workflow_id: str) -> pb.CloseResponse:
    """The report of a workflow that something else closes."""
    noun = stage.app.registry.find(workflow_id)
    assert noun is not None
    await asyncio.wait_for(stage.app.registry.wait_closed(noun), 20)
    return await closed(stage, workflow_id)


def confirmed(report: pb.CloseResponse) -> None:
    assert [(end.tool, end.at_issuer, end.residual.ToNanoseconds()) for end in report.leases] == [
        ("search", "confirmed", 0)
    ]


async def test_closed_by_grpc(stage: RealStage) -> None:
    workflow = await opened(stage, listener=True)
    token = await used(stage, workflow.proxy_url)
    confirmed(await closed(stage, workflow.workflow.id))
    assert not await stage.search.active(token)


async def test_closed_by_the_holders_death(stage: RealStage) -> None:
    async with stub(stage) as workflows:
        stream = workflows.Hold()
        await stream.write(pb.HoldRequest(open=pb.OpenRequest(name="held", listener=True)))
        workflow = (await stream.read()).opened
        token = await used(stage, workflow.proxy_url)
        stream.cancel()
        report = await settled(stage, workflow.workflow.id)
    assert report.reason == CloseReason.HOLDER_GONE
    confirmed(report)
    assert not await stage.search.active(token)


async def test_closed_by_the_root_span_in_otlp(stage: RealStage) -> None:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    provider = TracerProvider()
    endpoint = f"http://127.0.0.1:{stage.app.otlp.http_port}/v1/traces"
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    root = provider.get_tracer("test").start_span("invoke_workflow")
    workflow = await opened(stage, listener=True, trace_id=f"{root.get_span_context().trace_id:032x}")
    token = await used(stage, workflow.proxy_url)
    await asyncio.to_thread(root.end)
    report = await settled(stage, workflow.workflow.id)
    assert report.reason == CloseReason.SPAN_ENDED
    confirmed(report)
    assert not await stage.search.active(token)


async def test_closed_by_its_maximum_age(stage: RealStage) -> None:
    request = pb.OpenRequest(name="short", listener=True)
    request.max_age.FromSeconds(4)
    async with stub(stage) as workflows:
        workflow = await workflows.Open(request)
    token = await used(stage, workflow.proxy_url)
    report = await settled(stage, workflow.workflow.id)
    assert report.reason == CloseReason.MAX_AGE
    confirmed(report)
    assert not await stage.search.active(token)


async def test_closed_by_the_end_of_exec(stage: RealStage) -> None:
    environment = {**os.environ, "SPANLOCK_SOCKET": str(stage.agent_socket)}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "exec", "--", "curl", "-sS", url(stage.search),
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert (process.returncode, out) == (0, b'{"ok": true}'), err.decode()
    assert "1 confirmed dead" in err.decode().splitlines()[-1]
    assert not await stage.search.active(stage.search.authorized[-1].removeprefix("Bearer "))


async def test_a_spire_agent_that_is_killed_and_restarted_fails_nothing(stage: RealStage) -> None:
    workflow = await opened(stage, listener=True)
    token = await used(stage, workflow.proxy_url)
    await asyncio.to_thread(stage.spire.kill_agent)
    async with client(stage, workflow.proxy_url) as agent:
        assert (await agent.get(url(stage.search))).status_code == 200
    confirmed(await closed(stage, workflow.workflow.id))
    assert not await stage.search.active(token), "revocation outlives the outage: a JWT-SVID was held"
    await asyncio.to_thread(stage.spire.restart_agent)
    again = await opened(stage, listener=True)
    await used(stage, again.proxy_url)
    await closed(stage, again.workflow.id)


async def test_the_agent_itself_cannot_fetch_the_identity(stage: RealStage) -> None:
    """From the agent's side: another uid asks the same socket and gets nothing."""
    if os.getuid() != 0:
        pytest.fail("this test needs root, to become another uid")
    shared = stage.dir / "spire-agent"
    shutil.copy(str(stage.spire.agent.args[0]), shared)
    for path in (
        *reversed(stage.dir.parents),
        stage.dir,
        shared,
        *reversed(stage.spire.socket.parents),
        stage.spire.socket,
    ):
        if str(path).startswith("/tmp/"):
            path.chmod(path.stat().st_mode | 0o005)
    words = [str(shared), "api", "fetch", "x509", "-socketPath", str(stage.spire.socket), "-timeout", "3s"]
    ours = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=False)
    assert ours.returncode == 0, ours.stderr
    theirs = await asyncio.to_thread(
        subprocess.run, words, user=65534, group=65534, capture_output=True, text=True, check=False
    )
    assert theirs.returncode != 0 and "no identity issued" in theirs.stderr + theirs.stdout


async def test_keycloak_stopped_and_started(stage: RealStage) -> None:
    workflow = await opened(stage, listener=True)
    await used(stage, workflow.proxy_url)
    os.killpg(stage.keycloak.process.pid, signal.SIGSTOP)
    other = await opened(stage, listener=True)
    try:
        noun = stage.app.registry.get(workflow.workflow.id)
        closing = stage.app.registry.close(noun, CloseReason.CLOSED)
        assert not stage.app.broker.leases(workflow=workflow.workflow.id), "dropped here at once, whoever is down"
        report = await closing
        assert [str(end.at_issuer) for end in report.ends] == ["failed"]
    finally:
        os.killpg(stage.keycloak.process.pid, signal.SIGCONT)
    async with asyncio.timeout(60):
        while stage.app.broker.revoker.backlog:
            await asyncio.sleep(0.1)
    assert not await stage.search.active(stage.search.authorized[-1].removeprefix("Bearer "))
    await used(stage, other.proxy_url)
    await closed(stage, other.workflow.id)
