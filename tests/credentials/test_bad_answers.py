"""What a token service may answer, and what may come of it: a stable reason, bounded cost, nothing held is lost."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from sidecar.demo.token_service import DemoTokenService
from sidecar.errors import IssuerError, Reason
from sidecar.model.lease import IssuerOutcome, RevocationRecord
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


class Flood:
    """Spaces without end, as fast as they are read; counts what could be sent."""

    sent = 0

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b" " * 65536)
                self.sent += 65536
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
    "error_code_no_text": (lambda a: web.json_response({"error": ["invalid_target"]}, status=400), "issuer_refused"),
    "gateway_timeout": (lambda a: web.Response(status=504), "issuer_unavailable"),
    "busy": (lambda a: web.Response(status=503), "issuer_unavailable"),
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


@pytest.mark.parametrize(
    ("name", "outcome"),
    [
        ("wrong_token_type", "confirmed"), ("wrong_issued_type", "confirmed"), ("expires_negative", "confirmed"),
        ("expires_huge", "confirmed"), ("expires_text", "confirmed"), ("not_json", "mint_unknown"), ("a_list", "mint_unknown"),
        ("no_access_token", "mint_unknown"), ("ten_megabytes", "mint_unknown"), ("gateway_timeout", "mint_unknown"),
    ],
)  # fmt: skip
async def test_what_a_bad_answer_minted_is_taken_back_or_said_to_be_out_there(name: str, outcome: str) -> None:
    """The answer was a yes: a token lives at the issuer, whatever is wrong with how it says so."""
    async with ready_stage(subject="svid") as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            stage.issuer.tamper = BAD[name][0]
            assert (await agent.get(url(stage.search))).headers["x-spanlock-reason"] == BAD[name][1]
        report = await closed(stage, workflow.workflow.id)
        assert [end.at_issuer for end in report.leases] == [outcome]
        assert len(stage.issuer.revoked) == (1 if outcome == "confirmed" else 0)


@pytest.mark.parametrize(
    ("metadata", "reason", "says"),
    [
        ({"issuer": "https://other.test"}, "issuer_malformed", "names another issuer"),
        ({"token_endpoint": "http://issuer.test/token"}, "issuer_malformed", "token_endpoint of its metadata is not an https URL"),
        ({"token_endpoint": 7}, "issuer_malformed", "not an https URL"),
        ({"token_endpoint": None}, "issuer_malformed", "not an https URL"),
        (None, "issuer_unavailable", "no metadata; set token_endpoint"),
    ],
)  # fmt: skip
async def test_metadata_that_leads_elsewhere_is_not_followed(metadata: Any, reason: str, says: str) -> None:
    """A server behind a proxy that it does not know of names itself http; an assertion sent there could be read."""

    async def answered(_: DemoTokenService, __: web.Request) -> web.Response:
        base = stage.issuer.issuer
        good = {"issuer": base, "token_endpoint": f"{base}/token", "revocation_endpoint": f"{base}/revoke"}
        return web.json_response(good | metadata) if metadata is not None else web.Response(status=404)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DemoTokenService, "_metadata", answered)
        async with ready_stage(subject="svid") as stage:
            workflow = await opened(stage, listener=True)
            async with client(stage, workflow.proxy_url) as agent:
                answer = await agent.get(url(stage.search))
            assert answer.headers["x-spanlock-reason"] == reason and says in answer.text, answer.text
            assert stage.issuer.minted == 0


@pytest.mark.parametrize("where", ["metadata", "busy"])
async def test_where_nothing_can_have_been_minted_nothing_is_said_to_be_out_there(where: str) -> None:
    async def broken(_: DemoTokenService, request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

    with pytest.MonkeyPatch.context() as patch:
        if where == "metadata":
            patch.setattr(DemoTokenService, "_metadata", broken)
        async with ready_stage(subject="svid") as stage:
            stage.issuer.tamper = BAD["busy"][0]
            workflow = await opened(stage, listener=True)
            async with client(stage, workflow.proxy_url) as agent:
                answer = await agent.get(url(stage.search))
            assert answer.headers["x-spanlock-reason"] == "issuer_unavailable"
            assert not (await closed(stage, workflow.workflow.id)).leases


async def test_explicit_endpoints_need_no_metadata_and_a_client_id_is_sent() -> None:
    """Without an introspection endpoint nothing can be confirmed; without a revocation endpoint nothing is revoked: both are said."""
    for endpoints, outcome in ((("revocation",), "acknowledged"), ((), "local_only")):
        async with ready_stage(subject="svid") as stage:
            base = stage.issuer.issuer
            explicit = "".join(f', {name}_endpoint: "{base}/revoke"' for name in endpoints)
            text = stage.config_text().replace(
                "subject: svid", f'subject: svid, client_id: "spanlock", token_endpoint: "{base}/token"{explicit}'
            )
            (stage.dir / "spanlock.yaml").write_text(text)
            assert (await stage.app.reload()).applied
            seen: list[str] = []
            authenticate = stage.issuer._authenticate

            def noted(form: dict[str, str], seen: list[str] = seen, plain: Any = authenticate) -> str:
                seen.append(form.get("client_id", ""))
                return str(plain(form))

            stage.issuer._authenticate = noted  # type: ignore[method-assign]
            workflow = await opened(stage, listener=True)
            async with client(stage, workflow.proxy_url) as agent:
                assert (await agent.get(url(stage.search))).status_code == 200
            report = await closed(stage, workflow.workflow.id)
            assert [end.at_issuer for end in report.leases] == [outcome] and set(seen) == {"spanlock"}


async def test_without_the_introspection_clients_secret_nothing_is_called_confirmed() -> None:
    async with ready_stage(subject="svid") as stage:
        (stage.dir / "tool-search.secret").unlink()
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            assert (await agent.get(url(stage.search))).status_code == 200
        report = await closed(stage, workflow.workflow.id)
        assert [end.at_issuer for end in report.leases] == ["acknowledged"] and len(stage.issuer.revoked) == 1


async def test_a_number_of_seconds_may_be_written_as_text() -> None:
    async with ready_stage(subject="svid") as stage:
        stage.issuer.tamper = lambda a: a | {"expires_in": "120"}
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            assert (await agent.get(url(stage.search))).status_code == 200
        (lease,) = stage.app.broker.leases()
        assert lease.credential is not None and 115 < lease.credential.expires_at - stage.app.clock.now() <= 120


async def test_a_token_that_the_host_application_handed_in_is_what_is_exchanged() -> None:
    async with ready_stage(subject="host_token") as stage:
        users = stage.issuer._mint("user-7", "web-app", ["web-app"], set())["access_token"]
        workflow = await opened(stage, listener=True, subject_token=users)
        async with client(stage, workflow.proxy_url) as agent:
            assert (await agent.get(url(stage.search))).status_code == 200
        claims = stage.issuer.active(stage.search.authorized[-1].removeprefix("Bearer "))
        assert claims is not None and claims["sub"] == "user-7"
        await closed(stage, workflow.workflow.id)
        assert stage.issuer.active(users) is not None, "the user's own token is not ours to revoke"
        noun = stage.app.registry.find(workflow.workflow.id)
        assert noun is not None and noun.subject_token is None
        without = await opened(stage, listener=True)
        async with client(stage, without.proxy_url) as agent:
            answer = await agent.get(url(stage.search))
        assert answer.headers["x-spanlock-reason"] == "issuer_refused" and "subject_token" in answer.text


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


SLOW: dict[str, Callable[[web.Request], Awaitable[Any]]] = {"slow": drip, "without_end": Flood()}
PLAIN = {
    "not_json": lambda: web.Response(text="<html>"),
    "a_list": lambda: web.json_response([{"active": True}]),
    "no_active": lambda: web.json_response({"sub": "x"}),
    "active_is_text": lambda: web.json_response({"active": "false"}),
    "active_is_null": lambda: web.json_response({"active": None}),
    "active_is_a_number": lambda: web.json_response({"active": 0}),
    "redirect": lambda: web.Response(status=302, headers={"location": "https://evil.test/"}),
    "ten_megabytes": lambda: web.Response(body=b" " * (10 << 20)),
    "server_error": lambda: web.Response(status=500),
    "refused": lambda: web.json_response({"error": "invalid_client"}, status=401),
}


class Broken:
    """One endpoint of the token service, which answers with `name` while `begun` is set."""

    def __init__(self, patch: pytest.MonkeyPatch, endpoint: str, name: str) -> None:
        self.begun = False
        whole = getattr(DemoTokenService, endpoint)

        async def answered(service: DemoTokenService, request: web.Request) -> Any:
            if not self.begun:
                return await whole(service, request)
            return await SLOW[name](request) if name in SLOW else PLAIN[name]()

        patch.setattr(DemoTokenService, endpoint, answered)
        patch.setattr("sidecar.credentials.revoker._LOOK_SECONDS", 0.2)


@pytest.mark.parametrize(
    ("name", "reason", "says"),
    [("slow", "issuer_unavailable", "deadline"), ("without_end", "issuer_malformed", "64 KiB")],
)
async def test_an_answer_that_never_comes_to_its_end_is_bounded(
    name: str, reason: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte now and then: each comes in time, and the whole never does. Or as fast as we like: it is not read for ever."""
    monkeypatch.setitem(SLOW, "without_end", flood := Flood())
    Broken(monkeypatch, "_token", name).begun = True
    deadline = 0.4 if name == "slow" else 5
    async with ready_stage(subject="svid", more=f"credentials: {{{{exchange_deadline: {deadline}}}}}\n") as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            answer = await agent.get(url(stage.search))
        assert answer.headers["x-spanlock-reason"] == reason and says in answer.text
        report = await closed(stage, workflow.workflow.id)
        assert [end.at_issuer for end in report.leases] == ["mint_unknown"] and stage.search.requests == 0
        assert flood.sent < 32 << 20, "what the kernel's buffers take, and no more"


