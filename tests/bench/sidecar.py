"""The measured process: the whole sidecar on the embedded stage, with a plain and a TLS tool for the benchmark's upstream.

Prints one JSON line with what the load needs, then serves until its standard input ends.
"""

import asyncio
import json
import sys
import threading

import uvloop

from sidecar.telemetry.logging import configure
from tests.stage import opened, ready_stage

TOOLS = """\
- {{{{name: plain, url: "http://127.0.0.1:{plain}", issuer: demo-issuer, audience: tool-search, allow_networks: [127.0.0.0/8]}}}}
- {{{{name: tls, url: "https://localhost:{tls}", address: 127.0.0.1, ca_file: "{ca}", issuer: demo-issuer, audience: tool-search}}}}
"""


async def main(plain: str, tls: str, ca: str) -> None:
    configure("error", "console")
    async with ready_stage(more=TOOLS.format(plain=plain, tls=tls, ca=ca), policy_for=("plain", "tls")) as stage:
        for _ in range(1000):
            await opened(stage)
        workflow = await opened(stage, listener=True)
        ca_file = stage.dir / "sidecar-ca.pem"
        ca_file.write_text(stage.app.plane.ca.pem)
        facts = {
            "reverse": stage.app.addresses["reverse"],
            "handle": workflow.handle,
            "proxy": workflow.proxy_url,
            "ca": str(ca_file),
        }
        print(json.dumps(facts), flush=True)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(ended.set)), daemon=True).start()
        await ended.wait()


uvloop.run(main(*sys.argv[1:]))
