"""Which workflow a call belongs to, and which destination: every rule of both, with what each refuses."""

import base64
import os
from typing import Any

import httpx
import pytest

from sidecar.cli.stage import Stage
from sidecar.errors import CallerError, Reason
from sidecar.model.caller import Caller
from sidecar.model.tool import Tool
from sidecar.model.traceparent import TraceParent, parse
from sidecar.model.workflow import CloseReason
from sidecar.proxy import destination
from sidecar.proxy.binding import handle_of
from sidecar.proxy.http1 import Fields, parse_request
from sidecar.proxy.inject import stripped
from sidecar.tools.names import parse_authority
from sidecar.tools.router import Router
from tests.stage import call, client, closed, opened, port_of, raw, ready_stage, reason_of, two_agents, url

TRACE = "0af7651916cd43dd8448eb211c80319c"


async def asked(stage: Stage, proxy: str, **headers: str) -> httpx.Response:
    async with client(stage, proxy) as agent:
        return await agent.get(url(stage.search), headers=headers)


def explicit(stage: Stage, user: str = "") -> str:
    return f"http://{user}127.0.0.1:{port_of(stage.app.addresses['explicit'])}"


# -- workflows ------------------------------------------------------------------------------------------------------------


async def test_the_only_open_workflow_is_the_calls_own_where_the_operator_says_so() -> None:
    async with ready_stage(more="workflows: {{bind_only_open: true}}\n") as stage:
        assert (await asked(stage, explicit(stage))).headers["x-spanlock-reason"] == "no_workflow"
        first = await opened(stage)
        assert (await asked(stage, explicit(stage))).status_code == 200
        await opened(stage)
        two = await asked(stage, explicit(stage))
        assert two.headers["x-spanlock-reason"] == "no_workflow", "which of the two is not for us to guess"
        await closed(stage, first.workflow.id)
        assert (await asked(stage, explicit(stage))).status_code == 200


async def test_a_workflows_own_listener_takes_its_handle_and_no_other() -> None:
    async with ready_stage() as stage:
        one, other = await opened(stage, listener=True), await opened(stage)
        port = port_of(one.proxy_url)
        assert (await asked(stage, f"http://x:{one.handle}@127.0.0.1:{port}")).status_code == 200
        with pytest.raises(httpx.ProxyError, match="407"):
            await asked(stage, f"http://x:{other.handle}@127.0.0.1:{port}")


async def test_a_handle_is_good_for_its_own_agent_alone() -> None:
    """Whoever else is declared here has got hold of it: that is a 407 by every way, and falls through to no workflow of theirs."""
    async with two_agents(os.getuid() + 1, more="workflows: {{bind_only_open: true}}\n") as stage:
        mine, app = await opened(stage), stage.app
        app.registry.open("other", name="theirs")
        app.plane.find_caller = lambda local, peer: app.callers.by_agent("other")
        assert (await asked(stage, explicit(stage))).status_code == 200, "without it they have a workflow of their own"
        with pytest.raises(httpx.ProxyError, match="407"):
            await asked(stage, explicit(stage, f"x:{mine.handle}@"))
        answer = await call(stage, mine.handle)
        assert (answer[:12], reason_of(answer)) == (b"HTTP/1.1 407", "handle_invalid")


async def test_a_credential_handle_does_not_come_by_another_workflows_listener() -> None:
    async with ready_stage() as stage:
        own, app = await opened(stage, listener=True), stage.app
        other = app.registry.get((await opened(stage)).workflow.id)
        tool = app.plane.router.by_name("search")
        lease = await app.broker.lease(other, tool, app.decider.decide_exchange(other, tool, tool.scopes))
        head = f"GET /search/x HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {app.broker.handle(lease)}\r\n"
        for port, more, outcome in (
            (port_of(app.addresses["reverse"]), "", ""),
            (port_of(own.proxy_url), "", "handle_invalid"),
            (port_of(app.addresses["reverse"]), f"x-spanlock-workflow: {own.handle}\r\n", "handle_invalid"),
        ):
            answer = await raw(port, f"{head}{more}Connection: close\r\n\r\n".encode())
            assert reason_of(answer) == outcome and answer[9:12] == (b"407" if outcome else b"200"), answer
        assert stage.search.requests == 1


