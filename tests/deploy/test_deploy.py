"""What is shipped in deploy/ is valid and keeps its promises; no engine runs it here, so its structure is checked."""

import configparser
import json
import shutil
import subprocess
from pathlib import Path

import grpc.aio
import jsonschema
import pytest
import yaml

from sidecar.audit.schema import audit_schema
from sidecar.config.json_schema import json_schema
from sidecar.config.load import load
from sidecar.policy.load import load_policy
from tests.stage import client, closed, opened, ready_stage, url

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_example_loads_with_its_policy() -> None:
    settings = load(DEPLOY / "spanlock.example.yaml")
    assert load_policy(settings.policy).obligations


def test_the_json_schema_is_current() -> None:
    assert (DEPLOY / "spanlock.schema.json").read_text() == json_schema(), (
        "write config.json_schema.json_schema() there"
    )


async def test_the_audit_schema_is_current_and_holds_for_what_is_written() -> None:
    schema = audit_schema()
    assert (DEPLOY / "audit.schema.json").read_text() == schema, "write audit.schema.audit_schema() there"
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            await agent.get(url(stage.search))
            await agent.get(url(stage.search, "/admin"))
        await closed(stage, workflow.workflow.id)
        with pytest.raises(grpc.aio.AioRpcError):
            await closed(stage, "wf_none")
        stage.app.audit.flush()
        lines = [json.loads(line) for line in (stage.dir / "audit.jsonl").read_text().splitlines()]
    validator = jsonschema.Draft202012Validator(json.loads(schema))
    for line in lines:
        validator.validate(line)
    assert {line["kind"] for line in lines} == {"flow", "lease", "workflow"}
    assert "grpc" in {line["mode"] for line in lines if line["kind"] == "flow"}


def test_only_the_sidecar_can_reach_the_identity() -> None:
    pod = yaml.safe_load((DEPLOY / "kubernetes.yaml").read_text())["spec"]
    (sidecar,), (agent,) = pod["initContainers"], pod["containers"]
    assert sidecar["restartPolicy"] == "Always" and not pod["shareProcessNamespace"]
    mounts = {c["name"]: {m["name"] for m in c["volumeMounts"]} for c in (sidecar, agent)}
    csi = {v["name"] for v in pod["volumes"] if v.get("csi", {}).get("driver") == "csi.spiffe.io"}
    assert csi and csi <= mounts["spanlock"] and not csi & mounts["agent"]
    assert mounts["agent"] & mounts["spanlock"] == {"agent-socket"}
    assert sidecar["securityContext"]["runAsUser"] != agent["securityContext"]["runAsUser"]
    for container in (sidecar, agent):
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"]["drop"] == ["ALL"] and container["resources"]["limits"]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(sidecar)


def test_the_image_is_not_root() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    last_stage = lines[max(i for i, line in enumerate(lines) if line.startswith("FROM")) :]
    assert any(line.startswith("USER 2102") for line in last_stage)
    assert not any("ADD http" in line or "curl" in line for line in lines)


def test_the_unit_is_hardened() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "spanlock.service")
    service = unit["Service"]
    assert service["User"] != "root" and service["NoNewPrivileges"] == "yes" and service["LimitCORE"] == "0"
    assert "AF_NETLINK" in service["RestrictAddressFamilies"], "the caller is found by SOCK_DIAG"
    if shutil.which("systemd-analyze") is None:
        return  # not on every machine; where it is, it is the judge
    words = ["systemd-analyze", "security", "--offline=true", "--threshold=40", str(DEPLOY / "spanlock.service")]
    judged = subprocess.run(words, capture_output=True, text=True, check=False)
    assert judged.returncode == 0, judged.stdout[-600:]


def test_shell_scripts_parse() -> None:
    root = DEPLOY.parent
    for script in [*DEPLOY.glob("*.sh"), root / ".ci/run", root / "tests/real/parts.sh"]:
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_entries_separate_by_container() -> None:
    text = (DEPLOY / "spire-entries.sh").read_text()
    assert "k8s:container-name:spanlock" in text and "unix:uid:2102" in text
