"""What a token service may answer, and what may come of it: a stable reason, bounded cost, nothing held is lost."""

import asyncio
from typing import Any

import pytest
from aiohttp import web

from tests.stage import client, closed, opened, ready_stage, url


async def drip(request: web.Request) -> web.StreamResponse:
    """One byte now and then, for ever."""
    response = web.StreamResponse()
    await response.prepare(request)
    try:
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.05)
    except ConnectionError:
        return response


BAD: dict[str, tuple[Any, str]] = {
    "not_json": (lambda a: web.Response(text="<html>"), "issuer_malformed"),
    "a_list": (lambda a: web.json_response([a]), "issuer_malformed"),
    "no_access_token": (lambda a: {k: v for k, v in a.items() if k != "access_token"}, "issuer_malformed"),
    "access_token_no_text": (lambda a: a | {"access_token": 7}, "issuer_malformed"),
    "wrong_token_type": (lambda a: a | {"token_type": "MAC"}, "issuer_malformed"),
    "wrong_issued_type": (lambda a: a | {"issued_token_type": "urn:other"}, "issuer_malformed"),
    "expires_negative": (lambda a: a | {"expires_in": -5}, "issuer_malformed"),
    "expires_zero": (lambda a: a | {"expires_in": 0}, "issuer_malformed"),
    "expires_bool": (lambda a: a | {"expires_in": True}, "issuer_malformed"),
    "expires_huge": (lambda a: a | {"expires_in": 10**18}, "issuer_malformed"),
    "expires_text": (lambda a: a | {"expires_in": "soon"}, "issuer_malformed"),
    "crlf_in_token": (lambda a: a | {"access_token": "a\r\nX-Evil: 1"}, "credential_unusable"),
    "redirect": (lambda a: web.Response(status=302, headers={"location": "https://evil.test/"}), "issuer_malformed"),
    "ten_megabytes": (lambda a: web.Response(body=b" " * (10 << 20)), "issuer_malformed"),
    "server_error": (lambda a: web.Response(status=500), "issuer_unavailable"),
    "refused": (lambda a: web.json_response({"error": "invalid_target"}, status=400), "issuer_refused"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_answer_has_its_reason_and_costs_no_call(name: str) -> None:
    tamper, reason = BAD[name]
    async with ready_stage(subject="svid") as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            assert (await agent.get(url(stage.reports))).status_code == 200
            stage.issuer.tamper = tamper
            answer = await agent.get(url(stage.search))
            assert answer.headers["x-spanlock-reason"] == reason, answer.text
            assert "evil" not in answer.text and stage.search.requests == 0
            assert (await agent.get(url(stage.reports))).status_code == 200, "what was held is not lost"
            stage.issuer.tamper = None
            assert (await agent.get(url(stage.search))).status_code == 200


async def test_no_expires_in_is_taken_as_a_short_life() -> None:
    async with ready_stage(subject="svid") as stage:
        stage.issuer.tamper = lambda a: {k: v for k, v in a.items() if k != "expires_in"}
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            assert (await agent.get(url(stage.search))).status_code == 200
        (lease,) = stage.app.broker.leases()
        assert lease.credential is not None
        assert 55 < lease.credential.expires_at - stage.app.clock.now() <= 60


async def test_an_answer_that_never_ends_is_bounded_and_reported_as_mint_unknown() -> None:
    async with ready_stage(subject="svid", more="credentials: {{exchange_deadline: 0.4}}\n") as stage:
        stage.issuer.gate = asyncio.Event()
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            answer = await agent.get(url(stage.search))
        assert answer.headers["x-spanlock-reason"] == "issuer_unavailable"
        report = await closed(stage, workflow.workflow.id)
        assert [end.at_issuer for end in report.leases] == ["mint_unknown"]
        stage.issuer.gate.set()


async def test_a_static_secret_is_local_only() -> None:
    more = "- {{name: legacy, url: 'http://127.0.0.1:9', issuer: old, allow_networks: [127.0.0.0/8]}}\n"
    async with ready_stage() as stage:
        (stage.dir / "legacy.secret").write_text("s3cr3t-value\n")
        text = stage.config_text().replace(
            "issuers: [", f"issuers: [{{name: old, kind: static, secret_file: {stage.dir}/legacy.secret}}, "
        )
        (stage.dir / "spanlock.yaml").write_text(text + more.format())
        with (stage.dir / "policy.cedar").open("a") as policy:
            policy.write('permit(principal, action, resource == Spanlock::Tool::"legacy");\n')
        reloaded = await stage.app.reload()
        assert reloaded.applied, reloaded.errors
        workflow = stage.app.registry.get((await opened(stage)).workflow.id)
        tool = stage.app.plane.router.by_name("legacy")
        permit = stage.app.decider.decide_request("demo", "test", tool, "GET", "/")
        lease = await stage.app.broker.lease(workflow, tool, permit)
        assert stage.app.broker.use(lease, workflow) == b"Bearer s3cr3t-value"
        report = await closed(stage, workflow.id)
        assert [end.at_issuer for end in report.leases] == ["local_only"]
        assert report.leases[0].residual.seconds > 10**9, "no end"


async def test_a_bad_reload_changes_nothing() -> None:
    async with ready_stage() as stage:
        epoch = stage.app.decider.epoch
        (stage.dir / "policy.cedar").write_text("permit(principal, action, resource) when { context.nonsense };")
        answer = await stage.app.reload()
        assert not answer.applied and "nonsense" in answer.errors[0] and stage.app.decider.epoch == epoch
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            assert (await agent.get(url(stage.search))).status_code == 200
