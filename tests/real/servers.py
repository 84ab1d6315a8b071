"""Starts the real SPIRE and Keycloak of `make parts` on loopback, and takes them down again."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("SPANLOCK_PARTS", Path.home() / ".cache/spanlock-parts"))
AGENT_ID = "spiffe://example.org/agent"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def part(path: str) -> str:
    found = CACHE / path
    assert found.exists(), f"{found} is missing: run `make parts`"
    return str(found)


def eventually(what, seconds: float, why: str):  # type: ignore[no-untyped-def]
    """Polls a real server: its own pace is the only clock there is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (value := what()) is not None and value is not False:
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s: {why}")


class Spire:
    """A server and an agent of trust domain example.org under `directory`."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.port = free_port()
        for name in ("server", "agent", "pub"):
            (directory / name).mkdir(parents=True)
        for name in ("server", "agent"):
            text = (HERE / f"spire/{name}.conf.in").read_text()
            (directory / f"{name}.conf").write_text(
                text.replace("@DIR@", str(directory)).replace("@PORT@", str(self.port))
            )
        self.server = self._start("spire-server", "server", [])
        eventually(lambda: self._server("healthcheck") is not None, 30, "spire-server healthy")
        token = (
            self._server("token", "generate", "-spiffeID", "spiffe://example.org/node", "-ttl", "3600") or ""
        ).split()[1]
        self.agent = self._start("spire-agent", "agent", ["-joinToken", token])
        self.await_agent()
        self.entry = ""

    @property
    def socket(self) -> Path:
        return self.dir / "pub/agent.sock"

    def _start(self, binary: str, name: str, more: list[str]) -> subprocess.Popen[bytes]:
        words = [part(f"bin/{binary}"), "run", "-config", str(self.dir / f"{name}.conf"), *more]
        with (self.dir / f"{name}.log").open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=log)

    def _server(self, *command: str) -> str | None:
        words = [part("bin/spire-server"), *command, "-socketPath", str(self.dir / "server.sock")]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout if done.returncode == 0 else None

    def await_agent(self) -> None:
        words = [part("bin/spire-agent"), "healthcheck", "-socketPath", str(self.socket)]
        eventually(
            lambda: subprocess.run(words, capture_output=True, check=False).returncode == 0, 30, "spire-agent healthy"
        )

    def register(self, uid: int) -> None:
        """The shipped separation: by the sidecar's uid, so that the agent's own uid gets nothing."""
        out = self._server(
            "entry",
            "create",
            "-parentID",
            "spiffe://example.org/node",
            "-spiffeID",
            AGENT_ID,
            "-selector",
            f"unix:uid:{uid}",
        )
        assert out is not None
        self.entry = next(line.split(":")[1].strip() for line in out.splitlines() if line.startswith("Entry ID"))

    def rotate(self) -> None:
        """Changes the entry, so that the agent gets a new X509-SVID for it at its next synchronisation (5 s)."""
        words = ["-entryID", self.entry, "-parentID", "spiffe://example.org/node", "-spiffeID", AGENT_ID]
        more = ["-selector", f"unix:uid:{os.getuid()}", "-dns", f"r{time.monotonic_ns()}.example.org"]
        assert self._server("entry", "update", *words, *more) is not None

    def unregister(self) -> None:
        assert self._server("entry", "delete", "-entryID", self.entry) is not None

    def bundle(self) -> bytes:
        """The JWKS that issuers verify JWT-SVIDs with; without the refresh hint, which Keycloak 26 takes for an expiry."""
        document = json.loads(self._server("bundle", "show", "-format", "spiffe") or "{}")
        document.pop("spiffe_refresh_hint", None)
        return json.dumps(document).encode()

    def kill_agent(self) -> None:
        self.agent.send_signal(signal.SIGKILL)
        self.agent.wait()

    def restart_agent(self) -> None:
        self.agent = self._start("spire-agent", "agent", [])
        self.await_agent()

    def stop(self) -> None:
        for process in (self.agent, self.server):
            process.kill()
            process.wait()


class BundleServer:
    """Publishes SPIRE's bundle over loopback http."""

    def __init__(self, spire: Spire) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = spire.bundle()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/bundle"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Keycloak:
    """One realm, `agents`, that trusts `bundle_url`; `secret` is tool-search's own."""

    def __init__(self, directory: Path, bundle_url: str, secret: str) -> None:
        self.home = directory / "keycloak"
        self.port, self._management = free_port(), free_port()
        source = Path(part("keycloak-26.7.3"))
        self.home.mkdir()
        for name in ("bin", "lib", "providers", "conf", "themes"):
            if (source / name).exists():
                (self.home / name).symlink_to(source / name)
        realm = (HERE / "keycloak/realm.json").read_text().replace("@BUNDLE@", bundle_url).replace("@SECRET@", secret)
        (self.home / "data/import").mkdir(parents=True)
        (self.home / "data/import/agents-realm.json").write_text(realm)
        self.issuer = f"http://127.0.0.1:{self.port}/realms/agents"
        self.start()

    def start(self) -> None:
        environment = {
            **os.environ, "JAVA_OPTS_KC_HEAP": "-Xms128m -Xmx512m", "KC_BOOTSTRAP_ADMIN_USERNAME": "admin",
            "KC_BOOTSTRAP_ADMIN_PASSWORD": os.urandom(12).hex(), "KC_HOME_DIR": str(self.home),
        }  # fmt: skip
        words = [
            str(self.home / "bin/kc.sh"), f"-Dkc.home.dir={self.home}", "start", "--optimized", "--http-enabled=true",
            "--hostname-strict=false", "--http-host=127.0.0.1", f"--http-port={self.port}",
            f"--http-management-port={self._management}", "--import-realm",
        ]  # fmt: skip
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
        eventually(self._up, 240, f"Keycloak ready; its log is {self.home / 'log'}")

    def _up(self) -> bool:
        assert self.process.poll() is None, (self.home / "log").read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{self.issuer}/.well-known/openid-configuration", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
