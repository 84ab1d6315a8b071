"""`make bench`: CPU per request, side by side in one run, as ratios to HAProxy, Go's ReverseProxy and a Go CONNECT proxy.

Method: the proxy on core 0, client and upstream on core 1, 32 connections, everything of the sidecar on, 1,000 other open
workflows; CPU = user and system time of the proxy process over the requests that it served. Machines are noisy: the
ratios of one run are the result, not the microseconds. Needs wrk, nginx, haproxy and go; says which is missing.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
TICK = os.sysconf("SC_CLK_TCK")
SECONDS = 4

NGINX = """\
worker_processes 1; daemon off; pid nginx.pid; error_log nginx.err;
events {{ worker_connections 4096; }}
http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 600s;
 client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
 server {{ listen 127.0.0.1:9001; listen 127.0.0.1:9443 ssl; ssl_certificate cert.pem; ssl_certificate_key key.pem;
  location / {{ return 200 "hello world, this is a small json-like body of about a hundred bytes, padded to be realistic ....\\n"; }} }} }}
"""
HAPROXY = """\
global
  nbthread 1
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend f
  bind 127.0.0.1:9012
  http-request set-header Authorization "Bearer abcdefghijklmnopqrstuvwxyz0123456789"
  default_backend b
backend b
  http-reuse always
  server s 127.0.0.1:9001
"""


def cpu(pid: int) -> float:
    """Seconds of user and system time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def rss(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def on_core(core: int, *words: str) -> list[str]:
    return ["taskset", "-c", str(core), *words]


def per_request(pid: int, load: Callable[[], int]) -> float:
    """Microseconds of CPU a request."""
    load()
    before = cpu(pid)
    requests = load()
    return (cpu(pid) - before) / max(requests, 1) * 1e6


def wrk(url: str, *headers: str) -> int:
    words = on_core(1, "wrk", "-t1", "-c32", f"-d{SECONDS}s", *[w for h in headers for w in ("-H", h)], url)
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in out, out
    return int(re.search(r"(\d+) requests in", out)[1])  # type: ignore[index]


def tls_load(binary: Path, proxy: str) -> int:
    words = on_core(1, str(binary), "-x", proxy, "-u", "https://localhost:9443/", "-c", "32", "-d", f"{SECONDS}s")
    out = subprocess.run(words, capture_output=True, text=True, check=True, env={**os.environ, "NO_PROXY": ""}).stdout
    assert "errs=0" in out, out
    return int(out.split()[0])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if missing := [
        tool for tool in ("wrk", "nginx", "haproxy", "go", "openssl", "taskset") if shutil.which(tool) is None
    ]:
        sys.exit(f"make bench needs {', '.join(missing)}: install them first")
    with tempfile.TemporaryDirectory(prefix="spanlock-bench-") as name:
        rows = run(Path(name))
    for row in rows:
        ratio = f"{row['ratio']:6.2f} × {row['peer']}" if row["ratio"] else ""
        target = f"target {row['target']}: {'met' if row['met'] else 'NOT met'}" if row["target"] is not None else ""
        print(f"{row['name']:<42} {row['value']:9.1f} {row['unit']:<6} {ratio:<28} {target}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n")


def run(work: Path) -> list[dict[str, object]]:
    subprocess.run(["go", "build", "-o", f"{work}/", "./..."], cwd=HERE / "peers", check=True)
    certificate = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout key.pem -out cert.pem"
    )
    subprocess.run(
        [*certificate.split(), "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
        cwd=work, check=True, capture_output=True,
    )  # fmt: skip
    (work / "nginx.conf").write_text(NGINX.format())
    (work / "haproxy.cfg").write_text(HAPROXY)
    single = {**os.environ, "GOMAXPROCS": "1"}
    started = [
        subprocess.Popen(on_core(1, "nginx", "-p", str(work), "-c", "nginx.conf"), stderr=subprocess.DEVNULL),
        subprocess.Popen(on_core(0, "haproxy", "-f", str(work / "haproxy.cfg"))),
        subprocess.Popen(on_core(0, str(work / "reverse")), env=single),
        subprocess.Popen(on_core(0, str(work / "intercept")), env=single),
    ]
    words = [sys.executable, "-m", "tests.bench.sidecar", "9001", "9443", f"{work}/cert.pem"]
    began = time.monotonic()
    ours = subprocess.Popen(on_core(0, *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started.append(ours)  # type: ignore[arg-type]
    try:
        assert ours.stdout is not None
        facts = json.loads(ours.stdout.readline())
        return measure(work, [p.pid for p in started], facts, time.monotonic() - began)
    finally:
        for process in started:
            process.terminate()


def measure(work: Path, pids: list[int], facts: dict[str, str], started: float) -> list[dict[str, object]]:
    _, haproxy, go, intercept, ours = pids
    reverse = f"http://{facts['reverse']}/plain/"
    idle = rss(ours)
    plain = per_request(ours, lambda: wrk(reverse, f"x-spanlock-workflow: {facts['handle']}"))
    against_haproxy = per_request(haproxy, lambda: wrk("http://127.0.0.1:9012/"))
    against_go = per_request(go, lambda: wrk("http://127.0.0.1:9013/"))
    tls = per_request(ours, lambda: tls_load(work / "load", facts["proxy"]))
    against_intercept = per_request(intercept, lambda: tls_load(work / "load", "http://127.0.0.1:9071"))

    def row(
        name: str, value: float, unit: str, peer: str = "", other: float = 0.0, target: float | None = None
    ) -> dict[str, object]:
        ratio = value / other if other else 0.0
        compared = ratio if other else value
        met = target is None or compared <= target
        return {"name": name, "value": value, "unit": unit, "peer": peer, "ratio": ratio, "target": target, "met": met}

    return [
        row("plain reverse, CPU a request", plain, "µs", "HAProxy", against_haproxy, 3.0),
        row("plain reverse, CPU a request", plain, "µs", "Go ReverseProxy", against_go, 0.9),
        row("TLS interception, CPU a request", tls, "µs", "Go CONNECT proxy", against_intercept, 0.7),
        row("memory with 1,000 workflows (whole stage)", idle, "MiB"),
        row("start of the stage → 1,000 workflows open", started * 1000, "ms"),
    ]


main()
