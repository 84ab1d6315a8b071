"""What the tests of `exec` run: real clients, unchanged, and a git server that wants a credential."""

import subprocess
import sys
from pathlib import Path

from aiohttp import web

REQUESTS = "import sys, requests; print(requests.get(sys.argv[1], timeout=10).text)"
HTTPX = "import sys, httpx; print(httpx.get(sys.argv[1], timeout=10).text)"
AIOHTTP = """
import asyncio, sys, aiohttp
async def main():
    async with aiohttp.ClientSession(trust_env=True) as session, session.get(sys.argv[1]) as answer:
        print(await answer.text())
asyncio.run(main())
"""
URLLIB = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"
EXPORT_A_SPAN = """
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
class Told(OTLPSpanExporter):
    def export(self, spans):
        result = super().export(spans)
        print("exported" if result is SpanExportResult.SUCCESS else "failed")
        return result
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(Told()))
provider.get_tracer("t").start_span("work").end()
"""
NODE = "fetch(process.argv[1]).then(a => a.text()).then(t => console.log(t))"
GO = """\
package main

import (
	"io"
	"log"
	"net/http"
	"os"
)

func main() {
	answer, err := http.Get(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	io.Copy(os.Stdout, answer.Body)
}
"""


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


def git_repository(directory: Path) -> Path:
    """A bare repository with one commit, ready for the dumb protocol."""
    work, bare = directory / "work", directory / "site/repo.git"
    who = ["-c", "user.name=t", "-c", "user.email=t@tool.test", "-c", "commit.gpgsign=false"]
    for words in (
        ["init", "-q", "-b", "main", str(work)],
        ["-C", str(work), *who, "commit", "-q", "--allow-empty", "-m", "first"],
        ["clone", "-q", "--bare", str(work), str(bare)],
        ["-C", str(bare), "update-server-info"],
    ):
        subprocess.run(["git", *words], check=True, capture_output=True)
    return bare.parent


class GitServer:
    """Serves a directory over HTTPS to whoever brings a bearer credential."""

    def __init__(self, site: Path) -> None:
        self._site = site
        self.credentials: list[str] = []
        self._runner: web.AppRunner | None = None

    async def start(self, tls: object, port: int) -> None:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._serve)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", port, ssl_context=tls).start()  # type: ignore[arg-type]

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        given = request.headers.get("authorization", "")
        if not given.startswith("Bearer "):
            return web.Response(status=401, headers={"www-authenticate": "Bearer"})
        self.credentials.append(given)
        path = self._site / request.match_info["path"]
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