async def test_a_listener_is_its_own_callers_alone() -> None:
    async with ready_stage() as stage:
        workflow = (await opened(stage)).workflow.id
        registry = stage.app.registry
        with pytest.raises(CallerError) as refused:
            registry.join(Caller(0, frozenset({"other"}), workflow), None, None)
        assert refused.value.reason is Reason.UNKNOWN_CALLER
        await registry.close(registry.get(workflow), CloseReason.CLOSED)
        with pytest.raises(CallerError) as refused:
            registry.join(Caller(0, frozenset({"demo"}), workflow), None, None)
        assert refused.value.reason is Reason.WORKFLOW_CLOSED
        for known, reason in ((workflow, Reason.WORKFLOW_CLOSED), ("wf_none", Reason.WORKFLOW_UNKNOWN)):
            with pytest.raises(CallerError) as refused:
                registry.get(known)
            assert refused.value.reason is reason


async def test_one_trace_is_one_workflow_of_an_agent() -> None:
    async with ready_stage() as stage:
        first = await opened(stage, trace_id=TRACE)
        with pytest.raises(Exception, match="has an open workflow with it already"):
            await opened(stage, trace_id=TRACE)
        await closed(stage, first.workflow.id)
        await opened(stage, trace_id=TRACE)


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (f"00-{TRACE}-b7ad6b7169203331-01", True),
        (f"00-{TRACE}-b7ad6b7169203331-00", False),
        (f"00-{TRACE}-b7ad6b7169203331-03", True),
        (f"00-{TRACE}-b7ad6b7169203331-f2", False),
        (f"cc-{TRACE}-b7ad6b7169203331-01-what-a-later-version-adds", True),
        (f"cc-{TRACE}-b7ad6b7169203331-00-0001", False),
        (f"00-{TRACE}-b7ad6b7169203331-01-more", None),
        (f"ff-{TRACE}-b7ad6b7169203331-01", None),
        (f"00-{'0' * 32}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-b7ad6b7169203331-01", None),
        (f"00-{TRACE}-b7ad6b7169203331", None),
        (f"00-{TRACE}-b7ad6b7169203331-0g", None),
        ("", None),
    ],
)
def test_only_a_valid_traceparent_names_a_trace(header: str, sampled: bool | None) -> None:
    means = TraceParent(TRACE, "b7ad6b7169203331", sampled) if sampled is not None else None
    assert parse(header.encode()) == means


@pytest.mark.parametrize(
    ("header", "means"),
    [
        (b"slw_abc", "slw_abc"),
        (b"Bearer slw_abc ", "slw_abc"),
        (b"bAsIc " + base64.b64encode(b"anyone:slw_abc"), "slw_abc"),
        (b"Basic " + base64.b64encode(b"slw_abc"), ""),  # no password: an empty handle, which is a bad one
        (b"Digest abc", "Digest abc"),
    ],
)
def test_where_a_handle_stands(header: bytes, means: str) -> None:
    assert handle_of(header) == means


def test_basic_that_is_none_is_refused() -> None:
    with pytest.raises(CallerError) as refused:
        handle_of(b"Basic not*base64")
    assert refused.value.reason is Reason.HANDLE_INVALID


# -- destinations ---------------------------------------------------------------------------------------------------------


def tool(name: str, scheme: str, host: str, **fields: Any) -> Tool:
    return Tool(
        name=name,
        scheme=scheme,
        authority=parse_authority(host, 443 if scheme == "https" else 80),
        issuer="i",
        **fields,
    )


