"""R8: everything that the sidecar says, of good calls and of every kind of bad end, against every secret that there was."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from aiohttp import web

from sidecar.cli.stage import Stage
from sidecar.demo.token_service import DemoTokenService
from sidecar.demo.workload_api import DemoSpire
from sidecar.proxy.flow import Flow
from sidecar.telemetry.logging import configure
from sidecar.wire.spanlock.v1 import admin_pb2, admin_pb2_grpc, token_exchange_pb2, token_exchange_pb2_grpc
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from tests.cli.running import run, variables, words_of
from tests.cli.test_operator import spanlock
from tests.stage import call, client, closed, opened, port_of, raw, ready_stage, stub, url
from tests.test_threats import FIELDS, recording

STATIC = "static-5ecret-of-the-legacy-tool"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Canaries:
    """Every secret that comes into being, by its kind."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.kinds: dict[str, set[str]] = {"static secret": {STATIC}}
        mint, svid = DemoTokenService._mint, DemoSpire.jwt_svid

        def minted(service: DemoTokenService, subject: str, client: str, audiences: list[str], scopes: set[str]) -> Any:
            answer = mint(service, subject, client, audiences, scopes)
            self.add("first token" if subject == client else "exchanged token", answer["access_token"])
            return answer

        def issued(spire: DemoSpire, spiffe_id: str, audience: list[str]) -> str:
            return self.add("JWT-SVID", svid(spire, spiffe_id, audience))

        patch.setattr(DemoTokenService, "_mint", minted)
        patch.setattr(DemoSpire, "jwt_svid", issued)

    def add(self, kind: str, secret: str) -> str:
        self.kinds.setdefault(kind, set()).add(secret)
        return secret

    def needles(self) -> Iterator[tuple[str, str]]:
        """The whole, and the part of it that alone is enough: a JWT's signature, the random bits of a handle."""
        for kind, secrets in self.kinds.items():
            for secret in secrets:
                yield kind, secret
                yield kind, secret.rpartition("." if secret.startswith("eyJ") else "_")[2]


def scrubbed(outputs: dict[str, str], canaries: Canaries) -> list[tuple[str, str]]:
    """Where which kind of secret shows."""
    return [(name, kind) for kind, needle in canaries.needles() for name, text in outputs.items() if needle in text]


async def with_a_static_tool(stage: Stage, port: int) -> None:
    (stage.dir / "legacy.secret").write_text(STATIC)
    issuer = f"issuers: [{{name: old, kind: static, secret_file: {stage.dir}/legacy.secret}}, "
    legacy = f"- {{{{name: legacy, url: 'http://127.0.0.1:{port}', allow_networks: [127.0.0.0/8], {FIELDS}}}}}\n"
    text = stage.config_text().replace("issuers: [", issuer)
    text = text.replace("\ntools:\n", "\ntools:\n" + legacy.replace("demo-issuer", "old").format())
    (stage.dir / "spanlock.yaml").write_text(text)
    assert (await stage.app.reload()).applied


