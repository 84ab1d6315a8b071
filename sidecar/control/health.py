"""Probes and metrics over HTTP, reachable from outside the pod: no workflow ids, nothing to change."""

from collections.abc import Callable

from aiohttp import web

from sidecar.site import Site
from sidecar.telemetry.metrics import Metrics

Ready = Callable[[], tuple[bool, list[dict[str, object]]]]
"""Whether calls can be served, and one row a dependency."""


class HealthServer:
    """`start` listens, `stop` ends it."""

    def __init__(self, address: str, ready: Ready, metrics: Metrics) -> None:
        self._ready = ready
        self._metrics = metrics
        routes = [
            web.get("/healthz", self._healthz),
            web.get("/readyz", self._readyz),
            web.get("/metrics", self._exposition),
        ]
        self._site = Site(routes, address, "health", max_body=1024)
        self.port = 0

    async def start(self) -> None:
        """Raises `ConfigError` when the address is taken."""
        self.port = await self._site.start()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def _readyz(self, _: web.Request) -> web.Response:
        ready, rows = self._ready()
        return web.json_response({"ready": ready, "dependencies": rows}, status=200 if ready else 503)

    async def _exposition(self, _: web.Request) -> web.Response:
        return web.Response(body=self._metrics.exposition(), content_type="text/plain", charset="utf-8")

    async def stop(self) -> None:
        """Ends the server."""
        await self._site.stop()
