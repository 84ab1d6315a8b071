"""Silent connections to the small listeners: bounded, and a probe still gets in."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from sidecar import site
from sidecar.errors import ConfigError
from sidecar.site import Site
from tests.stage import raw, ready_stage

PROBE = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


async def _hello(_: web.Request) -> web.Response:
    return web.Response(text="here")


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Site, int]]:
    served = Site([web.get("/healthz", _hello)], "127.0.0.1:0", "health", max_body=1024)
    try:
        yield served, await served.start()
    finally:
        await served.stop()


async def test_a_flood_of_silent_connections_is_bounded_and_a_probe_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "MAX_CONNECTIONS", 16)
    async with serving() as (served, port):
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(12)]
        assert b"here" in await raw(port, PROBE)
        assert len(served._runner.server.connections) >= 12, "below the bound nobody is put out"  # type: ignore[union-attr]
        silent += [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
        assert b"here" in await raw(port, PROBE)
        assert await asyncio.wait_for(silent[0][0].read(), 10) == b"", "the oldest was put out"
        async with asyncio.timeout(10):
            while len(served._runner.server.connections) > 16:  # type: ignore[union-attr]
                await asyncio.sleep(0)
        for _, writer in silent:
            writer.close()


async def test_an_address_that_is_taken_names_its_key() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"health: cannot listen on {address}"):
            await Site([], address, "health", max_body=1024).start()


async def test_a_silent_connection_to_a_grpc_listener_is_put_out() -> None:
    """By gRPC's own timer, two seconds: there is no clock of ours in it."""
    async with ready_stage() as stage:
        reader, writer = await asyncio.open_connection("127.0.0.1", stage.app.otlp.grpc_port)
        async with asyncio.timeout(20):
            while await reader.read(1024):
                pass
        writer.close()