async def refused(asked: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asked
    return f"{caught.value!r} {caught.value.details()} {caught.value.trailing_metadata()}"


async def every_kind_of_end(stage: Stage, canaries: Canaries, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """Calls that go well and calls that do not, each in its own way. What the agent was told."""
    users = canaries.add("subject token", stage.issuer._mint("user-7", "web-app", ["web-app"], set())["access_token"])
    workflow = await opened(stage, listener=True, subject_token=users)
    handle, told = canaries.add("workflow handle", workflow.handle), {}
    async with client(stage, workflow.proxy_url) as agent:
        for tool in (stage.search, stage.reports):
            assert (await agent.get(url(tool))).status_code == 200
        told["refused by policy"] = (await agent.get(url(stage.search, "/admin"))).text
        told["static"] = repr(await call(stage, handle, path="/legacy/x"))
        async with stub(stage, token_exchange_pb2_grpc.TokenExchangeStub) as exchange:
            request = token_exchange_pb2.ExchangeRequest(workflow_id=workflow.workflow.id, tool="search")
            held = canaries.add("credential handle", (await exchange.Exchange(request)).access_token)
            told["another tool's handle"] = repr(
                await raw(
                    port_of(stage.app.addresses["reverse"]),
                    f"GET /reports/x HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {held}\r\nConnection: close\r\n\r\n".encode(),
                )
            )
            told["a bad head"] = repr(await call(stage, f"{handle}\r\nX-Bad: a\0b", path="/search/x"))
            other = await opened(stage, subject_token=users)
            canaries.add("workflow handle", other.handle)
            request.workflow_id = other.workflow.id
            for name, tampered in {
                "the issuer refuses": lambda a: web.json_response({"error": f"no {a['access_token']}"}, status=400),
                "the issuer fails": lambda a: web.Response(status=500, text=json.dumps(a)),
                "no object": lambda a: web.json_response([a]),
                "no usable token": lambda a: a | {"access_token": f"{a['access_token']}\r\nX: y"},
                "another type": lambda a: a | {"token_type": a["access_token"]},
                "no number": lambda a: a | {"expires_in": a["access_token"]},
            }.items():
                stage.issuer.tamper = tampered
                told[name] = await refused(exchange.Exchange(request))
            stage.issuer.tamper = None
            with patch.context() as bug:
                bug.setattr(stage.app.broker.revoker.exchangers["demo-issuer"], "_token", lambda *_, **__: 1 / 0)
                told["a bug in the exchange"] = await refused(exchange.Exchange(request))
        with patch.context() as bug:
            bug.setattr(Flow, "_stream_back", lambda *_: 1 / 0)
            told["a bug in the call"] = (await agent.get(url(stage.search))).text
    stage.issuer.down = True
    told["the report of what is not revoked"] = str(await closed(stage, other.workflow.id))
    told["a look at everything"] = await looked_at(stage)
    stage.issuer.down = False
    told["the report"] = str(await closed(stage, workflow.workflow.id))
    return told


async def looked_at(stage: Stage) -> str:
    """What status, lists and `repr` show while leases live and an issuer fails."""
    seen = [repr(w) for w in stage.app.registry.remembered()] + [repr(lease) for lease in stage.app.broker.leases()]
    for verb in ("status", "workflows", "leases"):
        for form in ((), ("--json",)):
            seen += [str(part) for part in await spanlock(verb, *form, stage=stage)]
    async with stub(stage, admin_pb2_grpc.AdminStub, operator=True) as admin:
        seen.append(str(await admin.Status(admin_pb2.StatusRequest())))
        seen.append(str(await admin.Leases(admin_pb2.LeasesRequest())))
    async with stub(stage) as workflows:
        seen.append(str(await workflows.List(pb.ListRequest())))
    return "\n".join(seen)


@pytest.mark.parametrize("subject", ["client_credentials", "host_token"])
async def test_r8_no_output_holds_a_secret_of_any_kind(
    subject: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    configure("debug", "json")
    canaries = Canaries(monkeypatch)
    more = "credentials: {{revoke_deadline: 0.3}}\n"
    async with (
        recording(OK) as (legacy, port),
        ready_stage(subject=subject, more=more, policy_for=("legacy",)) as stage,
    ):
        canaries.kinds["introspection client's secret"] = set(stage._secrets.values())
        await with_a_static_tool(stage, port)
        outputs = await every_kind_of_end(stage, canaries, monkeypatch)
        receipt = tmp_path / "receipt.json"
        command = words_of("curl", "-sS", url(stage.search), options=("--receipt", str(receipt)))
        status, *outputs["exec"] = await run(*command, env=variables(stage))  # type: ignore[assignment]
        outputs["exec"] = "".join(outputs["exec"])
        assert status == 0 and STATIC.encode() in legacy.received
        for workflow in stage.app.registry.remembered():
            canaries.add("workflow handle", workflow.handle.reveal())
        stage.app.audit.flush()
        outputs |= {
            "receipt": receipt.read_text(),
            "audit": (stage.dir / "audit.jsonl").read_text(),
            "metrics": stage.app.metrics.exposition().decode(),
            "roll": (stage.dir / "run/operator/workflows.jsonl").read_text(),
        }
    outputs["log"], outputs["error log"] = capfd.readouterr()
    assert outputs["error log"].count("ZeroDivisionError") >= 2, "the crashes were told"
    kinds = {"exchanged token", "JWT-SVID", "static secret", "introspection client's secret", "subject token",
             "workflow handle", "credential handle"}  # fmt: skip
    assert kinds | ({"first token"} if subject == "client_credentials" else set()) <= set(canaries.kinds)
    assert all(outputs[name] for name in outputs if name != "log") and scrubbed(outputs, canaries) == []
