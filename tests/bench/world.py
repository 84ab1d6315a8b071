"""The world of the measured daemon, in a process of its own: identity, issuer, configuration. Ends with its standard input.

Prints one JSON line: the directory with `spanlock.yaml`, and the port of `/readyz`.
"""

import asyncio
import json
import socket
import sys
import threading

import uvloop

from sidecar.cli.stage import Servers
from sidecar.telemetry.logging import configure

TOOLS = """\
- {{{{name: plain, url: "http://127.0.0.1:9001", issuer: demo-issuer, audience: tool-search, allow_networks: [127.0.0.0/8]}}}}
- {{{{name: tls, url: "https://localhost:9443", address: 127.0.0.1, ca_file: "{ca}", issuer: demo-issuer, audience: tool-search}}}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def main(ca: str) -> None:
    configure("error", "console")
    health = free_port()
    async with Servers(more=TOOLS.format(ca=ca), policy_for=("plain", "tls"), health=health) as servers:
        print(json.dumps({"dir": str(servers.dir), "health": health}), flush=True)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(ended.set)), daemon=True).start()
        await ended.wait()


uvloop.run(main(*sys.argv[1:]))
