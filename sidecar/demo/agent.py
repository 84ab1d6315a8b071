"""A small AI agent for the demo: plain HTTPS through whatever proxy the environment names; it knows nothing of Spanlock.

`python agent.py URL…` calls each and prints what it got; `--forever` keeps a stream open until it is killed.
"""

import json
import os
import sys
import urllib.error
import urllib.request


def call(url: str) -> dict[str, object]:
    """One call, and what this process knows of credentials: nothing."""
    request = urllib.request.Request(url, headers={"user-agent": "demo-agent"})  # noqa: S310 - the demo's own https URLs
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return {"status": answer.status, "sent": dict(request.header_items()), "got": json.load(answer)}
    except urllib.error.HTTPError as error:
        return {"status": error.code, "reason": error.headers.get("x-spanlock-reason", ""), "got": {}}


def main(arguments: list[str]) -> None:
    """Calls every URL; prints one JSON line each."""
    forever = "--forever" in arguments
    for url in arguments:
        if url.startswith("https://"):
            print(json.dumps(call(url)), flush=True)  # noqa: T201 - its output is what the demo shows
    if forever:
        with urllib.request.urlopen(os.environ["DEMO_STREAM"], timeout=20) as stream:  # noqa: S310
            for line in stream:
                print(json.dumps({"stream": line.decode().strip()}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
