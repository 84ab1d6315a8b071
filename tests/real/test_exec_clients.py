"""Clients that are no Python package: Go's net/http and Node's fetch work unchanged under `exec`."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli import clients
from tests.real.conftest import RealStage
from tests.real.servers import part
from tests.stage import url

pytestmark = [pytest.mark.real, pytest.mark.timeout(420)]


async def through_exec(stage: RealStage, *words: str) -> None:
    environment = {**os.environ, "SPANLOCK_SOCKET": str(stage.agent_socket), "NO_PROXY": "*"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", "exec", "--", *words,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert (process.returncode, out.strip()) == (0, b'{"ok": true}'), err.decode()
    assert "1 confirmed dead" in err.decode().splitlines()[-1]
    token = stage.search.authorized[-1].removeprefix("Bearer ")
    assert token not in (out + err).decode() and not await stage.search.active(token)


async def test_go(stage: RealStage, tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(clients.GO)
    program = tmp_path / "client"
    words = ["go", "build", "-o", str(program), str(tmp_path / "main.go")]
    await asyncio.to_thread(subprocess.run, words, check=True, cwd=tmp_path)
    await through_exec(stage, str(program), url(stage.search))


async def test_node(stage: RealStage) -> None:
    await through_exec(stage, part("node-24/node_modules/node/bin/node"), "-e", clients.NODE, url(stage.search))
