"""The main job on real SPIRE and real Keycloak: ways to end, each dead by Keycloak's own introspection."""

import asyncio
import os
import shutil
import subprocess
import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from sidecar.model.workflow import CloseReason
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from tests.real.conftest import RealStage
from tests.real.servers import part
from tests.real.steps import confirmed, settled, used
from tests.stage import closed, opened, stub, url

pytestmark = [pytest.mark.real, pytest.mark.timeout(420)]


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


async def test_the_agent_itself_cannot_fetch_the_identity(stage: RealStage) -> None:
    """From the agent's side: another uid asks the same socket and gets nothing."""
    if os.getuid() != 0:
        pytest.fail("this test needs root, to become another uid")
    shared = stage.dir / "spire-agent"
    shutil.copy(part("bin/spire-agent"), shared)
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
