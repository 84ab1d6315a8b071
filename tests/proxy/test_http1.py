"""Strict heads and framing: what two parsers could read differently is refused (D1, D3)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import CallerError, Reason, UpstreamError
from sidecar.proxy.framing import LAST_CHUNK, Framing, chunk
from sidecar.proxy.http1 import MAX_FIELDS, parse_request, parse_response

HOST = b"Host: tool.test\r\n"

D1_HEADS = {
    "cl_then_te": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    "te_then_cl": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
    "two_equal_cl": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\n",
    "two_unequal_cl": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n",
    "cl_list": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3, 3\r\n\r\n",
    "cl_plus": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: +3\r\n\r\n",
    "cl_minus": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: -3\r\n\r\n",
    "cl_space": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3 3\r\n\r\n",
    "cl_hex": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 0x3\r\n\r\n",
    "cl_empty": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length:\r\n\r\n",
    "te_twice": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "te_list": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked, chunked\r\n\r\n",
    "te_gzip_chunked": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
    "te_misspelt": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: xchunked\r\n\r\n",
    "te_identity": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: identity\r\n\r\n",
    "te_http10": b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n",
    "space_before_colon": b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length : 3\r\n\r\n",
    "te_space_before_colon": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding : chunked\r\n\r\n",
    "te_tab": b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding\t: chunked\r\n\r\n",
    "obs_fold": b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n b\r\n\r\n",
    "obs_fold_tab": b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n\tb\r\n\r\n",
    "bare_lf": b"GET / HTTP/1.1\nHost: tool.test\r\n\r\n",
    "bare_cr": b"GET / HTTP/1.1\r\nHost: tool.test\r\nX: a\rb\r\n\r\n",
    "nul": b"GET / HTTP/1.1\r\nHost: tool.test\r\nX: a\0b\r\n\r\n",
    "two_hosts": b"GET / HTTP/1.1\r\nHost: tool.test\r\nHost: evil.test\r\n\r\n",
    "two_equal_hosts": b"GET / HTTP/1.1\r\nHost: tool.test\r\nHost: tool.test\r\n\r\n",
    "no_host": b"GET / HTTP/1.1\r\nX: y\r\n\r\n",
    "http2_line": b"GET / HTTP/2.0\r\n" + HOST + b"\r\n",
    "double_space": b"GET  / HTTP/1.1\r\n" + HOST + b"\r\n",
    "tab_in_line": b"GET\t/ HTTP/1.1\r\n" + HOST + b"\r\n",
    "no_colon": b"GET / HTTP/1.1\r\n" + HOST + b"nonsense\r\n\r\n",
    "empty_name": b"GET / HTTP/1.1\r\n" + HOST + b": x\r\n\r\n",
    "control_in_value": b"GET / HTTP/1.1\r\n" + HOST + b"X: a\x01b\r\n\r\n",
    "expect_other": b"POST / HTTP/1.1\r\n" + HOST + b"Expect: 200-ok\r\n\r\n",
    "two_authorization_handles": b"GET / HTTP/1.1\r\n"
    + HOST
    + b"Proxy-Authorization: a\r\nProxy-Authorization: b\r\n\r\n",
    "many_fields": b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * (MAX_FIELDS + 5) + b"\r\n",
}


@pytest.mark.parametrize("name", D1_HEADS)
def test_d1_malformed_heads_are_refused(name: str) -> None:
    with pytest.raises(CallerError) as caught:
        parse_request(D1_HEADS[name])
    assert caught.value.reason is Reason.MALFORMED_REQUEST


def test_pythons_own_connect_is_read() -> None:
    head = parse_request(b"CONNECT tool.test:443 HTTP/1.0\r\n\r\n")
    assert (head.method, head.host) == (b"CONNECT", b"tool.test:443")
    with pytest.raises(CallerError):
        parse_request(b"GET / HTTP/1.0\r\nHost: tool.test\r\n\r\n")


def test_a_plain_head_is_read() -> None:
    head = parse_request(
        b"POST /a?b=c HTTP/1.1\r\nHost: tool.test\r\nContent-Length: 5\r\nX-Y:  z \r\nExpect: 100-continue\r\n\r\n"
    )
    assert (head.method, head.target, head.host) == (b"POST", b"/a?b=c", b"tool.test")
    assert head.framing.kind == "sized" and head.framing.remaining == 5
    assert head.expects_continue and head.keep_alive
    assert (b"x-y", b"z") in [(n, v.strip()) for n, v in head.headers]


@pytest.mark.parametrize(
    ("line", "keep"),
    [(b"Connection: close\r\n", False), (b"", True), (b"Connection: Keep-Alive\r\n", True)],
)
def test_keep_alive_of_http11(line: bytes, keep: bool) -> None:
    assert parse_request(b"GET / HTTP/1.1\r\n" + HOST + line + b"\r\n").keep_alive is keep


D1_CHUNKS = {
    "extension": b"3;a=b\r\nabc\r\n0\r\n\r\n",
    "trailer": b"3\r\nabc\r\n0\r\nX: y\r\n\r\n",
    "lf_only": b"3\nabc\r\n0\r\n\r\n",
    "not_hex": b"g\r\nabc\r\n0\r\n\r\n",
    "signed": b"+3\r\nabc\r\n0\r\n\r\n",
    "prefixed": b"0x3\r\nabc\r\n0\r\n\r\n",
    "space": b"3 \r\nabc\r\n0\r\n\r\n",
    "empty": b"\r\nabc\r\n0\r\n\r\n",
    "long_size": b"1" * 40 + b"\r\n",
    "short_data": b"2\r\nabc\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", D1_CHUNKS)
@pytest.mark.parametrize("step", [1, 1000])
def test_d1_broken_chunking_is_refused(name: str, step: int) -> None:
    framing = Framing.chunked()
    data = D1_CHUNKS[name]
    with pytest.raises(CallerError):
        for i in range(0, len(data), step):
            framing.feed(data[i : i + step])


@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=6),
    st.lists(st.integers(1, 9), min_size=1),
    st.binary(max_size=9),
)
def test_chunked_survives_every_split(pieces: list[bytes], cuts: list[int], after: bytes) -> None:
    wire = b"".join(chunk(p) for p in pieces) + LAST_CHUNK + after
    framing, out, rest, at, turn = Framing.chunked(), b"", b"", 0, 0
    while at < len(wire) and not framing.done:
        step = cuts[turn % len(cuts)]
        payload, rest = framing.feed(wire[at : at + step])
        out, at, turn = out + payload, at + step, turn + 1
    assert framing.done and out == b"".join(pieces)
    assert rest + wire[at:] == after


def test_sized_stops_at_its_length() -> None:
    framing = Framing.sized(3)
    assert framing.feed(b"ab") == (b"ab", b"")
    assert framing.feed(b"cdef") == (b"c", b"def") and framing.done


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "sized"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "chunked"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "until_close"),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n", "none"),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n", "none"),
    ],
)
def test_response_framing(head: bytes, kind: str) -> None:
    assert parse_response(head, b"GET").framing.kind == kind


def test_head_responses_have_no_body() -> None:
    assert parse_response(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", b"HEAD").framing.done


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
    ],
)
def test_d1_malformed_answers_are_refused(head: bytes) -> None:
    with pytest.raises(UpstreamError):
        parse_response(head, b"GET")
