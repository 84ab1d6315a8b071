"""The operator's verbs as an operator runs them, at 3 a.m.: against a sidecar that works, one that does not, and none."""

import asyncio
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from sidecar.cli import main, operator
from sidecar.cli.stage import Stage
from tests.stage import client, closed, opened, ready_stage, url


async def spanlock(*words: str, stage: Stage | None = None) -> tuple[int, str, str]:
    """Runs a verb; its status, standard output and standard error."""
    env = {**os.environ, "COLUMNS": "200"}
    if stage is not None:
        env["SPANLOCK_RUN_DIR"] = str(stage.dir / "run")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "sidecar", *words, env=env, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, err = await asyncio.wait_for(process.communicate(), 50)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def as_json(*words: str, stage: Stage | None = None) -> Any:
    status, out, err = await spanlock(*words, "--json", stage=stage)
    assert status == 0, err
    return json.loads(out)


async def test_status_says_what_works_and_exits_0() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            await agent.get(url(stage.search))
            await agent.get(url(stage.search, "/admin"))
        status, out, _ = await spanlock("status", stage=stage)
        assert status == 0 and ": ready" in out and "1 open workflows, 1 leases, 0 tokens to be revoked" in out
        for part in ("spire_agent", "issuer demo-issuer", "same-uid", "policy_denied", "forbidden by no-admin"):
            assert part in out, out
        said = await as_json("status", stage=stage)
        assert said["ready"] is True and said["not_ready_because"] == "" and said["revocation_backlog"] == "0"
        assert {d["name"]: d["ok"] for d in said["dependencies"]}["spire_agent"] is True
        assert said["agents"][0]["isolation"] == "same-uid" and said["last_denials"][0]["reason"] == "policy_denied"


async def test_status_says_what_does_not_work_since_when_and_exits_3() -> None:
    assert "3 when not" in " ".join((await spanlock("status", "--help"))[1].split())
    async with ready_stage() as stage:
        await stage.spire.update(["spiffe://demo.spanlock.test/another"])
        async with asyncio.timeout(20):
            while stage.app.svids.ready:
                await asyncio.sleep(0.01)
        status, out, _ = await spanlock("status", stage=stage)
        assert status == 3 and "NOT READY" in out and "no SVID is held for agent demo" in out


async def test_workflows_and_leases_name_everything_but_a_value() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            await agent.get(url(stage.search))
        token = stage.search.authorized[-1].removeprefix("Bearer ")
        _, table, _ = await spanlock("workflows", stage=stage)
        assert workflow.workflow.id in table and "demo" in table and "open" in table
        (lease,) = (await as_json("leases", stage=stage))["leases"]
        assert (lease["tool"], lease["state"], lease["uses"], lease["scopes"]) == (
            "search",
            "active",
            "1",
            ["search:read"],
        )
        _, leases, _ = await spanlock("leases", "--tool", "search", stage=stage)
        assert lease["id"] in leases and workflow.workflow.id in leases
        for filtered in (("--tool", "reports"), ("--agent", "x"), ("--workflow", "wf_none")):
            assert (await as_json("leases", *filtered, stage=stage))["leases"] == []
        assert token not in table + leases + json.dumps(lease) and workflow.handle not in table + leases
        await closed(stage, workflow.workflow.id)
        (last,) = (await as_json("workflows", "--agent", "demo", stage=stage))["workflows"]
        assert (last["state"], last["close_reason"]) == ("closed", "closed")
        assert (await as_json("workflows", "--agent", "x", stage=stage))["workflows"] == []


async def test_revoke_needs_to_be_told_what_and_tells_the_outcome() -> None:
    async with ready_stage(more="credentials: {{revoke_deadline: 0.3}}\n") as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            await agent.get(url(stage.search))
            status, _, err = await spanlock("revoke", stage=stage)
            assert status == 2 and "--workflow" in err and len(stage.app.broker.leases()) == 1
            for unknown in (("--workflow", "wf_typo"), ("--agent", "nope"), ("--tool", "nope")):
                status, out, err = await spanlock("revoke", *unknown, stage=stage)
                assert (status, out) == (1, "") and f"there is no {unknown[0][2:]} {unknown[1]}" in err
            status, _, err = await spanlock("revoke", "--all", "--tool", "search", stage=stage)
            assert status == 2 and "--all is everything" in err and len(stage.app.broker.leases()) == 1
            status, out, _ = await spanlock("revoke", "--tool", "reports", "--reissue", stage=stage)
            assert status == 0 and out.startswith("nothing matched")
            done = await as_json("revoke", "--tool", "search", "--reissue", stage=stage)
            assert [end["at_issuer"] for end in done["ends"]] == ["confirmed"]
            assert (await agent.get(url(stage.search))).status_code == 200
            stage.issuer.down = True
            status, out, _ = await spanlock("revoke", "--all", stage=stage)
            assert status == 1 and "failed" in out, "what an issuer did not take back is no success"
            stage.issuer.down = False
            assert (await agent.get(url(stage.search))).headers["x-spanlock-reason"] == "lease_gone"