@pytest.mark.parametrize("begins", ["before", "after"])
@pytest.mark.parametrize("name", [*PLAIN, *SLOW])
async def test_a_bad_look_up_confirms_nothing_and_holds_no_revocation_up(name: str, begins: str) -> None:
    """`confirmed` needs two clean answers: one that went wrong, on either side of the revocation, is no proof."""
    with pytest.MonkeyPatch.context() as patch:
        broken = Broken(patch, "_introspect", name)
        async with ready_stage(subject="svid") as stage:
            workflow = await opened(stage, listener=True)
            async with client(stage, workflow.proxy_url) as agent:
                assert (await agent.get(url(stage.search))).status_code == 200
            broken.begun = begins == "before"
            revoke = stage.app.broker.revoker.exchangers["demo-issuer"].revoke

            async def revoked(record: RevocationRecord) -> IssuerOutcome:
                outcome = await revoke(record)
                broken.begun = begins == "after"
                return outcome

            patch.setattr(stage.app.broker.revoker.exchangers["demo-issuer"], "revoke", revoked)
            report = await closed(stage, workflow.workflow.id)
            assert [end.at_issuer for end in report.leases] == ["acknowledged"]
            assert stage.issuer.minted == len(stage.issuer.revoked) == 1


NO_REVOCATION = ("redirect", "ten_megabytes", "server_error", "refused", *SLOW)


