"""Load, and what it cost: CPU time of the proxy's process over the requests that it served."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.bench.processes import LOAD_CORE, on_core

TICK = os.sysconf("SC_CLK_TCK")
SECONDS, CONNECTIONS = 4, 32
Load = Callable[[], int]
"""Runs for a while and returns how many requests were answered, each with 200."""

_ABSOLUTE = """\
local request_bytes
function init(args) request_bytes = wrk.format("GET", "http://127.0.0.1:9001/") end
function request() return request_bytes end
"""


def cpu(pid: int) -> float:
    """Seconds of user and system time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def rss(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def wrk(url: str, *headers: str) -> int:
    """Plain requests to `url`."""
    words = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", *(w for h in headers for w in ("-H", h)), url]
    return _count(words)


def wrk_absolute(directory: Path, proxy: str, *headers: str) -> int:
    """Requests in absolute form to an explicit proxy."""
    script = directory / "absolute.lua"
    script.write_text(_ABSOLUTE)
    more = [w for h in ("Host: 127.0.0.1:9001", *headers) for w in ("-H", h)]
    return _count(["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{SECONDS}s", "-s", str(script), *more, proxy])


def _count(words: list[str]) -> int:
    out = subprocess.run(on_core(LOAD_CORE, *words), capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in out or "Socket errors" in out:
        raise SystemExit(f"the load met errors:\n{out}")
    return int(re.search(r"(\d+) requests in", out)[1])  # type: ignore[index]


def tls(directory: Path, proxy: str) -> int:
    """Requests through CONNECT and TLS, kept alive."""
    return int(_client(directory, "-x", proxy).split()[0])


def big(directory: Path, proxy: str) -> int:
    """Bodies of 100 MB through CONNECT and TLS, one after the other."""
    return int(_client(directory, "-x", proxy, "-u", "https://localhost:9443/big", "-c", "1").split()[0])


class Latency(NamedTuple):
    """Milliseconds, and how many requests there were."""

    p50: float
    p99: float
    requests: int


def latency(directory: Path, url: str, rate: float, header: str = "") -> Latency:
    """Of plain requests, `rate` a second; 0: as many as go."""
    out = _client(directory, "-u", url, "-H", header, "-r", str(rate))
    p50, p99 = re.findall(r"=([\d.]+)ms", out)
    return Latency(float(p50), float(p99), int(out.split()[0]))


def _client(directory: Path, *words: str) -> str:
    """Runs tests/bench/peers/load."""
    command = on_core(LOAD_CORE, str(directory / "load"), "-c", str(CONNECTIONS), "-d", f"{SECONDS}s", *words)
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "errs=0" not in out:
        raise SystemExit(f"the load met errors:\n{out}")
    return out


def side_by_side(contenders: dict[str, tuple[int, Load]], rounds: int = 2) -> dict[str, float]:
    """Microseconds of CPU a request for each (pid, load): alternating, after a first run that warms up."""
    for _, load in contenders.values():
        load()
    spent, served = dict.fromkeys(contenders, 0.0), dict.fromkeys(contenders, 0)
    for _ in range(rounds):
        for name, (pid, load) in contenders.items():
            before = cpu(pid)
            served[name] += load()
            spent[name] += cpu(pid) - before
    return {name: spent[name] / max(served[name], 1) * 1e6 for name in contenders}
