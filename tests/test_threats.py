"""The known attacks on such proxies, each row named by its number; real bytes to real sockets on the embedded stage."""

import asyncio
import base64
import contextlib
import json
import os
import random
import re
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unicodedata import category
from urllib.parse import quote, unquote

import grpc.aio
import httpx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from sidecar.app import World
from sidecar.cli import environment
from sidecar.cli.stage import Servers, Stage
from sidecar.client.trust import write_bundle
from sidecar.clock import SystemClock
from sidecar.credentials.header import render
from sidecar.demo.tools import DemoTool
from sidecar.errors import CallerError, IssuerError, Reason
from sidecar.identity.callers import Callers
from sidecar.identity.peer import uid_of_peer
from sidecar.model.caller import Agent
from sidecar.model.policy import readings
from sidecar.model.tool import Authority, Route, Tool
from sidecar.policy.config import PolicyConfig
from sidecar.proxy import http1
from sidecar.proxy.ca import CertificateAuthority
from sidecar.proxy.http1 import Fields, RequestHead
from sidecar.proxy.inject import inject, stripped
from sidecar.secret import Secret
from sidecar.tools.config import ToolConfig
from sidecar.tools.names import embeds_ip, parse_authority
from sidecar.tools.router import Router, canonical_path
from sidecar.wire.spanlock.v1 import token_exchange_pb2, token_exchange_pb2_grpc, workflows_pb2_grpc
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from tests.stage import (
    call,
    client,
    closed,
    opened,
    port_of,
    raw,
    ready_stage,
    reason_of,
    tunnel,
    two_agents,
    url,
)

TOOL = Tool(name="search", scheme="https", authority=Authority("api.x.com", 443), issuer="i")


# -- H: wrong destination ------------------------------------------------------------------------------------------------