SECURE, PLAIN, NEAR = tool("a", "https", "a.test"), tool("b", "http", "b.test"), tool("c", "http", "127.0.0.1:81")
OPEN = tool("d", "http", "d.test", allow_cleartext=True)
AWAY = tool("e", "http", "localhost:82", address="203.0.113.7")
HERE = tool("f", "http", "f.test", address="127.0.0.1")
ROUTER = Router((SECURE, PLAIN, NEAR, OPEN, AWAY, HERE))


def head(line: str, host: str) -> Any:
    return parse_request(f"{line} HTTP/1.1\r\nHost: {host}".encode(), Fields(stripped))


def in_the_tunnel(line: str, host: str) -> tuple[str, bytes]:
    found, target = destination.intercepted(head(line, host), SECURE.authority, SECURE)
    return found.name, target


def by_absolute_form(line: str, host: str) -> tuple[str, bytes]:
    found, target = destination.absolute(head(line, host), ROUTER)
    return found.name, target


def by_base_url(line: str, host: str) -> tuple[str, bytes]:
    found, target = destination.reverse(head(line, host), ROUTER)
    return found.name, target


@pytest.mark.parametrize(
    ("way", "line", "host", "means"),
    [
        (in_the_tunnel, "GET /x?y", "a.test", ("a", b"/x?y")),
        (in_the_tunnel, "GET /x", "A.test:443", ("a", b"/x")),
        (in_the_tunnel, "OPTIONS *", "a.test", ("a", b"*")),
        (in_the_tunnel, "GET https://a.test/x", "a.test", ("a", b"/x")),
        (in_the_tunnel, "GET https://b.test/x", "a.test", "authority_mismatch"),
        (in_the_tunnel, "GET http://a.test/x", "a.test", "authority_mismatch"),
        (in_the_tunnel, "GET *", "a.test", "authority_mismatch"),
        (in_the_tunnel, "GET /x", "b.test", "authority_mismatch"),
        (in_the_tunnel, "GET /x", "a.test:8443", "authority_mismatch"),
        (by_absolute_form, "GET http://127.0.0.1:81/x", "127.0.0.1:81", ("c", b"/x")),
        (by_absolute_form, "GET http://d.test?y", "d.test", ("d", b"/?y")),
        (by_absolute_form, "GET HTTP://D.test/", "d.test:80", ("d", b"/")),
        (by_absolute_form, "GET http://b.test/", "b.test", "cleartext_refused"),
        (by_absolute_form, "GET http://a.test/", "a.test", "cleartext_refused"),
        (by_absolute_form, "GET http://localhost:82/", "localhost:82", "cleartext_refused"),
        (by_absolute_form, "GET http://f.test/", "f.test", ("f", b"/")),
        (by_base_url, "GET /e/x", "127.0.0.1", "cleartext_refused"),
        (by_base_url, "GET /f/x", "127.0.0.1", ("f", b"/x")),
        (by_absolute_form, "GET http://z.test/", "z.test", "unknown_tool"),
        (by_absolute_form, "GET http://d.test/", "c.test", "authority_mismatch"),
        (by_absolute_form, "GET ftp://d.test/", "d.test", "authority_mismatch"),
        (by_absolute_form, "GET https://a.test/", "a.test", "authority_mismatch"),
        (by_base_url, "GET /a/x", "localhost", ("a", b"/x")),
        (by_base_url, "GET /c", "[::1]:17002", ("c", b"/")),
        (by_base_url, "GET /c?y", "127.0.0.1", ("c", b"/?y")),
        (by_base_url, "GET /b/x", "127.0.0.1", "cleartext_refused"),
        (by_base_url, "GET /z/x", "127.0.0.1", "unknown_tool"),
        (by_base_url, "GET //a/x", "127.0.0.1", "unknown_tool"),
        (by_base_url, "GET /a/x", "rebound.test", "authority_mismatch"),
    ],
)
def test_one_destination_or_none(way: Any, line: str, host: str, means: Any) -> None:
    if isinstance(means, str):
        with pytest.raises(CallerError) as refused:
            way(line, host)
        assert str(refused.value.reason) == means
    else:
        assert way(line, host) == means
