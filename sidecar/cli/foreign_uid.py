"""The demo's stranger: a process of another uid that presents a handle which is good, but not its own."""

import asyncio
import os
import sys

from sidecar.cli.stage import Stage
from sidecar.errors import CallerError, Reason

_NOBODY = 65534
# Becomes another uid once it runs, since that one may not be able to read the interpreter; it imports nothing from then on.
_FOREIGN = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
tool = socket.socket()
tool.settimeout(10)
tool.connect(("127.0.0.1", int(sys.argv[2])))
tool.sendall(sys.stdin.buffer.read())
answer = b"".join(iter(lambda: tool.recv(65536), b""))
sys.stdout.buffer.write(b"%d\\n" % os.getuid() + answer)
"""


async def foreign_uid_refused(stage: Stage, handle: str) -> tuple[str, bool]:
    """Another uid with a handle that is good: what was done, and whether it was refused."""
    if os.getuid() != 0:
        try:
            stage.app.callers.by_uid(os.getuid() + 4242)
        except CallerError as error:
            return (
                "a foreign uid: unknown here (only root can become one to try)",
                error.reason is Reason.UNKNOWN_CALLER,
            )
        return "a foreign uid", False
    port = stage.app.addresses["reverse"].rpartition(":")[2]
    lines = ("GET /search/ HTTP/1.1", "Host: 127.0.0.1", f"x-spanlock-workflow: {handle}", "Connection: close", "", "")
    words = [sys.executable, "-I", "-S", "-c", _FOREIGN, str(_NOBODY), port]
    child = await asyncio.create_subprocess_exec(*words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
    out, _ = await child.communicate("\r\n".join(lines).encode())
    refused = out.startswith(b"%d\n" % _NOBODY) and b"unknown_caller" in out
    return f"a process of uid {_NOBODY} with a handle that is good: refused", refused
