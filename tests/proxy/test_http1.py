"""Strict heads and framing: what two parsers could read differently is refused (D1, D3)."""

import httptools
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sidecar.errors import EXPLANATIONS, CallerError, Reason, UpstreamError
from sidecar.model.tool import Authority, Route, Tool
from sidecar.proxy import http1
from sidecar.proxy.framing import LAST_CHUNK, Framing, chunk
from sidecar.proxy.http1 import MAX_FIELDS, MAX_HEAD, Fields, RequestHead, ResponseHead
from sidecar.proxy.inject import inject, stripped
from sidecar.proxy.upstream import withheld

HOST = b"Host: tool.test\r\n"


def parse_request(head: bytes) -> RequestHead:
    assert head.endswith(b"\r\n\r\n")
    return http1.parse_request(head[:-4], Fields(stripped))


def parse_response(head: bytes, method: bytes) -> ResponseHead:
    return http1.parse_response(head[:-4], method, Fields(withheld))


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
    "lower_case_method": b"get / HTTP/1.1\r\n" + HOST + b"\r\n",
    "leading_empty_line": b"\r\nGET / HTTP/1.1\r\n" + HOST + b"\r\n",
    "empty_name": b"GET / HTTP/1.1\r\n" + HOST + b": x\r\n\r\n",
    "control_in_value": b"GET / HTTP/1.1\r\n" + HOST + b"X: a\x01b\r\n\r\n",
    "expect_other": b"POST / HTTP/1.1\r\n" + HOST + b"Expect: 200-ok\r\n\r\n",
    "two_authorization_handles": b"GET / HTTP/1.1\r\n"
    + HOST
    + b"Proxy-Authorization: a\r\nProxy-Authorization: b\r\n\r\n",
}


@pytest.mark.parametrize("name", D1_HEADS)
def test_d1_malformed_heads_are_refused(name: str) -> None:
    with pytest.raises(CallerError) as caught:
        parse_request(D1_HEADS[name])
    assert caught.value.reason is Reason.MALFORMED_REQUEST


def test_more_fields_than_the_limit_are_too_large() -> None:
    def with_fields(count: int) -> bytes:
        return b"GET / HTTP/1.1\r\n" + HOST + b"X: y\r\n" * (count - 1) + b"\r\n"

    assert parse_request(with_fields(MAX_FIELDS)).method == b"GET"
    with pytest.raises(CallerError) as caught:
        parse_request(with_fields(MAX_FIELDS + 1))
    assert caught.value.reason is Reason.REQUEST_TOO_LARGE
    assert f"{MAX_HEAD // 1024} KiB, {MAX_FIELDS} fields" in EXPLANATIONS[Reason.REQUEST_TOO_LARGE].fix


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
    assert (b"x-y", b"z", b"x-y: z\r\n", b"x-y") in head.headers


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


def test_what_is_between_the_tool_and_us_does_not_reach_the_agent() -> None:
    head = parse_response(
        b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close, X-Hop, content-length\r\nconnection: x-other\r\n"
        b'X-Hop: 1\r\nX-Other: 2\r\nKeep-Alive: timeout=5\r\nAlt-Svc: h3=":443"\r\nProxy-Authenticate: Basic\r\n'
        b"X-Spanlock-Reason: policy_denied\r\nX-Kept: yes\r\n\r\n",
        b"GET",
    )
    assert b"".join(field.line for field in head.headers) == b"content-length: 3\r\nx-kept: yes\r\n"
    assert not head.keep_alive and head.framing.length == 3


class Llhttp:
    """A second reader: what the field's most used parser makes of the same bytes."""

    def __init__(self, head: bytes) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.url = b""
        self.parser = httptools.HttpRequestParser(self)
        try:
            self.parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            pass

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.rstrip(b" \t")))


PIECES = st.sampled_from(
    [b"GET", b"POST", b" ", b"/", b"/a?b=%20", b" HTTP/1.1", b"\r\n", b"\n", b"\r", b"\t", b"\0", b":", b"Host: a.test", b"X-Y",
     b"Content-Length: 3", b"Transfer-Encoding: chunked", b"value", b"\x80", b"\x7f", b"(", b"Connection: close", b"x: y"]
)  # fmt: skip


def heads() -> st.SearchStrategy[bytes]:
    good = st.lists(
        st.sampled_from([b"X-Y: z", b"Accept:*/*", b"A: \t b c\t", b"Content-Length: 3", b"Via:"]), max_size=4
    )
    return st.builds(
        lambda fields, noise: b"POST /a?b HTTP/1.1\r\nHost: a.test\r\n" + b"\r\n".join([*fields, b"".join(noise)]),
        good,
        st.lists(PIECES, max_size=6),
    )