@pytest.mark.parametrize(
    ("name", "looks"), [("not_json", True), *((name, False) for name in NO_REVOCATION), ("server_error", True)]
)
async def test_a_bad_answer_to_a_revocation_is_none_and_the_token_is_not_forgotten(name: str, looks: bool) -> None:
    """A 200 is a yes whatever its body says (RFC 7009): then the look-up tells that the token lives."""
    with pytest.MonkeyPatch.context() as patch:
        broken, look = Broken(patch, "_revoke", name), Broken(patch, "_introspect", "server_error")
        patch.setattr("sidecar.credentials.revoker._FIRST", 0.01)
        patch.setattr("sidecar.credentials.revoker._CAP", 0.01)
        async with ready_stage(subject="svid, timeout: 0.5", more="credentials: {{revoke_deadline: 0.3}}\n") as stage:
            workflow = await opened(stage, listener=True)
            async with client(stage, workflow.proxy_url) as agent:
                assert (await agent.get(url(stage.search))).status_code == 200
            broken.begun, look.begun = True, not looks
            report = await closed(stage, workflow.workflow.id)
            assert [end.at_issuer for end in report.leases] == ["failed"] and report.leases[0].residual.seconds > 0
            assert stage.app.broker.revoker.backlog == 1 and not stage.issuer.revoked
            broken.begun = False
            async with asyncio.timeout(10):
                while stage.app.broker.revoker.backlog:
                    await asyncio.sleep(0.01)
            assert stage.issuer.minted == len(stage.issuer.revoked) == 1


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


@pytest.mark.parametrize("source", ["secret_file: rotated.secret", "secret_env: SPANLOCK_TEST_SECRET"])
async def test_a_static_secret_is_read_anew_and_its_absence_said(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = "- {{name: legacy, url: 'http://127.0.0.1:9', issuer: old, header: x-api-key, prefix: ''}}\n"
    async with ready_stage(policy_for=("legacy",)) as stage:
        issuer = f"issuers: [{{name: old, kind: static, {source}}}, "
        (stage.dir / "spanlock.yaml").write_text(stage.config_text().replace("issuers: [", issuer) + tool.format())
        assert (await stage.app.reload()).applied
        workflow = stage.app.registry.get((await opened(stage)).workflow.id)
        legacy = stage.app.plane.router.by_name("legacy")
        permit = stage.app.decider.decide_request("demo", "test", legacy, "GET", "/")
        for value in ("", "x" * 20_000, "bad\nvalue"):
            monkeypatch.setenv("SPANLOCK_TEST_SECRET", value)
            (stage.dir / "rotated.secret").write_text(value)
            with pytest.raises(IssuerError) as refused:
                await stage.app.broker.lease(workflow, legacy, permit)
            assert refused.value.reason in (Reason.SECRET_UNAVAILABLE, Reason.CREDENTIAL_UNUSABLE)
            assert len(refused.value.detail) < 200 and "bad" not in refused.value.detail
        for value in ("first", "second"):
            monkeypatch.setenv("SPANLOCK_TEST_SECRET", value)
            (stage.dir / "rotated.secret").write_text(value + "\n")
            lease = await stage.app.broker.lease(workflow, legacy, permit)
            assert stage.app.broker.use(lease, workflow) == value.encode()
            await stage.app.broker.withdraw(tool="legacy")


async def test_a_bad_reload_changes_nothing() -> None:
    async with ready_stage() as stage:
        epoch = stage.app.decider.epoch
        (stage.dir / "policy.cedar").write_text("permit(principal, action, resource) when { context.nonsense };")
        answer = await stage.app.reload()
        assert not answer.applied and "nonsense" in answer.errors[0] and stage.app.decider.epoch == epoch
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            assert (await agent.get(url(stage.search))).status_code == 200
