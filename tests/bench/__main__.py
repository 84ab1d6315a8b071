"""`make bench`: CPU per request side by side in one run, as ratios to HAProxy, Go and mitmproxy; memory; how fast things end.

Method: the proxy on core 0, client and upstream on core 1, 32 connections, everything of the sidecar on, 1,000 other open
workflows; CPU = user and system time of the proxy's process over the requests that it served, two alternating rounds after
a warm-up. Machines are noisy: the ratios of one run are the result, not the microseconds. Needs wrk, nginx, haproxy and go,
and says which is missing; mitmproxy is installed into the cache of `make parts`.
"""

import argparse
import json
import sys
import urllib.request
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tests.bench import load
from tests.bench.processes import Bench, Daemon, missing

WORKFLOWS, CLOSES = 1000, 200


class Row(NamedTuple):
    """One line of the table. With a `peer`, the target is for the ratio, else for the value."""

    name: str
    value: float
    unit: str
    peer: str = ""
    ratio: float | None = None
    target: float | None = None

    @property
    def met(self) -> bool | None:
        measured = self.value if self.ratio is None else self.ratio
        return None if self.target is None else measured <= self.target


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def against(name: str, costs: dict[str, float], targets: dict[str, float | None]) -> list[Row]:
    ours = costs["spanlock"]
    return [Row(name, ours, "µs", peer, ours / costs[peer], target) for peer, target in targets.items()]


def plain(bench: Bench, daemon: Daemon, handle: str, peers: dict[str, int]) -> list[Row]:
    header = f"x-spanlock-workflow: {handle}"
    say("plain reverse")
    reverse = load.side_by_side(
        {
            "spanlock": (daemon.pid, lambda: load.wrk(f"{daemon.reverse}/plain/", header)),
            "HAProxy": (peers["haproxy"], lambda: load.wrk("http://127.0.0.1:9012/")),
            "Go ReverseProxy": (peers["go_reverse"], lambda: load.wrk("http://127.0.0.1:9013/")),
            "mitmproxy": (peers["mitm_reverse"], lambda: load.wrk("http://127.0.0.1:9014/")),
        }
    )
    say("explicit proxy")
    absolute = load.side_by_side(
        {
            "spanlock": (daemon.pid, lambda: load.wrk_absolute(bench.dir, daemon.explicit, header)),
            "HAProxy": (peers["haproxy"], lambda: load.wrk_absolute(bench.dir, "http://127.0.0.1:9012")),
            "goproxy": (peers["go_intercept"], lambda: load.wrk_absolute(bench.dir, "http://127.0.0.1:9071")),
            "mitmproxy": (peers["mitm_explicit"], lambda: load.wrk_absolute(bench.dir, "http://127.0.0.1:9072")),
        }
    )
    return [
        *against(
            "plain reverse, CPU a request", reverse, {"HAProxy": 3.0, "Go ReverseProxy": 0.9, "mitmproxy": 1 / 20}
        ),
        *against("explicit proxy, CPU a request", absolute, {"HAProxy": 3.0, "goproxy": None, "mitmproxy": 1 / 20}),
    ]


def intercepted(bench: Bench, daemon: Daemon, proxy: str, peers: dict[str, int]) -> list[Row]:
    say("TLS interception")
    costs = load.side_by_side(
        {
            "spanlock": (daemon.pid, lambda: load.tls(bench.dir, proxy)),
            "goproxy": (peers["go_intercept"], lambda: load.tls(bench.dir, "http://127.0.0.1:9071")),
            "goproxy as it comes": (peers["go_stock"], lambda: load.tls(bench.dir, "http://127.0.0.1:9073")),
            "mitmproxy": (peers["mitm_explicit"], lambda: load.tls(bench.dir, "http://127.0.0.1:9072")),
        }
    )
    return against(
        "TLS interception, CPU a request", costs, {"goproxy": 0.7, "goproxy as it comes": 0.7, "mitmproxy": None}
    )


def streamed(bench: Bench, proxy: str, daemon: Daemon, peers: dict[str, int]) -> list[Row]:
    say("100 MB bodies")
    costs = load.side_by_side(
        {
            "spanlock": (daemon.pid, lambda: load.big(bench.dir, proxy)),
            "goproxy": (peers["go_intercept"], lambda: load.big(bench.dir, "http://127.0.0.1:9071")),
        },
        rounds=1,
    )
    ours = costs["spanlock"] / 1e6
    name = "100 MB through TLS interception, CPU"
    return [Row(name, ours, "s", target=1.0), Row(name, ours, "s", "goproxy", costs["spanlock"] / costs["goproxy"])]


