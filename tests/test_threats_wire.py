"""The rows of wrong destination, injection and desync once more, as bytes: by each way in, and by what the tool received."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from sidecar.cli.stage import Stage
from tests.stage import opened, port_of, raw, reason_of, tunnel
from tests.test_threats import FIELDS, Recorder, flows

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
MODES = pytest.mark.parametrize("mode", ["reverse", "explicit", "intercepted"])


@dataclass
class Wire:
    """An agent's bytes to the one tool of a stage, which notes every byte that it gets, and by which way they go."""

    stage: Stage
    tool: Recorder
    mode: str
    host: str
    port: int
    handle: str

    @property
    def authority(self) -> str:
        return f"{self.host}:{self.port}"

    async def send(self, line: str, rest: str | bytes) -> bytes:
        """`line`: method and path; `rest`: all that follows the Host field, with the head's end. What came back."""
        method, _, path = line.partition(" ")
        target = {"reverse": f"/wired{path}", "explicit": f"http://{self.authority}{path}"}.get(self.mode, path)
        host = "127.0.0.1" if self.mode == "reverse" else self.authority
        own = b"" if self.mode == "intercepted" else f"x-spanlock-workflow: {self.handle}\r\n".encode()
        head = f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n".encode() + own
        request = head + (rest.encode("latin-1") if isinstance(rest, str) else rest)
        if self.mode != "intercepted":
            return await raw(port_of(self.stage.app.addresses[self.mode]), request)
        async with tunnel(
            self.stage, port_of(self.stage.app.addresses["explicit"]), self, handle=self.handle
        ) as streams:
            streams[1].write(request)
            return bytes(await asyncio.wait_for(streams[0].read(), 10))

    def nothing_came(self) -> bool:
        return self.tool.received == b"" and self.stage.issuer.minted == 0


@asynccontextmanager
async def wired(mode: str) -> AsyncIterator[Wire]:
    stage, tool, secure = Stage(policy_for=("wired",)), Recorder(OK), mode == "intercepted"
    port = await tool.start(tls=stage.pki.server_context("named.test") if secure else None)
    host = "named.test" if secure else "127.0.0.1"
    stage._more = (
        f'- {{{{name: wired, url: "{"https" if secure else "http"}://{host}:{port}", address: 127.0.0.1, '
        f'ca_file: "{{dir}}/tools-ca.pem", {FIELDS}}}}}\n'
    )
    try:
        async with stage:
            assert await stage.app.svids.wait_ready(10)
            yield Wire(stage, tool, mode, host, port, (await opened(stage)).handle)
    finally:
        tool.stop()


FRAMINGS = {
    "both": "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both, the other way round": "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two equal lengths": "Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "two lengths": "Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a list of lengths": "Content-Length: 3, 3\r\n\r\nabc",
    "a sign": "Content-Length: +3\r\n\r\nabc",
    "a space": "Content-Length: 3 3\r\n\r\nabc",
    "hexadecimal": "Content-Length: 0x3\r\n\r\nabc",
    "no length": "Content-Length:\r\n\r\n",
    "a space before the colon": "Content-Length : 3\r\n\r\nabc",
    "chunked twice": "Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked in two lines": "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked misspelt": "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "chunked and something": "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked with a control": "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a chunk extension": "Transfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\n\r\n",
    "a chunk size with a sign": "Transfer-Encoding: chunked\r\n\r\n+3\r\nabc\r\n0\r\n\r\n",
    "a chunk without its line end": "Transfer-Encoding: chunked\r\n\r\n3\r\nabcX\r\n0\r\n\r\n",
    "a bare LF between fields": "A: b\nContent-Length: 0\r\n\r\n",
    "a bare LF at the end": "A: b\n\n",
    "a bare CR": "A: b\rc: d\r\n\r\n",
    "a folded field": "A: b\r\n c: d\r\n\r\n",
    "a folded length": "Content-Length:\r\n 3\r\n\r\nabc",
    "NUL": "A: b\0c\r\n\r\n",
    "another Host": "Host: evil.test\r\n\r\n",
    "the same Host again": "host: @\r\n\r\n",
}


@MODES
async def test_d1_malformed_framing_reaches_no_tool_by_any_way(mode: str) -> None:
    async with wired(mode) as wire:
        for name, framing in FRAMINGS.items():
            answer = await wire.send("POST /x", framing.replace("@", wire.authority))
            assert (answer[:12], reason_of(answer)) == (b"HTTP/1.1 400", "malformed_request"), name
            assert answer.count(b"\r\n\r\n") == 1, "and what follows it is no request"
        assert wire.nothing_came() and flows(wire.stage) == ["malformed_request"] * len(FRAMINGS)


