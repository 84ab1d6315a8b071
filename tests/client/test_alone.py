"""The library in a real virtual environment that has it, what it asks for and nothing else: no network, one wheel of this tree."""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from sidecar.cli.stage import Stage
from tests.stage import ready_stage, url

ROOT = Path(__file__).parents[2]
WORK = """
import json, sys, urllib.request
from importlib import metadata
from sidecar.client.workflow import workflow
with workflow("alone", socket=sys.argv[1]) as work:
    handlers = urllib.request.ProxyHandler(work.proxies), urllib.request.HTTPSHandler(context=work.ssl_context())
    with urllib.request.build_opener(*handlers).open(sys.argv[2], timeout=10) as answer:
        tool = json.load(answer)["tool"]
installed = sorted(d.metadata["Name"] for d in metadata.distributions())
print(json.dumps({"tool": tool, "summary": work.summary, "installed": installed, "from": work.__class__.__module__}))
print(json.dumps([m for m in sys.modules if m.startswith("sidecar.")]))
"""
SPAN = """
import json, sys
from opentelemetry.sdk.trace import TracerProvider
from sidecar.client.otel import SpanlockSpanProcessor
provider = TracerProvider()
provider.add_span_processor(SpanlockSpanProcessor(socket=sys.argv[1]))
with provider.get_tracer("t").start_as_current_span("alone") as span:
    print(f"{span.get_span_context().trace_id:032x}", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` would install, built of a copy, as a build leaves files beside what it builds. setuptools is here
    because grpcio-tools needs it."""
    copy = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "sidecar", copy / "sidecar", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    words = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(copy), str(copy))
    pip(*words)
    return next(copy.glob("*.whl"))


def pip(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def environment(directory: Path, wheel: Path, *extras: str) -> Path:
    """A virtual environment with the wheel and what it requires; its Python."""
    venv.create(directory, with_pip=False)
    (site,) = directory.glob("lib/python*/site-packages")
    pip("install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel))
    (ours,) = metadata.distributions(path=[str(site)])
    for name in sorted(required(ours, frozenset({"", *extras}))):
        lend(metadata.distribution(name), site)
    return directory / "bin/python"


def required(distribution: metadata.Distribution, extras: frozenset[str] = frozenset({""})) -> set[str]:
    """Every distribution that `distribution` needs, by name."""
    names: set[str] = set()
    for line in distribution.requires or ():
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if name is not None and (extra.group(1) if extra else "") in extras and "python_version <" not in line:
            names |= {name.group(), *required(metadata.distribution(name.group()))}
    return names


def lend(distribution: metadata.Distribution, site: Path) -> None:
    """Installs by links what this environment has already."""
    for file in distribution.files or ():
        target, source = site / file, Path(str(distribution.locate_file(file)))
        if ".." not in file.parts and "__pycache__" not in file.parts and source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)


async def run(stage: Stage, python: Path, script: str) -> asyncio.subprocess.Process:
    """`-I`: nothing of this environment but what was lent."""
    words = (str(python), "-I", "-c", script, str(stage.agent_socket), url(stage.search))
    pipe = subprocess.PIPE
    return await asyncio.create_subprocess_exec(*words, cwd=python.parent, stdin=pipe, stdout=pipe)


async def test_a_workflow_from_open_to_report(wheel: Path, tmp_path: Path) -> None:
    python = await asyncio.to_thread(environment, tmp_path, wheel)
    async with ready_stage() as stage:
        out, _ = await asyncio.wait_for((await run(stage, python, WORK)).communicate(), 30)
    told, modules = map(json.loads, out.splitlines())
    assert told["tool"] == "search.tool.test" and told["summary"].startswith("1 credential: 1 confirmed dead")
    assert told["installed"] == ["grpcio", "protobuf", "spanlock", "typing_extensions"]
    assert {name.split(".")[1] for name in modules} == {"client", "wire"}


async def test_the_span_processor_beside_opentelemetry(wheel: Path, tmp_path: Path) -> None:
    python = await asyncio.to_thread(environment, tmp_path, wheel, "otel")
    async with ready_stage() as stage:
        process = await run(stage, python, SPAN)
        assert process.stdin is not None and process.stdout is not None
        trace_id = (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()
        (noun,) = stage.app.registry.remembered("demo")
        assert (noun.trace_id, noun.name, noun.is_open) == (trace_id, "alone", True)
        process.stdin.write(b"\n")
        assert await asyncio.wait_for(process.wait(), 30) == 0
        assert noun.close_reason == "closed", "it ended with its span, and the process waited for it"