def delayed(bench: Bench, daemon: Daemon, handle: str) -> list[Row]:
    """What the way through us adds (the median of five pairs), at half of the requests that the same client gets through us when it does not pause."""
    url, header = f"{daemon.reverse}/plain/", f"x-spanlock-workflow: {handle}"
    rate = load.latency(bench.dir, url, 0, header).requests / load.SECONDS / 2
    say(f"latency at {rate:.0f} requests a second")
    pairs = [
        (load.latency(bench.dir, url, rate, header), load.latency(bench.dir, "http://127.0.0.1:9001/", rate))
        for _ in range(5)
    ]
    p50 = median(through.p50 - straight.p50 for through, straight in pairs)
    p99 = median(through.p99 - straight.p99 for through, straight in pairs)
    return [
        Row("added latency at half load, p50", p50, "ms", target=0.3),
        Row("added latency at half load, p99", p99, "ms", target=2.0),
    ]


def closes(daemon: Daemon) -> list[Row]:
    """Closes workflows that hold a lease each, one after the other, while the others stay open."""
    say(f"{CLOSES} closes beside {WORKFLOWS} open workflows")
    opened = [daemon.open() for _ in range(CLOSES)]
    for workflow in opened:
        request = urllib.request.Request(f"{daemon.reverse}/search/v1/items")
        request.add_header("x-spanlock-workflow", workflow.handle)
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert answer.status == 200
    reports = [daemon.close(workflow.workflow.id) for workflow in opened]
    assert all([end.at_issuer for end in report.leases] == ["confirmed"] for report in reports)
    dropped = sorted(report.dropped_after.ToNanoseconds() / 1e6 for report in reports)
    revoked = sorted(report.revoked_after.ToNanoseconds() / 1e6 for report in reports)
    return [
        Row("close → dropped, p50", dropped[CLOSES // 2], "ms"),
        Row("close → dropped, p99", dropped[CLOSES * 99 // 100], "ms", target=10.0),
        Row("close → revoked and looked up again, p50", revoked[CLOSES // 2], "ms"),
        Row("close → revoked and looked up again, p99", revoked[CLOSES * 99 // 100], "ms", target=50.0),
    ]


def run(bench: Bench) -> list[Row]:
    say("starting")
    daemon = bench.daemon()
    rows = [
        Row("start → ready", daemon.start_to_ready, "s", target=1.5),
        Row("resident memory, idle", load.rss(daemon.pid), "MiB", target=90.0),
    ]
    for _ in range(WORKFLOWS):
        daemon.open()
    rows.append(Row(f"resident memory, {WORKFLOWS:,} workflows", load.rss(daemon.pid), "MiB", target=120.0))
    rows += closes(daemon)
    peers = {
        "haproxy": bench.haproxy(), "go_reverse": bench.go_reverse(), "go_intercept": bench.go_intercept(),
        "go_stock": bench.go_intercept_stock(),
        "mitm_reverse": bench.mitmproxy_reverse(), "mitm_explicit": bench.mitmproxy_explicit(),
    }  # fmt: skip
    workflow = daemon.open(listener=True)
    return [
        *plain(bench, daemon, workflow.handle, peers),
        *intercepted(bench, daemon, workflow.proxy_url, peers),
        *streamed(bench, workflow.proxy_url, daemon, peers),
        *delayed(bench, daemon, workflow.handle),
        *rows,
    ]


def line(row: Row) -> str:
    ratio = f"{row.ratio:7.3f} × {row.peer}" if row.ratio is not None else ""
    verdict = "" if row.met is None else f"target {row.target:g}: {'met' if row.met else 'NOT met'}"
    return f"{row.name:<42} {row.value:9.2f} {row.unit:<4} {ratio:<28} {verdict}".rstrip()


def as_json(row: Row) -> dict[str, Any]:
    return {**row._asdict(), "met": row.met}


def main() -> None:
    parser = argparse.ArgumentParser(description="The ratio table.")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a JSON list too")
    arguments = parser.parse_args()
    if absent := missing():
        sys.exit(f"make bench needs {', '.join(absent)}: install them first")
    with Bench() as bench:
        rows = run(bench)
    print("\n".join(map(line, rows)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n")


main()