@pytest.mark.parametrize("mode", ["explicit", "intercepted"])
async def test_h8_look_alikes_of_a_tool_reach_none(mode: str) -> None:
    """As the target, and as a Host beside the true target; the tool's own name in another spelling is the tool."""
    async with wired(mode) as wire:
        port, name = port_of(wire.stage.app.addresses["explicit"]), wire.host
        likes = [f"{name}.evil", f"evil-{name}", f"x{name}", f"[{name}]", f"{name}\0.ok", f"{name}%00", f"{name}%2e", f"*.{name}",
                 name.replace(".", "\u3002"), f"{name}@evil.test", f"evil.test@{name}", f"{name}#", f"{name}..", f".{name}"]  # fmt: skip
        for like in likes:
            target = f"{like}:{wire.port}"
            line = f"CONNECT {target}" if mode == "intercepted" else f"GET http://{target}/x"
            for host in (target, wire.authority):
                head = f"{line} HTTP/1.1\r\nHost: {host}\r\nx-spanlock-workflow: {wire.handle}\r\nConnection: close\r\n\r\n"
                answer = await raw(port, head.encode())
                assert answer[9:10] == b"4", (line, host, answer)
        assert wire.nothing_came() and "ok" not in flows(wire.stage)
        true, wire.host = wire.host, f"{wire.host.upper()}."
        answer = await wire.send("GET /x", "Connection: close\r\n\r\n")
        if mode == "intercepted":
            assert answer.endswith(b"\r\n\r\nok") and f"\r\nhost: {true}:{wire.port}\r\n".encode() in wire.tool.received


@MODES
async def test_d7_a_path_that_can_be_read_in_two_ways_reaches_no_tool(mode: str) -> None:
    paths = ["/a/..%2fadmin", "//admin", "/a;x/../admin", "/%252e", "/a/../b", "/a/./b", "/%2e%2e/b", "/a%5cb", "/a\\b", "/a%00", "/a;b",
             "/a%zz", "/a#b", "/a%0d%0ab", "/%61", "/%C0%AE"]  # fmt: skip
    async with wired(mode) as wire:
        for path in paths:
            answer = await wire.send(f"GET {path}", "Connection: close\r\n\r\n")
            assert (answer[:10], reason_of(answer)) == (b"HTTP/1.1 4", "ambiguous_path"), (path, answer)
        assert wire.nothing_came()
        for path in ("/a%20b/caf%C3%A9?x=../y%2fz&%00", "/"):
            assert (await wire.send(f"GET {path}", "Connection: close\r\n\r\n")).endswith(b"\r\n\r\nok")
            assert wire.tool.received.count(f"GET {path} HTTP/1.1\r\n".encode()) == 1, "what is matched is what is sent"


@MODES
async def test_p8_the_tool_gets_our_credential_alone(mode: str) -> None:
    theirs = (
        "Authorization: Bearer agents-1\r\nauthorization: Basic agents-2\r\nAuthorization_: agents-3\r\nCookie: agents=4\r\n"
        "X-Api-Key: agents-5\r\nConnection: authorization, close, x-named\r\nX-Named: agents-6\r\nX_Named: agents-7\r\nX-Kept: yes\r\n"
    )
    async with wired(mode) as wire:
        answer = await wire.send("GET /x", theirs + f"Proxy-Authorization: Bearer {wire.handle}\r\n\r\n")
        assert answer.endswith(b"\r\n\r\nok"), answer
        head = wire.tool.received.lower()
        assert head.count(b"authorization") == head.count(b"\r\nauthorization: bearer ey") == 1
        assert b"agents" not in head and wire.handle.encode() not in head and b"\r\nx-kept: yes\r\n" in head


@MODES
async def test_l7_what_the_agent_says_of_where_a_call_comes_from_reaches_neither_the_tool_nor_the_audit(
    mode: str,
) -> None:
    names = ("X-Forwarded-For", "X-Forwarded-Host", "X_Forwarded_Proto", "Forwarded", "Via", "X-Real-IP", "True-Client-IP",
             "CF-Connecting-IP", "X-Original-URL", "X-HTTP-Method-Override")  # fmt: skip
    forged = "".join(f"{name}: for=forged-198.51.100.7\r\n" for name in names)
    async with wired(mode) as wire:
        assert (await wire.send("GET /x", f"{forged}Connection: close\r\n\r\n")).endswith(b"\r\n\r\nok")
        head, audit = wire.tool.received.lower(), (flows(wire.stage), (wire.stage.dir / "audit.jsonl").read_text())
        assert b"forged" not in head and b"forwarded" not in head and b"\r\nvia" not in head
        assert audit[0] == ["ok"] and "forged" not in audit[1]
        assert json.loads(audit[1].splitlines()[-1])["uid"] >= 0
