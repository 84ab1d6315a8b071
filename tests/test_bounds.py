"""What is remembered of what agents send is bounded in bytes, not only in number."""

import contextlib
import tracemalloc
from collections.abc import Callable

from sidecar.errors import Denied
from sidecar.model.caller import Agent
from sidecar.model.tool import Authority, Tool
from sidecar.policy.decider import Decider
from sidecar.policy.load import parse_policy
from sidecar.proxy.http1 import Fields
from sidecar.proxy.inject import stripped
from sidecar.tools.router import Router

TOOL = Tool(name="t", scheme="https", authority=Authority("t.test", 443), issuer="i")
LONG = "x" * 60_000
TIMES = 100
MOST = 1_000_000
"""Bytes; all that was sent is six times as much."""


def kept(send: Callable[[int], object]) -> int:
    """Bytes that are still there after `send` was called with different numbers."""
    send(0)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(1, TIMES):
            send(number)
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def test_long_paths_fill_no_memo_of_routes() -> None:
    router = Router([TOOL])
    assert kept(lambda n: router.route(TOOL, f"/{n}/{LONG}".encode())) < MOST


def test_long_paths_fill_no_memo_of_decisions() -> None:
    for rule in ("permit", "forbid"):
        policy = parse_policy(f"{rule}(principal, action, resource);", "test")
        decider = Decider(policy, {"x": Agent("x", "spiffe://td/x")}, {"t": TOOL})

        def ask(number: int, decider: Decider = decider) -> None:
            with contextlib.suppress(Denied):
                decider.decide_request("x", "w", TOOL, "GET", f"/{number}/{LONG}")

        assert kept(ask) < MOST


def test_long_header_lines_are_not_remembered_by_their_connection() -> None:
    reader = Fields(stripped)
    assert kept(lambda n: reader.read([f"x-{n}: {LONG}".encode()])) < 100_000