async def test_h1_another_host_inside_the_tunnel_is_refused_before_any_exchange() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        for host in (f"{stage.reports.host}:{stage.reports.port}", "evil.test", f"{stage.search.host}:1"):
            async with tunnel(stage, port_of(workflow.proxy_url), stage.search) as (reader, writer):
                writer.write(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                assert reason_of(await reader.read()) == "authority_mismatch"
        assert (stage.issuer.minted, stage.search.requests, stage.reports.requests) == (0, 0, 0)
        assert flows(stage) == ["authority_mismatch"] * 3


@pytest.mark.parametrize("sni", ["reports.tool.test", "192.0.2.1"], ids=["another", "none"])
async def test_h1_another_or_no_sni_ends_the_handshake_and_stands_in_the_audit(sni: str) -> None:
    """To an address a TLS client sends no server name at all."""
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        with pytest.raises((ssl.SSLError, ConnectionError)):
            async with tunnel(stage, port_of(workflow.proxy_url), stage.search, sni=sni):
                pass
        async with asyncio.timeout(5):
            while not stage.app.plane.denials:
                await asyncio.sleep(0)
        assert stage.app.plane.denials[-1].outcome == "authority_mismatch"
        assert (stage.issuer.minted, stage.search.requests, stage.reports.requests) == (0, 0, 0)


@pytest.mark.parametrize(
    ("line", "host"),
    [
        ("GET http://127.0.0.1:@/x", "evil.test"),
        ("GET http://127.0.0.1:@/x", "127.0.0.1:1"),
        ("GET http://127.0.0.1:@/x", "reports.tool.test"),
        ("GET http://evil.test/x", "127.0.0.1:@"),
        ("GET /legacy/x", "evil.test"),
        ("GET /legacy/x", "search.tool.test"),
        ("GET /legacy/x", "127.0.0.1.evil.test:@"),
    ],
)
async def test_h1_a_host_that_is_not_the_target_reaches_no_tool_in_plain_text(line: str, host: str) -> None:
    """Absolute form and base URL: the destination is in the line, and a Host that says otherwise is for nobody."""
    async with legacy() as (stage, recorder, port):
        workflow = await opened(stage, listener=True)
        head = f"{line} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".replace("@", str(port))
        answer = await raw(port_of(workflow.proxy_url), head.encode())
        assert (answer[:12], reason_of(answer)) == (b"HTTP/1.1 403", "authority_mismatch")
        assert (recorder.connections, stage.issuer.minted) == (0, 0) and flows(stage) == ["authority_mismatch"]


async def test_h1_connect_and_its_host_header_must_agree() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        target = f"{stage.search.host}:{stage.search.port}"
        answer = await raw(
            port_of(workflow.proxy_url), f"CONNECT {target} HTTP/1.1\r\nHost: evil.test:443\r\n\r\n".encode()
        )
        assert reason_of(answer) == "authority_mismatch"


async def test_h2_connect_to_a_stranger_with_a_tools_host_inside_gets_no_tunnel() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        answer = await raw(
            port_of(workflow.proxy_url), b"CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n"
        )
        assert (answer[:12], reason_of(answer)) == (b"HTTP/1.1 403", "unknown_tool")
        assert stage.issuer.minted == 0


async def test_h4_a_credential_never_travels_over_cleartext() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        target = f"{stage.search.host}:{stage.search.port}"
        answer = await raw(
            port_of(workflow.proxy_url),
            f"GET http://{target}/ HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n".encode(),
        )
        assert (answer[:12], reason_of(answer)) == (b"HTTP/1.1 403", "cleartext_refused")
        assert stage.search.requests == 0


@pytest.mark.parametrize(
    "text",
    ["[::1", "[api.x.com]:443", "api.x.com:443 ", "api.x.com:0443", "api.x.com:", "api.x.com:99999", "user@api.x.com", "a b",
     "api.x.com:+443", "", ":443", "api..x.com", "-a.com:443", "a/b:443", "[fe80::1%25eth0]", "[fe80::1%eth0]:443", "[::1%]"],
)  # fmt: skip
def test_h5_odd_authorities_are_refused(text: str) -> None:
    with pytest.raises(CallerError):
        parse_authority(text, 443)


@pytest.mark.parametrize(
    "target", ["[::ffff:7f00:1]:443", "[::1]:443", "search.tool.test:@ ", " search.tool.test:@", "search.tool.test:0@", "[::1]:@",
               "search.tool.test:@:443", "search.tool.test:", "search.tool.test", "x@search.tool.test:@", "search.tool.test:@/"],
)  # fmt: skip
async def test_h5_connect_to_an_odd_authority_gets_no_tunnel(target: str) -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        odd = (
            target.replace("@", str(stage.search.port))
            if "x@" not in target
            else f"x@search.tool.test:{stage.search.port}"
        )
        for host in (odd, f"search.tool.test:{stage.search.port}"):
            answer = await raw(port_of(workflow.proxy_url), f"CONNECT {odd} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert answer[9:10] == b"4", answer
        assert (stage.issuer.minted, stage.search.requests) == (0, 0)
        assert not {"ok", "client_gone"} & set(flows(stage)) and len(flows(stage)) == 2


@pytest.mark.parametrize(
    ("text", "host"),
    [("X.COM", "x.com"), ("x.com.", "x.com"), ("bücher.example", "xn--bcher-kva.example"), ("[::1]:443", "::1")],
)
def test_h5_one_spelling_for_each_destination(text: str, host: str) -> None:
    assert parse_authority(text, 443) == Authority(host, 443)


@pytest.mark.parametrize(
    "text", ["api.x.com.evil", "evil-api.x.com", "[api.x.com]", "api.x.com\0.ok", "api.x.com%00", "api\u3002x\u3002com", "x.com",
             "*.x.com", "api.x.com@evil"],
)  # fmt: skip
def test_h8_look_alikes_match_no_tool(text: str) -> None:
    with pytest.raises(CallerError):
        Router([TOOL]).by_authority(parse_authority(text, 443), "https")


async def test_h8_a_host_header_is_ascii() -> None:
    """Clients send A-labels. What is no ASCII is refused as it is: to IDNA, a name with a soft hyphen is the name without."""
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        port, tool = port_of(workflow.proxy_url), f"{stage.search.host}:{stage.search.port}".encode()
        for host in (b"local\xadhost", "127\u30020.0.1".encode(), "\u1d38ocalhost".encode(), b"\xe9." * 30_000):
            answer = await raw(port, b"GET /search/ HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
            assert (answer[:12], reason_of(answer)) == (b"HTTP/1.1 403", "authority_mismatch")
        async with tunnel(stage, port, stage.search) as (reader, writer):
            writer.write(
                b"GET / HTTP/1.1\r\nHost: " + tool.replace(b".tool", b".to\xadol") + b"\r\nConnection: close\r\n\r\n"
            )
            assert reason_of(await reader.read()) == "authority_mismatch"
        assert stage.search.requests == 0


@pytest.mark.parametrize(
    "text", ["\u00e9" * 60_000, "\u00e9." * 30_000, "a" * 60_000, "[" + ":" * 60_000, "a." * 130 + "com"]
)
def test_h8_a_name_longer_than_any_is_refused_before_idna_reads_it(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(host: str) -> str:
        raise AssertionError(f"{len(host)} characters were read")

    monkeypatch.setattr("sidecar.tools.names.parse_host", read)
    monkeypatch.setattr("sidecar.tools.names._ipv6", read)
    with pytest.raises(CallerError) as caught:
        parse_authority(text, 443)
    assert caught.value.reason is Reason.AUTHORITY_MISMATCH


def test_h8_the_longest_name_is_none_too_long() -> None:
    longest = ".".join(["a" * 63] * 3 + ["b" * 61])
    assert parse_authority(f"{longest}.:65535", None) == Authority(longest, 65535)


async def test_h9_an_empty_list_denies() -> None:
    with pytest.raises(ValueError, match="at least 1 item"):
        PolicyConfig(files=())
    async with ready_stage() as stage:
        workflow, explicit = await opened(stage), port_of(stage.app.addresses["explicit"])
        text = stage.config_text()
        (stage.dir / "spanlock.yaml").write_text(text[: text.index("tools:")] + "tools: []\n")
        assert (await stage.app.reload()).applied
        target = f"{stage.search.host}:{stage.search.port}"
        for request in (f"CONNECT {target}", f"GET http://{target}/", f"GET https://{target}/"):
            answer = await raw(explicit, f"{request} HTTP/1.1\r\nHost: {target}\r\nConnection: close\r\n\r\n".encode())
            assert answer[9:12] == b"403", answer
        assert reason_of(await call(stage, workflow.handle)) == "unknown_tool"
        assert (stage.search.requests, stage.issuer.minted) == (0, 0)


NO_METHODS = """\
- {{name: none, url: "http://127.0.0.1:9", issuer: demo-issuer, methods: [], allow_networks: [127.0.0.0/8]}}
"""


async def test_h9_a_tool_with_an_empty_list_of_methods_takes_none() -> None:
    async with ready_stage(more=NO_METHODS, policy_for=("none",)) as stage:
        workflow = await opened(stage)
        head = f"GET /none/ HTTP/1.1\r\nHost: 127.0.0.1\r\nx-spanlock-workflow: {workflow.handle}\r\nConnection: close\r\n\r\n"
        answer = await raw(port_of(stage.app.addresses["reverse"]), head.encode())
        assert reason_of(answer) == "method_refused"


async def test_h11_a_redirect_is_handed_back_and_never_followed() -> None:
    async with plain_tool(b"HTTP/1.1 302 Found\r\nLocation: https://evil.test/\r\nContent-Length: 0\r\n\r\n") as (
        stage,
        agent,
        seen,
    ):
        answer = await agent.get("/legacy/x")
        assert (answer.status_code, answer.headers["location"]) == (302, "https://evil.test/")
        assert len(seen) == 1


# -- P: handle and injection ---------------------------------------------------------------------------------------------


def parse_request(head: bytes) -> RequestHead:
    return http1.parse_request(head.removesuffix(b"\r\n\r\n"), Fields(stripped))


@pytest.mark.parametrize("value", ["a\r\nX: y", "a\nb", "a\0b", "a\r b", "", " a", "a ", "ü", "a\x7f"])
def test_p6_a_value_that_is_no_header_is_refused(value: str) -> None:
    with pytest.raises(IssuerError) as caught:
        render(TOOL, Secret(value))
    assert caught.value.reason is Reason.CREDENTIAL_UNUSABLE and (not value or value not in caught.value.detail)


@pytest.mark.parametrize("value", ["a&admin=1", "../", "#"])
def test_p7_a_value_goes_into_its_header_and_nowhere_else(value: str) -> None:
    head = parse_request(b"GET /a?b=c HTTP/1.1\r\nHost: api.x.com\r\n\r\n")
    sent = inject(head, Route(TOOL, "/a", b"/a?b=c"), render(TOOL, Secret(value))).head
    assert sent.startswith(b"GET /a?b=c HTTP/1.1\r\n") and sent.count(value.encode()) == 1


def test_p8_the_agents_own_credentials_go_and_connection_cannot_take_ours() -> None:
    raw_head = (
        b"GET / HTTP/1.1\r\nHost: api.x.com\r\nAuthorization: one\r\nauthorization: two\r\nAuthorization_: three\r\n"
        b"Connection: authorization, x-gone\r\nX-Gone: 1\r\nProxy-Authorization: Basic eA==\r\nX-Api-Key: four\r\n"
        b"Cookie: five\r\nX-Kept: yes\r\n\r\n"
    )
    sent = inject(parse_request(raw_head), Route(TOOL, "/", b"/"), b"Bearer OURS").head.lower()
    assert sent.count(b"authorization") == 1 and b"authorization: bearer ours" in sent and b"x-kept: yes" in sent
    for gone in (b"one", b"two", b"three", b"four", b"five", b"x-gone", b"proxy-", b"connection"):
        assert gone not in sent


@pytest.mark.parametrize(
    "other", ["X_Custom_Key", "X.Custom.Key", "x-custom_key", "X~Custom!Key", "_X-Custom-Key", "X_Other_Secret"]
)
def test_p8_no_spelling_of_the_credentials_header_goes_on_beside_ours(other: str) -> None:
    """Gateway interfaces (CGI, WSGI) make one variable of all of these."""
    tool = replace(TOOL, header="x-custom-key", client_headers=("X-Other-Secret".lower(),))
    raw_head = f"GET / HTTP/1.1\r\nHost: api.x.com\r\n{other}: theirs\r\nX_Kept: yes\r\n\r\n".encode()
    sent = inject(parse_request(raw_head), Route(tool, "/", b"/"), b"OURS").head
    assert b"x-custom-key: OURS" in sent and b"theirs" not in sent and b"x_kept: yes" in sent


@pytest.mark.parametrize(
    "name", ["Authorization", "x.api.key", "X_Api_Key", "Api.Key", "ApiKey", "X-Goog-Api-Key", "Cookie_", "X.Amz.Date", "DPoP",
             "X.Forwarded.For", "x+spanlock+workflow", "Proxy.Authorization", "Content.Length", "Transfer_Encoding"],
)  # fmt: skip
def test_p8_credentials_of_any_scheme_and_spelling_are_stripped(name: str) -> None:
    assert stripped(name.lower().encode())


def test_p8_what_connection_names_goes_in_every_spelling() -> None:
    raw_head = b"GET / HTTP/1.1\r\nHost: api.x.com\r\nConnection: x-a, X_B\r\nX_A: gone\r\nX-A: gone\r\nX_B: gone\r\nX-C: kept\r\n\r\n"
    sent = inject(parse_request(raw_head), Route(TOOL, "/", b"/"), b"Bearer OURS").head
    assert b"gone" not in sent and b"x-c: kept" in sent


@pytest.mark.parametrize(
    "query",
    ["access_token=x", "a=b&access_token=x", "a;ACCESS_TOKEN=x", "access%5Ftoken=x", "%61ccess_to%6Ben=x", "access.token=x", "access_token",
     "access%20token=x", "+access_token=x", "%20access_token=x", "access_token[]=x", "access_token%5B%5D=x", "client_secret=x",
     "api_key=x", "api-key=x", "apikey=x", "apiKey=x", "a&&api_key"],
)  # fmt: skip
def test_p8_a_credential_in_the_query_is_refused(query: str) -> None:
    with pytest.raises(CallerError) as caught:
        Router([TOOL]).route(TOOL, b"/a?" + query.encode())
    assert caught.value.reason is Reason.FOREIGN_CREDENTIAL


@pytest.mark.parametrize(
    "query",
    ["", "a=access_token", "key=x", "token=x", "my_access_token=x", "access_tokens=x", "next=%2Fa%3Faccess_token%3Dx", "a=%26api_key%3Dx",
     "api_keys", "access_token_id=x", "sig=api_key%3D", "q=?access_token=x", "&=&;;="],
)  # fmt: skip
def test_p8_a_query_without_a_credential_goes_on(query: str) -> None:
    assert Router([TOOL]).route(TOOL, b"/a?" + query.encode()).target == b"/a?" + query.encode()


def test_l7_forwarding_headers_of_the_agent_are_dropped() -> None:
    raw_head = b"GET / HTTP/1.1\r\nHost: api.x.com\r\nX-Forwarded-For: 1.2.3.4\r\nForwarded: for=1.2.3.4\r\nVia: x\r\nX-Forwarded-Host: evil\r\n\r\n"
    sent = inject(parse_request(raw_head), Route(TOOL, "/", b"/"), b"Bearer x").head.lower()
    assert b"forwarded" not in sent and b"via" not in sent and b"evil" not in sent


@pytest.mark.parametrize(
    "name", ["X-Forwarded-For", "X_Forwarded_Proto", "Forwarded", "X-Real-IP", "X-Host", "X-Original-Host", "True-Client-IP", "X-Client-IP",
             "X-Cluster-Client-IP", "CF-Connecting-IP", "X-Original-URL", "X-Rewrite-URL"],
)  # fmt: skip
def test_l7_no_field_that_an_intermediary_would_write_goes_on(name: str) -> None:
    assert stripped(name.lower().encode())


@pytest.mark.parametrize(
    "name", ["X-HTTP-Method-Override", "X-Method-Override", "X-HTTP-Method", "x_http_method_override"]
)
async def test_policy_sees_the_method_that_the_tool_sees(name: str) -> None:
    """Many frameworks take a POST with one of these for another method, which policy was not asked about."""
    async with plain_tool(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as (_, agent, seen):
        assert (await agent.post("/legacy/items/1", headers={name: "DELETE"})).status_code == 200
        assert seen[0].startswith(b"POST /items/1 ") and b"DELETE" not in seen[0]


async def test_p13_n5_a_denied_call_costs_no_dns_no_connection_and_no_exchange() -> None:
    """On a tool that is known by its name alone: a look-up of it would have been a way out for whoever chose the name."""
    names = Names(["127.0.0.1"])
    around = World(SystemClock(), random.Random(1), names)
    async with (
        recording() as (recorder, port),
        ready_stage(more=by_name(port, "[127.0.0.0/8]"), around=around) as stage,
    ):
        workflow = await opened(stage)
        assert reason_of(await call(stage, workflow.handle, path="/named/x")) == "policy_denied"
        named = SimpleNamespace(host="named.test", port=port)
        explicit = port_of(stage.app.addresses["explicit"])
        async with tunnel(stage, explicit, named, handle=workflow.handle) as (reader, writer):
            writer.write(f"GET /x HTTP/1.1\r\nHost: named.test:{port}\r\nConnection: close\r\n\r\n".encode())
            assert reason_of(await asyncio.wait_for(reader.read(), 10)) == "policy_denied"
        assert (names.asked, recorder.connections, stage.issuer.minted) == ([], 0, 0)
        assert flows(stage) == ["policy_denied"] * 2


async def test_p14_a_mint_failure_fails_closed() -> None:
    """The issuer goes down in mid-run: what is held serves, what would have to be minted is refused, nothing goes on bare."""
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            assert (await agent.get(url(stage.reports))).status_code == 200
            stage.issuer.down = True
            answer = await agent.get(url(stage.search))
            assert (answer.status_code, answer.headers["x-spanlock-reason"]) == (503, "issuer_unavailable")
            assert (await agent.get(url(stage.reports))).status_code == 200
            assert (stage.reports.requests, len(stage.reports.authorized), stage.search.requests) == (2, 2, 0)
            stage.issuer.down = False
            assert (await agent.get(url(stage.search))).status_code == 200


# -- D: desync -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\n\r\n",
        "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    ],
)
async def test_d1_malformed_framing_reaches_no_tool(framing: str) -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with tunnel(stage, port_of(workflow.proxy_url), stage.search) as (reader, writer):
            writer.write(f"POST / HTTP/1.1\r\nHost: {stage.search.host}:{stage.search.port}\r\n{framing}".encode())
            answer = await reader.read()
        assert (answer[:12], reason_of(answer)) == (b"HTTP/1.1 400", "malformed_request")
        assert stage.search.requests == 0


async def test_d3_h2c_is_refused() -> None:
    async with ready_stage() as stage:
        port = port_of(stage.app.addresses["explicit"])
        assert reason_of(await raw(port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")) == "upgrade_refused"
        head = b"GET http://x.test/ HTTP/1.1\r\nHost: x.test\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n"
        assert reason_of(await raw(port, head)) == "upgrade_refused"


async def test_d5_an_answer_before_the_bodys_end_ends_both_connections() -> None:
    """The next call of the same workflow would be read as the rest of the body that never came."""
    early = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno"
    async with plain_tool(early) as (stage, agent, seen):
        port = port_of(stage.app.addresses["reverse"])
        handle = agent.headers["x-spanlock-workflow"]
        request = f"POST /legacy/x HTTP/1.1\r\nHost: localhost\r\nX-Spanlock-Workflow: {handle}\r\nContent-Length: 100000\r\n\r\nabc"
        answer = await raw(port, request.encode())
        assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()
        await agent.get("/legacy/y")
        assert [head[:4] for head in seen] == [b"POST", b"GET "] and b"abc" not in seen[1]


async def test_d6_connect_inside_a_tunnel_is_refused() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with tunnel(stage, port_of(workflow.proxy_url), stage.search) as (reader, writer):
            writer.write(b"CONNECT evil.test:443 HTTP/1.1\r\nHost: evil.test:443\r\n\r\n")
            answer = await reader.read()
        assert (answer[:12], reason_of(answer)) == (b"HTTP/1.1 405", "method_refused")


@pytest.mark.parametrize(
    "path",
    ["/a/..%2fadmin", "//admin", "/a;x/../admin", "/%252e", "/a/../b", "/a/./b", "/a/..", "/%2e%2e/b", "/a%5cb", "/a%00", "/a;b",
     "/a%zz", "/a\\b", "a", "", "/a#b", "/a%0d%0ab"],
)  # fmt: skip
def test_d7_ambiguous_paths_are_refused(path: str) -> None:
    with pytest.raises(CallerError) as caught:
        canonical_path(path.encode())
    assert caught.value.reason is Reason.AMBIGUOUS_PATH


@pytest.mark.parametrize(
    "path",
    ["/%61dmin", "/%41dmin", "/adm%69n/users", "/a%2Db", "/a%5Fb", "/a%7Eb", "/%30", "/a%25b", "/a%2Fb", "/a%2Eb"],
)  # fmt: skip
def test_d7_a_character_that_needs_no_escape_is_not_escaped(path: str) -> None:
    with pytest.raises(CallerError) as caught:
        canonical_path(path.encode())
    assert caught.value.reason is Reason.AMBIGUOUS_PATH


@pytest.mark.parametrize(
    "path",
    ["/v1/%c0%ae%c0%ae/admin", "/v1/%C0%AE%C0%AE/admin", "/v1/%C0%AFadmin", "/%E0%80%AF", "/%F0%80%80%AF", "/%80", "/%C3", "/%C3/%A9",
     "/%C3x%A9", "/%ED%A0%80", "/%F4%90%80%80", "/%F5%80%80%80", "/%FF", "/%C2%80", "/%C2%85", "/%C2%9F", "/%0A", "/%1B", "/%7F",
     "/caf%c3%a9", "/caf%C3%a9", "/a%3f", "/a%5b"],
)  # fmt: skip
def test_d7_escapes_are_utf8_without_controls_in_upper_case(path: str) -> None:
    with pytest.raises(CallerError) as caught:
        canonical_path(path.encode())
    assert caught.value.reason is Reason.AMBIGUOUS_PATH


@pytest.mark.parametrize(
    "path", ["/", "/v1/items", "/a%20b", "/a%22%23%3C%3E%3F%5B%5D%5E%60%7B%7C%7D", "/caf%C3%A9", "/%E2%82%AC/%F0%9F%98%80",
             "/%C2%A0", "/%ED%9F%BF", "/%F4%8F%BF%BF", "/a@b:c,d=e+f$g&h'(i)*j!~_-.k", "/a%40b%3Ac%2Cd%3De%2Bf%24g%26h%27%28i%29%2Aj%21", "/...", "/.well-known/x"],
)  # fmt: skip
def test_d7_a_canonical_path_goes_on_as_it_is(path: str) -> None:
    assert canonical_path(path.encode()) == path


ESCAPED = st.binary(min_size=1, max_size=4).map(lambda raw: "".join(f"%{byte:02X}" for byte in raw))


@given(
    st.lists(
        st.one_of(st.characters().map(quote), ESCAPED, st.sampled_from("/.;%aZ\\~@"), st.text(max_size=2)), max_size=8
    )
)
def test_d7_every_path_has_one_spelling_that_policy_is_asked_about(pieces: list[str]) -> None:
    """Of what is accepted, the last reading is what its own meaning is written as, and policy has a say in that."""
    path = "/" + "".join(pieces)
    try:
        accepted = canonical_path(path.encode(errors="replace"))
    except CallerError:
        return
    meaning = unquote(accepted, errors="strict")
    assert accepted == path.partition("?")[0] and quote(meaning, safe="/!$&'()*+,=:@~") == readings(accepted)[-1]
    assert not any(category(character) == "Cc" or character in "%\\" for character in meaning)


@pytest.mark.parametrize(
    "path",
    ["/a/..;/admin", "/.;x/admin", "/v1/..;/admin", "/v1/.;x/..;y/admin", "/;/admin", "/a/;x/b", "/..;", "/a/.;", "/a%3Bb", "/%2;0",
     "/%4;1dmin", "/a//b;x", "/a/../b;x"],
)  # fmt: skip
def test_d7_parameters_hide_no_dot_segment(path: str) -> None:
    """Tomcat and others cut `;…` off each segment, and then resolve what is left."""
    with pytest.raises(CallerError) as caught:
        canonical_path(path.encode(), allow_semicolons=True)
    assert caught.value.reason is Reason.AMBIGUOUS_PATH


@pytest.mark.parametrize("path", ["/a;x", "/a;x=1;y=2/b;z", "/a;x=..", "/...;x", "/a/b;"])
def test_d7_parameters_go_on_where_they_are_allowed(path: str) -> None:
    assert canonical_path(path.encode(), allow_semicolons=True) == path


async def test_d7_a_forbidden_path_is_forbidden_in_every_spelling() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with tunnel(stage, port_of(workflow.proxy_url), stage.search) as (reader, writer):
            for path in ("/admin", "/%61dmin", "/adm%69n/users", "/%C1%A1dmin"):
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {stage.search.host}:{stage.search.port}\r\n\r\n".encode())
                head = await reader.readuntil(b"\r\n\r\n")
                assert reason_of(head) == ("policy_denied" if path == "/admin" else "ambiguous_path")
                length = re.search(rb"content-length: (\d+)", head)
                assert length is not None
                await reader.readexactly(int(length[1]))
        assert (stage.search.requests, stage.issuer.minted) == (0, 0)


def test_d7_the_matched_bytes_are_the_sent_bytes() -> None:
    route = Router([TOOL]).route(TOOL, b"/a%20b/c?d=../e")
    assert (route.path, route.target) == ("/a%20b/c", b"/a%20b/c?d=../e")


# -- N: network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "1.2.3.256", "0x7f000001", "1.2.3.4.5"]
)
def test_n3_odd_ipv4_spellings_are_refused(text: str) -> None:
    with pytest.raises(CallerError):
        parse_authority(text, 80)


@pytest.mark.parametrize(
    ("name", "address"),
    [("10.0.0.1.nip.io", "10.0.0.1"), ("app-10-0-0-1.sslip.io", "10.0.0.1"), ("0a000001.nip.io", "10.0.0.1"),
     ("v1-2-3.example.com", None), ("10.0.0.1.example.com", None)],
)  # fmt: skip
def test_n4_names_that_spell_addresses_are_decoded(name: str, address: str | None) -> None:
    assert str(embeds_ip(name)) == str(address)


async def test_n5_nothing_is_resolved_before_policy() -> None:
    asked: list[str] = []
    async with ready_stage() as stage:

        async def resolve(host: str, port: int) -> list[str]:
            asked.append(host)
            return ["127.0.0.1"]

        stage.app.pool._resolve = resolve
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            with pytest.raises(httpx.ProxyError):
                await agent.get("https://c2VjcmV0.evil.test/")
            assert (await agent.get("http://c2VjcmV0.evil.test/")).status_code == 403
    assert asked == []


async def test_n6_the_base_url_listener_answers_to_loopback_names_only() -> None:
    async with ready_stage() as stage:
        port = port_of(stage.app.addresses["reverse"])
        answer = await raw(port, b"GET /search/ HTTP/1.1\r\nHost: rebound.evil.test\r\nConnection: close\r\n\r\n")
        assert reason_of(answer) == "authority_mismatch"


@pytest.mark.parametrize(
    "fields",
    ["Origin: https://evil.test", "Origin: null", "Origin: http://localhost.evil.test", "Origin: http://127.0.0.1@evil.test", "Origin:",
     "Origin: chrome-extension://abcdef", "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site", "sec-fetch-site: Cross-Site",
     "Origin: https://evil.test\r\nSec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors", "Origin: http://127.0.0.1:8000 https://evil.test",
     "Origin: http://localhost\r\nSec-Fetch-Site: same-site", "Sec-Fetch-Site: new-site"],
)  # fmt: skip
async def test_n6_a_web_page_reaches_no_tool_by_base_url(fields: str) -> None:
    """A page in a browser of the agent's needs no handle at a workflow's own listener, and no-cors asks nobody."""
    async with ready_stage() as stage:
        port = port_of((await opened(stage, listener=True)).proxy_url)
        head = f"POST /search/x HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{fields}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        answer = await raw(port, head.encode())
        assert (answer[:12], reason_of(answer)) == (b"HTTP/1.1 403", "cross_site")
        assert (stage.search.requests, stage.issuer.minted) == (0, 0)


async def test_n6_what_no_other_site_sent_goes_on() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        port = port_of(workflow.proxy_url)
        for fields in ("X: y", "Origin: http://localhost:3000", f"Origin: http://127.0.0.1:{port}\r\nSec-Fetch-Site: same-origin",
                       "Origin: https://[::1]", "Sec-Fetch-Site: none"):  # fmt: skip
            answer = await raw(
                port, f"GET /search/x HTTP/1.1\r\nHost: localhost\r\n{fields}\r\nConnection: close\r\n\r\n".encode()
            )
            assert answer.startswith(b"HTTP/1.1 200"), (fields, answer)
        async with client(stage, workflow.proxy_url, headers={"Origin": "https://app.test"}) as agent:
            assert (await agent.get(url(stage.search))).status_code == 200, "the tool's own business"


class Names:
    """The machine's resolver, told by the test what to say."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)


class Recorder:
    """Takes connections and notes every byte."""

    def __init__(self, answer: bytes = b"") -> None:
        self.connections = 0
        self.received = b""
        self._answer = answer
        self._server: asyncio.Server | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> int:
        self._server = await asyncio.start_server(self._talk, host, port, ssl=tls)
        return int(self._server.sockets[0].getsockname()[1])

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while data := await reader.read(65536):
            self.received += data
            if b"\r\n\r\n" in self.received and self._answer:
                writer.write(self._answer)
        writer.close()

    def stop(self) -> None:
        if self._server is not None:
            self._server.close()


def flows(stage: Stage) -> list[str]:
    """The outcome of each call, as the audit has it."""
    stage.app.audit.flush()
    lines = [json.loads(line) for line in (stage.dir / "audit.jsonl").read_text().splitlines()]
    return [line["outcome"] for line in lines if line["kind"] == "flow"]


@contextlib.asynccontextmanager
async def recording(answer: bytes = b"") -> AsyncIterator[tuple[Recorder, int]]:
    """A recorder on loopback, and its port."""
    recorder = Recorder(answer)
    port = await recorder.start()
    try:
        yield recorder, port
    finally:
        recorder.stop()


@contextlib.asynccontextmanager
async def legacy() -> AsyncIterator[tuple[Stage, Recorder, int]]:
    """A stage with a plain-http tool `legacy` on loopback that notes every byte, and its port."""
    async with recording(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n") as (recorder, port):
        more = f"- {{{{name: legacy, url: 'http://127.0.0.1:{port}', allow_networks: [127.0.0.0/8], {FIELDS}}}}}\n"
        async with ready_stage(more=more, policy_for=("legacy",)) as stage:
            yield stage, recorder, port


FIELDS = "issuer: demo-issuer, audience: tool-search, timeouts: {{connect: 1}}"


def by_name(port: int, networks: str = "[]") -> str:
    return f'- {{{{name: named, url: "https://named.test:{port}", allow_networks: {networks}, {FIELDS}}}}}\n'


N_ADDRESSES = (
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254",
    "192.0.0.192", "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1",
    "fd00:ec2::254", "ff02::1", "2001:db8::1",
    "::ffff:127.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::1", "2001:0:0:0:0:0:80ff:fffe",
    "2001:db8::5efe:7f00:1", "fec0::1", "3fff::1", "5f00::1", "::ffff:0:7f00:1", "64:ff9b:1:7f00:0:100:808:808",
)  # fmt: skip


async def test_n1_n2_a_private_answer_is_never_dialled() -> None:
    """Through a real call: what resolves to such an address, alone or among public ones, costs no connection, no exchange."""
    names, recorder = Names(["127.0.0.1"]), Recorder()
    port = await recorder.start()
    around = World(SystemClock(), random.Random(1), names)
    async with ready_stage(more=by_name(port), policy_for=("named",), around=around) as stage:
        workflow = await opened(stage)
        headers = {"x-spanlock-workflow": workflow.handle}
        async with httpx.AsyncClient(trust_env=False, headers=headers) as agent:
            for address in N_ADDRESSES:
                for answer in ([address], ["1.1.1.1", address]):
                    names.answers = [answer]
                    refused = await agent.get(f"http://{stage.app.addresses['reverse']}/named/x")
                    reason = refused.headers["x-spanlock-reason"]
                    assert (refused.status_code, reason) == (403, "address_refused"), answer
        assert (recorder.connections, stage.issuer.minted) == (0, 0)
    recorder.stop()


async def test_n1_n2_a_private_literal_is_never_dialled() -> None:
    """The operator has written the address itself; only `allow_networks` says that it is meant."""
    literals = [f"[{address}]" if ":" in address else address for address in N_ADDRESSES]
    async with recording() as (recorder, port):
        urls = [*(f"https://{literal}:{port}" for literal in literals), f"http://127.0.0.9:{port}"]
        more = "".join(f"- {{{{name: at{n}, url: '{url}', {FIELDS}}}}}\n" for n, url in enumerate(urls))
        async with ready_stage(more=more, policy_for=[f"at{n}" for n in range(len(urls))]) as stage:
            workflow = await opened(stage)
            for number, literal in enumerate(urls):
                answer = await call(stage, workflow.handle, path=f"/at{number}/x")
                assert (answer[9:12], reason_of(answer)) == (b"403", "address_refused"), literal
            assert (recorder.connections, stage.issuer.minted) == (0, 0)


async def test_n6_what_was_checked_is_dialled_and_rebinding_changes_nothing() -> None:
    """127.0.0.2 is allowed here and 127.0.0.1 is not: a resolver that alternates gets one look-up a connection."""
    good, bad = Recorder(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), Recorder()
    names = Names(["127.0.0.2"], ["127.0.0.1"])
    around = World(SystemClock(), random.Random(1), names)
    port = await bad.start("127.0.0.1")
    more = by_name(port, '[127.0.0.2/32], ca_file: "{dir}/tools-ca.pem"')
    async with ready_stage(more=more, policy_for=("named",), around=around) as stage:
        await good.start("127.0.0.2", port, stage.pki.server_context("named.test"))
        workflow = await opened(stage)
        headers = {"x-spanlock-workflow": workflow.handle, "connection": "close"}
        async with httpx.AsyncClient(trust_env=False, headers=headers) as agent:
            target = f"http://{stage.app.addresses['reverse']}/named/x"
            answer = await agent.get(target)
            assert (answer.status_code, good.connections, bad.connections) == (200, 1, 0), answer.text
            assert names.asked == ["named.test"]
            stage.app.pool.drop_workflow(workflow.workflow.id)
            refused = await agent.get(target)
            assert refused.headers["x-spanlock-reason"] == "address_refused"
        assert bad.connections == 0
    good.stop()
    bad.stop()


async def test_n8_the_sidecars_own_ports_cannot_be_reached_through_it() -> None:
    """Every one that it listens on, whatever the operator's configuration says of loopback: a tool of ours would be ourselves."""
    names = ("health", "otlp-grpc", "otlp-http", "explicit", "reverse", "own")
    async with ready_stage(policy_for=names) as stage:
        app, workflow = stage.app, await opened(stage, listener=True)
        addresses = [*(app.addresses[name] for name in ("explicit", "reverse")), workflow.proxy_url]
        assert app.health is not None
        ports = [app.health.port, app.otlp.grpc_port, app.otlp.http_port, *map(port_of, addresses)]
        assert len({*ports}) == len(names) and all(ports)
        (stage.dir / "spanlock.yaml").write_text(
            stage.config_text()
            + "".join(
                f"- {{name: {name}, url: 'http://127.0.0.1:{port}', issuer: demo-issuer, allow_networks: [127.0.0.0/8]}}\n"
                for name, port in zip(names, ports, strict=True)
            )
        )
        assert (await app.reload()).applied
        for name in names:
            assert reason_of(await call(stage, workflow.handle, path=f"/{name}/metrics")) == "address_refused", name
        assert stage.issuer.minted == 0


def test_n9_nothing_is_excepted_from_the_proxy(tmp_path: Path) -> None:
    inherited = {
        "NO_PROXY": "*",
        "no_proxy": "evil.test",
        "ALL_PROXY": "socks5://evil",
        "HTTPS_PROXY": "http://evil",
        "KEEP": "1",
    }
    bundle = write_bundle(tmp_path, "PEM")
    built = environment.build(inherited, "http://127.0.0.1:1", bundle, "00-x", "")
    assert not {k for k in built if k.lower() in ("no_proxy", "all_proxy")} and built["KEEP"] == "1"
    assert {built[k] for k in built if k.lower() in ("http_proxy", "https_proxy")} == {"http://127.0.0.1:1"}


# -- L: local trust ------------------------------------------------------------------------------------------------------


async def test_l1_a_stale_or_foreign_handle_is_407_and_never_falls_through() -> None:
    async with ready_stage(more="workflows: {{bind_only_open: true}}\n") as stage:
        stale = await opened(stage)
        await closed(stage, stale.workflow.id)
        await opened(stage)  # the only open one: a call without any handle would bind to it
        target = f"{stage.search.host}:{stage.search.port}"
        for handle in (stale.handle, "slw_" + "0" * 32, ""):
            request = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nProxy-Authorization: Bearer {handle}\r\n\r\n"
            answer = await raw(port_of(stage.app.addresses["explicit"]), request.encode())
            assert (answer[:12], reason_of(answer)) == (b"HTTP/1.1 407", "handle_invalid")


async def as_uid(uid: int, port: int, request: str) -> bytes:
    """What a process of another uid is answered."""
    script = (
        "import socket,sys; s=socket.create_connection(('127.0.0.1', int(sys.argv[1]))); s.sendall(sys.argv[2].encode());"
        "d=b''\nwhile True:\n b=s.recv(65536)\n if not b: break\n d+=b\nsys.stdout.buffer.write(d)"
    )
    words = ["/usr/bin/python3", "-c", script, str(port), request]
    done = await asyncio.to_thread(subprocess.run, words, user=uid, capture_output=True, check=True, timeout=30)
    return done.stdout


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another uid")
@pytest.mark.parametrize("declared", [False, True])
async def test_l1_another_uid_is_refused(declared: bool) -> None:
    """A good handle or a workflow's own listener, in the hands of a uid that is nobody's or another agent's."""
    async with two_agents(65534 if declared else 65533) as stage:
        workflow = await opened(stage, listener=True)
        plain = "GET /search/x HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        carrying = f"{plain}x-spanlock-workflow: {workflow.handle}\r\n\r\n"
        shared, own = port_of(stage.app.addresses["reverse"]), port_of(workflow.proxy_url)
        assert reason_of(await as_uid(65534, own, plain + "\r\n")) == "unknown_caller"
        answer = await as_uid(65534, shared, carrying)
        assert reason_of(answer) == ("handle_invalid" if declared else "unknown_caller")
        assert answer[9:12] == (b"407" if declared else b"403")
        assert (stage.search.requests, stage.issuer.minted) == (0, 0)


def test_l1_a_closed_client_proves_nothing() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            assert uid_of_peer(accepted.getsockname(), accepted.getpeername()) == os.getuid()
            ours.close()
            with pytest.raises(CallerError):
                uid_of_peer(accepted.getsockname(), accepted.getpeername())


def test_l1_two_agents_with_one_uid_need_handles() -> None:
    callers = Callers([Agent("a", "spiffe://x/a", uid=5), Agent("b", "spiffe://x/b", uid=5)])
    assert callers.by_uid(5).agents == {"a", "b"} and callers.shared_uids()
    with pytest.raises(CallerError):
        callers.by_uid(6)


async def test_l2_the_ca_key_is_in_no_file_of_the_process_and_signs_for_tools_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither below the run directory and the one for temporary files, nor in a nameless file that the process has open."""
    with tempfile.TemporaryDirectory() as below:
        monkeypatch.setattr(tempfile, "tempdir", below)
        async with ready_stage() as stage:
            workflow = await opened(stage, listener=True)
            async with client(stage, workflow.proxy_url) as agent:
                assert (await agent.get(url(stage.search))).status_code == 200
                held = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
                files = [path for path in (*Path(below).rglob("*"), *held) if path.is_file()]
                assert stage.dir / "run/operator/workflows.jsonl" in files
                needles = [b"PRIVATE KEY"]
                for key in (stage.app.plane.ca._key, stage.app.plane.ca._leaf_key):
                    number = key.private_numbers().private_value.to_bytes(32)
                    der = key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
                    needles += [number, number.hex().encode(), base64.b64encode(der)]
                assert [path for path in files if any(needle in path.read_bytes() for needle in needles)] == []
    authority = CertificateAuthority(["api.x.com"], SystemClock())
    authority.leaf("api.x.com")
    with pytest.raises(CallerError):
        authority.leaf("evil.test")


SHAPES = re.compile(rb"slw_[0-9a-f]{8}|slh_[0-9a-f]{8}|eyJ[\w-]{8}|PRIVATE KEY")
"""What a workflow's handle, a credential's handle, any JWT (token or SVID) and a key look like."""


def processes_of(root: int) -> dict[int, bytes]:
    """The process `root` and all that descend from it, each with its arguments and its environment, as the kernel shows them."""
    found = {root: b""}
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    while more := {pid for pid, parent in parents.items() if parent in found} - set(found):
        found.update(dict.fromkeys(more, b""))
    for pid in found:
        found[pid] = b"\0\0".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
    return found


async def test_l4_no_secret_in_the_environment_or_arguments_of_the_agent(tmp_path: Path) -> None:
    """`exec` with a sidecar of its own, while the command runs and holds a live token and both kinds of handle."""
    async with Servers() as servers:
        script = f"curl -sS -o {tmp_path}/answer {url(servers.search)} && echo called && read line"
        words = ("-m", "sidecar", "exec", "-c", f"{servers.dir}/spanlock.yaml", "--", "bash", "-c", script)
        env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SPANLOCK_RUN_DIR": f"{tmp_path}/nobody"}
        process = await asyncio.create_subprocess_exec(
            sys.executable, *words, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None and await process.stdout.readline() == b"called\n"
        shown = await asyncio.to_thread(processes_of, process.pid)
        (agent,) = (text for text in shown.values() if text.startswith(b"bash\0-c"))
        assert sum(b"--embedded-in" in text for text in shown.values()) == 1, "the sidecar is among those looked at"
        variables = dict(entry.split(b"=", 1) for entry in agent.partition(b"\0\0")[2].split(b"\0") if b"=" in entry)
        async with grpc.aio.insecure_channel("unix:" + variables[b"SPANLOCK_SOCKET"].decode()) as channel:
            request = token_exchange_pb2.ExchangeRequest(
                workflow_id=variables[b"SPANLOCK_WORKFLOW"].decode(), tool="search"
            )
            exchange = token_exchange_pb2_grpc.TokenExchangeStub(channel)  # type: ignore[no-untyped-call]
            workflows = workflows_pb2_grpc.WorkflowsStub(channel)  # type: ignore[no-untyped-call]
            issued = await exchange.Exchange(request)
            another = await workflows.Open(pb.OpenRequest(name="another"))
        token = servers.search.authorized[-1].removeprefix("Bearer ")
        assert servers.issuer.active(token) and issued.access_token.startswith("slh_")
        live = [token, issued.access_token, another.handle, *servers._secrets.values()]
        for text in (await asyncio.to_thread(processes_of, process.pid)).values():
            assert b"PATH=" in text, "the environment was there to be read"
            assert not [secret for secret in live if secret.encode() in text] and not SHAPES.search(text)
        await asyncio.wait_for(process.communicate(b"\n"), 50)
        assert process.returncode == 0 and servers.issuer.active(token) is None


def lead_to(stage: Stage, port: int) -> None:
    """The tool `search`, by its right name, at an impostor's port."""
    tool = stage.app.plane.router.by_name("search")
    stage.app.plane.router = Router([ToolConfig(
        name="search", url=f"https://{tool.authority.host}:{port}", issuer="demo-issuer", audience="tool-search",
        scopes=("search:read",), address="127.0.0.1", ca_file=f"{stage.dir}/tools-ca.pem",
    ).build()])  # fmt: skip


async def test_l6_a_wrong_certificate_costs_no_exchange_and_gets_no_byte() -> None:
    async with ready_stage() as stage:
        impostor = DemoTool("impostor.test", "offline", stage.issuer.issuer, ("tool-search", "x"))
        await impostor.start(stage.pki.server_context("impostor.test"))
        lead_to(stage, impostor.port)
        workflow = await opened(stage)
        async with httpx.AsyncClient(trust_env=False, headers={"x-spanlock-workflow": workflow.handle}) as agent:
            answer = await agent.get(f"http://{stage.app.addresses['reverse']}/search/x")
        assert (answer.status_code, answer.headers["x-spanlock-reason"]) == (502, "upstream_tls")
        assert (stage.issuer.minted, impostor.requests) == (0, 0)
        await impostor.stop()


async def test_l6b_nothing_is_written_before_the_peer_is_verified() -> None:
    """An impostor that notes every decrypted byte gets none, though it would have."""
    recorder = Recorder()
    async with ready_stage() as stage:
        port = await recorder.start(tls=stage.pki.server_context("impostor.test"))
        careless = ssl._create_unverified_context()
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=careless)
        writer.write(b"control")
        async with asyncio.timeout(5):
            while recorder.received != b"control":
                await asyncio.sleep(0)
        writer.close()
        lead_to(stage, port)
        workflow = await opened(stage)
        async with httpx.AsyncClient(trust_env=False, headers={"x-spanlock-workflow": workflow.handle}) as agent:
            answer = await agent.post(f"http://{stage.app.addresses['reverse']}/search/x", content=b"body")
        assert answer.headers["x-spanlock-reason"] == "upstream_tls"
        assert recorder.received == b"control"
    recorder.stop()


async def test_l8_a_close_cuts_what_streams_and_the_residual_life_is_told() -> None:
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with (
            client(stage, workflow.proxy_url) as agent,
            agent.stream("GET", url(stage.search, "/stream")) as stream,
        ):
            lines = stream.aiter_lines()
            assert (await anext(lines)).startswith("data:")
            report = await closed(stage, workflow.workflow.id)
            with pytest.raises(httpx.HTTPError):
                async for _ in lines:
                    pass
        assert [e.at_issuer for e in report.leases] == ["confirmed"]
        async with asyncio.timeout(5):
            while stage.search.streams:
                await asyncio.sleep(0.01)


async def test_l8_after_the_close_a_tool_that_asks_refuses_the_token_and_what_is_left_elsewhere_is_told() -> None:
    """The token itself, straight to the tools: dead at the one that looks it up, alive at the other for as long as was said."""
    async with ready_stage() as stage:
        workflow = await opened(stage, listener=True)
        async with client(stage, workflow.proxy_url) as agent:
            for tool in (stage.search, stage.reports):
                assert (await agent.get(url(tool))).status_code == 200
        stolen = {tool.host: tool.authorized[-1] for tool in (stage.search, stage.reports)}

        async def accepted(tool: DemoTool) -> bool:
            async with httpx.AsyncClient(verify=False, trust_env=False) as thief:  # noqa: S501 - the token is what matters
                bearer = {"authorization": stolen[tool.host], "host": tool.host}
                answer = await thief.get(f"https://127.0.0.1:{tool.port}/v1/items", headers=bearer)
            return answer.status_code == 200

        assert await accepted(stage.search) and await accepted(stage.reports), (
            "while the workflow is open they are good"
        )
        before = stage.app.clock.now()
        report = await closed(stage, workflow.workflow.id)
        ends = {end.tool: end for end in report.leases}
        assert {end.at_issuer for end in ends.values()} == {"confirmed"}
        assert not await accepted(stage.search) and not ends["search"].residual.ToNanoseconds()
        expires_at = stage.issuer.claims_of(stolen[stage.reports.host].removeprefix("Bearer "))["exp"]
        left = ends["reports"].residual.ToNanoseconds() / 1e9
        assert await accepted(stage.reports) and expires_at - 1 <= before + left <= expires_at + 2


async def test_l1_an_empty_handle_is_a_bad_one_everywhere() -> None:
    async with ready_stage(more="workflows: {{bind_only_open: true}}\n") as stage:
        await opened(stage)
        port = port_of(stage.app.addresses["reverse"])
        for header in ("X-Spanlock-Workflow:", "Proxy-Authorization:", "Proxy-Authorization: Bearer "):
            answer = await raw(
                port, f"GET /search/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{header}\r\n\r\n".encode()
            )
            assert reason_of(answer) == "handle_invalid"


# -- helpers -------------------------------------------------------------------------------------------------------------


class plain_tool:  # noqa: N801 - used like a function
    """A legacy plain-http tool on loopback that answers `answer` to everything, and a base-URL client of the stage."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self.seen: list[bytes] = []

    async def __aenter__(self) -> tuple[Stage, httpx.AsyncClient, list[bytes]]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                while head := await reader.readuntil(b"\r\n\r\n"):
                    self.seen.append(head)
                    writer.write(self._answer)
            except asyncio.IncompleteReadError:
                writer.close()

        self._server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        more = (
            f"- {{{{name: legacy, url: 'http://127.0.0.1:{port}', issuer: demo-issuer, audience: tool-search, "
            "allow_networks: [127.0.0.0/8]}}\n"
        )
        self._stage = ready_stage(more=more, policy_for=("legacy",))
        stage = await self._stage.__aenter__()
        handle = (await opened(stage)).handle
        base = f"http://{stage.app.addresses['reverse']}"
        self._client = httpx.AsyncClient(trust_env=False, base_url=base, headers={"x-spanlock-workflow": handle})
        return stage, self._client, self.seen

    async def __aexit__(self, *exc: object) -> None:
        await self._client.aclose()
        await self._stage.__aexit__(None, None, None)
        self._server.close()


def test_every_shipped_row_has_its_test() -> None:
    rows = "H1 H2 H4 H5 H8 H9 H11 P6 P7 P8 P13 P14 R8 D1 D5 D6 D7 N1 N2 N3 N5 N6 N8 L1 L2 L4 L6 L6b L7 L8".split()
    names = "\n".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    missing = [row for row in rows if not re.search(rf"def test_{row.lower()}_", names)]
    assert not missing


class TcpSpire(Stage):
    """The SPIRE agent's socket is a TCP one (SPIFFE_Workload_Endpoint section 4), here on `port`."""

    port = 0

    def config_text(self) -> str:
        return super().config_text().replace(f"unix://{self.dir}/spire.sock", f"tcp://127.0.0.1:{self.port}")


async def test_n8_the_spire_agents_port_cannot_be_reached_through_the_sidecar() -> None:
    with socket.create_server(("127.0.0.1", 0)) as spire:  # that it answers nothing makes no difference
        port = spire.getsockname()[1]
        more = f"- {{{{name: spire, url: 'http://127.0.0.1:{port}', issuer: demo-issuer, allow_networks: [127.0.0.0/8]}}}}\n"
        stage = TcpSpire(more=more, policy_for=("spire",))
        stage.port = port
        async with stage:
            workflow = stage.app.registry.open("demo", name="w")
            answer = await call(stage, workflow.handle.reveal(), path="/spire/x")
            assert reason_of(answer) == "address_refused", answer