@given(heads())
@example(b"POST /a HTTP/1.1\r\nHost: a.test\r\nA: \t b c\t")
@example(b"POST /a HTTP/1.1\r\nHost: a.test\r\nTransfer-Encoding: chunked\t")
@example(b"POST /a HTTP/1.1\r\nHost: a.test\r\nContent-Length: 3\t")
@example(b"POST /a HTTP/1.1\r\nHost: a.test\r\nConnection: close\t")
def test_what_is_accepted_means_the_same_to_llhttp(head: bytes) -> None:
    if b"\r\n\r\n" in head or head.endswith(b"\r\n"):
        return
    try:
        ours = http1.parse_request(head, Fields(stripped))
    except CallerError:
        return
    theirs = Llhttp(head + b"\r\n\r\n")
    assert (theirs.url, theirs.parser.get_method()) == (ours.target, ours.method)
    assert theirs.headers == [(name, value) for name, value, _, _ in ours.headers]


def test_a_line_seen_before_is_read_the_same() -> None:
    reader = Fields(stripped)
    head = b"GET / HTTP/1.1\r\nHost: tool.test\r\nX: 1"
    first = http1.parse_request(head, reader)
    assert http1.parse_request(head, reader).headers == first.headers
    many = b"GET / HTTP/1.1\r\nHost: tool.test\r\n" + b"\r\n".join(b"X-%d: y" % i for i in range(100))
    assert len(http1.parse_request(many, reader).headers) == 101
    assert len(reader._known) <= 64, "what a connection remembers is bounded"


@pytest.mark.parametrize("lines", [13_000, MAX_FIELDS + 1])
def test_a_head_of_too_many_lines_is_refused_before_they_are_read(lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Fields, lines: list[bytes]) -> None:
        raise AssertionError(f"{len(lines)} lines were read")

    fields = b"\r\n".join(b"%x:" % number for number in range(lines))
    good = b"\r\n".join(b"%x:" % number for number in range(MAX_FIELDS - 1))
    assert len(http1.parse_request(b"GET / HTTP/1.1\r\n" + HOST + good, Fields(stripped)).headers) == MAX_FIELDS
    assert len(http1.parse_response(b"HTTP/1.1 200 OK\r\n" + good, b"GET", Fields(withheld)).headers) == MAX_FIELDS - 1
    monkeypatch.setattr(Fields, "read", read)
    with pytest.raises(CallerError) as refused:
        http1.parse_request(b"GET / HTTP/1.1\r\n" + fields, Fields(stripped))
    assert refused.value.reason is Reason.REQUEST_TOO_LARGE and str(MAX_FIELDS) in refused.value.detail
    with pytest.raises(UpstreamError, match="more than 128 header fields"):
        http1.parse_response(b"HTTP/1.1 200 OK\r\n" + fields, b"GET", Fields(withheld))


@pytest.mark.parametrize("prefix", [b"GET / HTTP/1.1\r\nX:", b"GET ", b"GET / HTTP/1.1\r\n"])
def test_a_head_of_64_kib_that_does_not_match_costs_one_pass(prefix: bytes) -> None:
    for filling in (b" ", b"\t", b"a", b"a: b\r\n"):
        with pytest.raises(CallerError):  # a backtracking pattern would take minutes
            http1.parse_request(prefix + filling * (65536 // len(filling)) + b"\x01", Fields(stripped))


def test_r8_no_repr_of_a_head_shows_a_credential() -> None:
    """In either direction: the agent's own, its handle, ours, and what a tool sets."""
    head = http1.parse_request(
        b"GET /x?api=s3cret HTTP/1.1\r\nHost: t.test\r\nAuthorization: Bearer s3cret\r\nProxy-Authorization: Bearer s3cret\r\n"
        b"X-Spanlock-Workflow: s3cret\r\nCookie: s3cret",
        Fields(stripped),
    )
    answer = http1.parse_response(b"HTTP/1.1 200 OK\r\nSet-Cookie: s3cret", b"GET", Fields(withheld))
    tool = Tool(name="t", scheme="https", authority=Authority("t.test", 443), issuer="i")
    sent = inject(head, Route(tool, "/x", b"/x"), b"Bearer s3cret")
    assert b"s3cret" in sent.head
    assert not [noun for noun in (head, answer, sent) if "s3cret" in repr(noun)]
