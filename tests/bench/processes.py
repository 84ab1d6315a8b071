"""The upstream, the peers and our daemon: started, pinned, waited for, and ended together."""

import compileall
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from sidecar.wire.spanlock.v1 import admin_pb2, admin_pb2_grpc, workflows_pb2, workflows_pb2_grpc

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("SPANLOCK_PARTS", Path.home() / ".cache/spanlock-parts"))
NEEDED = ("wrk", "nginx", "haproxy", "go", "openssl", "taskset")
PROXY_CORE, LOAD_CORE = 0, 1

NGINX = """\
worker_processes 1; daemon off; pid nginx.pid; error_log nginx.err;
events { worker_connections 4096; }
http { access_log off; keepalive_requests 1000000000; keepalive_timeout 600s;
 client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
 server { listen 127.0.0.1:9001; listen 127.0.0.1:9443 ssl; ssl_certificate cert.pem; ssl_certificate_key key.pem;
  location = /big { root .; }
  location / { return 200 "hello world, this is a small json-like body of about a hundred bytes, padded to be realistic ....\\n"; } } }
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
MITMPROXY = """\
def request(flow):
    flow.request.headers["Authorization"] = "Bearer abcdefghijklmnopqrstuvwxyz0123456789"
"""
CERTIFICATE = (
    "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout key.pem -out cert.pem"
)


def missing() -> list[str]:
    """The programs that must be installed first."""
    return [program for program in NEEDED if shutil.which(program) is None]


def on_core(core: int, *words: str) -> list[str]:
    return ["taskset", "-c", str(core), *words]


def until(what: Callable[[], Any], seconds: float, name: str) -> Any:
    """Polls: other programs' pace is the only clock there is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := what():
                return value
        except (OSError, urllib.error.URLError, grpc.RpcError):
            pass
        time.sleep(0.002)
    raise SystemExit(f"{name} did not come up within {seconds:g} s")


def listens(port: int) -> Callable[[], bool]:
    def ask() -> bool:
        with socket.create_connection(("127.0.0.1", port), 1):
            return True

    return ask


class Bench:
    """Everything that runs during the benchmark. A context: all of it is ended after."""

    def __init__(self) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="spanlock-bench-")
        self.dir = Path(self._temporary.name)
        self._started: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> "Bench":
        compileall.compile_dir(HERE.parents[1] / "sidecar", quiet=1)  # as pip does when it installs
        subprocess.run(["go", "build", "-o", f"{self.dir}/", "./..."], cwd=HERE / "peers", check=True)
        names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        subprocess.run([*CERTIFICATE.split(), *names], cwd=self.dir, check=True, capture_output=True)
        for name, text in (("nginx.conf", NGINX), ("haproxy.cfg", HAPROXY), ("addon.py", MITMPROXY)):
            (self.dir / name).write_text(text)
        self.dir.chmod(0o755)  # nginx's worker reads the big body as nobody
        with (self.dir / "big").open("wb") as big:
            big.truncate(100_000_000)
        self.start(LOAD_CORE, 9001, "nginx", "-p", str(self.dir), "-c", "nginx.conf")
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._started):
            process.terminate()
        for process in reversed(self._started):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        self._temporary.cleanup()

    def start(self, core: int, port: int, *words: str, env: dict[str, str] | None = None) -> int:
        """Starts a program and waits until it listens on `port`. Returns its pid."""
        log = (self.dir / f"{Path(words[0]).name}.log").open("ab")
        environment = {**os.environ, "GOMAXPROCS": "1", **(env or {})}
        process = subprocess.Popen(on_core(core, *words), env=environment, stdout=log, stderr=log)
        self._started.append(process)
        until(listens(port), 60, words[0])
        return process.pid

    def haproxy(self) -> int:
        return self.start(PROXY_CORE, 9012, "haproxy", "-f", str(self.dir / "haproxy.cfg"))

    def go_reverse(self) -> int:
        return self.start(PROXY_CORE, 9013, str(self.dir / "reverse"))

    def go_intercept(self) -> int:
        return self.start(PROXY_CORE, 9071, str(self.dir / "intercept"))

    def go_intercept_stock(self) -> int:
        return self.start(PROXY_CORE, 9073, str(self.dir / "intercept"), "stock")

    def mitmdump(self) -> str:
        """Its program, from a virtual environment in the cache: it pins other versions of what we use."""
        venv = CACHE / "mitmproxy"
        if not (venv / "bin/mitmdump").exists():
            print("bench: installing mitmproxy into the cache", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
            subprocess.run([str(venv / "bin/pip"), "install", "--quiet", "mitmproxy"], check=True)
        return str(venv / "bin/mitmdump")

    def mitmproxy_reverse(self) -> int:
        return self._mitmproxy(9014, "--mode", "reverse:http://127.0.0.1:9001")

    def mitmproxy_explicit(self) -> int:
        return self._mitmproxy(9072)

    def _mitmproxy(self, port: int, *more: str) -> int:
        words = [self.mitmdump(), "-q", "-k", "-s", str(self.dir / "addon.py"), "--listen-host", "127.0.0.1"]
        home = ["--set", f"confdir={self.dir}/mitmproxy"]
        return self.start(PROXY_CORE, port, *words, *home, "--listen-port", str(port), *more)

    def daemon(self) -> "Daemon":
        """`spanlock run` on an embedded world in another process."""
        words = on_core(LOAD_CORE, sys.executable, "-m", "tests.bench.world", f"{self.dir}/cert.pem")
        world = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert world.stdout is not None
        facts = json.loads(world.stdout.readline())
        directory = Path(facts["dir"])
        log = (self.dir / "spanlock.log").open("ab")
        began = time.monotonic()
        run = [sys.executable, "-m", "sidecar", "run", "-c", str(directory / "spanlock.yaml")]
        process = subprocess.Popen(on_core(PROXY_CORE, *run), stdout=log, stderr=log)
        self._started += [world, process]
        ready = f"http://127.0.0.1:{facts['health']}/readyz"
        until(lambda: urllib.request.urlopen(ready, timeout=1).status == 200, 30, "spanlock")
        return Daemon(process.pid, directory, time.monotonic() - began)


class Daemon:
    """Our side, as an agent and an operator see it."""

    def __init__(self, pid: int, directory: Path, start_to_ready: float) -> None:
        self.pid = pid
        self.start_to_ready = start_to_ready
        """Seconds."""
        agent = grpc.insecure_channel(f"unix:{directory}/run/agents/demo/agent.sock")
        operator = grpc.insecure_channel(f"unix:{directory}/run/operator/operator.sock")
        self._workflows = workflows_pb2_grpc.WorkflowsStub(agent)  # type: ignore[no-untyped-call]
        status = admin_pb2_grpc.AdminStub(operator).Status(admin_pb2.StatusRequest())  # type: ignore[no-untyped-call]
        listeners = dict(line.split(" ", 1) for line in status.listeners)
        self.reverse = f"http://{listeners['reverse']}"
        self.explicit = f"http://{listeners['explicit']}"

    def open(self, listener: bool = False) -> Any:
        return self._workflows.Open(workflows_pb2.OpenRequest(name="bench", listener=listener))

    def close(self, workflow_id: str) -> Any:
        return self._workflows.Close(workflows_pb2.CloseRequest(workflow_id=workflow_id))