async def test_nobody_answers() -> None:
    status, out, err = await spanlock("status", "--socket", "/nonexistent/operator.sock")
    assert (
        (status, out) == (1, "") and "no sidecar answers on /nonexistent/operator.sock" in err and "spanlock run" in err
    )


async def test_the_operators_socket_is_found_by_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even by one that is broken otherwise: that is when an operator asks."""
    async with ready_stage() as stage:
        config = stage.dir / "spanlock.yaml"
        config.write_text(config.read_text().replace("agents:", "agentss:").replace(f"{stage.dir}/run", "run"))
        for verb in ("status", "workflows", "leases"):
            assert (await spanlock(verb, "-c", str(config)))[0] == 0
        assert "nothing matched" in (await spanlock("revoke", "-c", str(config), "--all"))[1]
        monkeypatch.setenv("SPANLOCK_CONFIG", str(config))
        assert (await spanlock("status"))[0] == 0
        status, _, err = await spanlock("status", "-c", str(tmp_path))
        assert status == 2 and "is not a file" in err
        status, _, err = await spanlock("status", "--socket", str(stage.agent_socket))
        assert status == 1 and "is an agent's socket" in err


@pytest.mark.parametrize("words", ["explain", "explain internal_error", "--help", "check -c /nonexistent --json"])
def test_output_that_cannot_be_written_is_one_line(words: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sidecar", *words.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1 and done.stderr == "spanlock: [Errno 28] No space left on device\n"


def test_a_terminal_without_our_letters_is_shown_others() -> None:
    words = [sys.executable, "-c", "from sidecar.cli import main, explain; explain._ALL['x'] = explain._ALL['internal_error']._replace(fix='…'); main.main(['explain', 'x'])"]  # fmt: skip
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0 and "Fix: ?" in done.stdout


def test_a_socket_that_is_not_ours_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may everything, so it is played
    assert "own user" in operator._why(tmp_path)


async def test_explain() -> None:
    status, out, _ = await spanlock("explain", "unknown_tool")
    assert status == 0 and out.startswith("unknown_tool\n") and "Fix:" in out
    everything = await as_json("explain")
    assert set(everything["policy_denied"]) == {"meaning", "fix"} and len(everything) > 30
    for ending in ("holder_gone", "mint_unknown", "confirmed", "failed"):
        assert (await spanlock("explain", ending))[1].startswith(f"{ending}\n")
    status, out, err = await spanlock("explain", "no_such_reason")
    assert (status, out) == (2, "") and "no such reason" in err


async def test_check(tmp_path: Path) -> None:
    async with ready_stage() as stage:
        path = stage.dir / "spanlock.yaml"
        status, out, err = await spanlock("check", "-c", str(path))
        assert (status, out) == (0, "ok\n") and "runs as the sidecar's own uid" in err
        path.write_text(stage.config_text().replace("/audit.jsonl", "/none/audit.jsonl"))
        status, out, err = await spanlock("check", "-c", str(path))
        assert (status, out) == (2, "1 error(s)\n") and "error: audit.file: " in err, (
            "the daemon does not start with it"
        )
        path.write_text(stage.config_text().replace("audience:", "audiense:"))
        status, out, _ = await spanlock("check", "-c", str(path), "--json")
        said = json.loads(out)
        assert status == 2 and not said["ok"] and "tools[0].audiense" in said["errors"][0] and len(said["errors"]) == 2
        path.write_text(stage.config_text())
        (stage.dir / "policy.cedar").write_text("permit(principal, action, resource) when { context.nonsense };")
        status, out, err = await spanlock("check", "-c", str(path))
        assert status == 2 and out == "1 error(s)\n" and "error: policy:" in err
    status, _, err = await spanlock("check", "-c", str(tmp_path / "none.yaml"))
    assert status == 2 and "none.yaml does not exist" in err


async def test_the_verbs_are_listed_and_unknown_ones_refused() -> None:
    status, out, _ = await spanlock("--help")
    assert status == 0
    for verb in ("demo", "run", "exec", "check", "status", "workflows", "leases", "revoke", "explain"):
        assert re.search(rf"^  {verb} +[A-Z]", out, re.M)
    assert "revokes them at their issuers" in out and "Live leases: who may use what until when.\n" in out
    assert (await spanlock("--version"))[1].startswith("spanlock 0.")
    assert (await spanlock("destroy"))[0] == 2


@pytest.mark.parametrize("words", ["--help", "explain --help"])
def test_no_verb_is_loaded_but_the_one_that_runs(words: str) -> None:
    program = f"import sys; from sidecar.cli import main\ntry: main.main({words.split()})\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert {name for name in loaded if name.startswith("sidecar.cli.")} - {"sidecar.cli.explain"} == {
        "sidecar.cli.main"
    }
    assert not loaded & {"grpc", "uvloop", "sidecar.config.schema"}


def test_what_a_verb_does_is_said_in_one_place() -> None:
    """Its module's docstring: a second one, on the function, came to differ."""
    for verb in main._VERBS:
        assert import_module(f"sidecar.cli.{verb}").command.__doc__ is None
