"""Addresses that the sidecar listens on, "host:port", and which hosts are this machine.

They are read in one place, so that `spanlock check` refuses what `spanlock run` could not listen on.
"""

import re
from functools import lru_cache
from ipaddress import ip_address
from typing import Annotated

from pydantic import AfterValidator

MAX_SOCKET_PATH = 107
"""Bytes of a Unix socket's path (unix(7)): 108 with the NUL."""

_NAME = r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*"
_IPV6 = r"\[([0-9A-Fa-f.]*:[0-9A-Fa-f:.]*)\]"
_ADDRESS = re.compile(rf"(?:{_IPV6}|({_NAME})):([0-9]{{1,5}})")


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts, an IPv6 host without its brackets. Raises ValueError that says how to write one."""
    match = _ADDRESS.fullmatch(address)
    if match is not None:
        host, port = match[1] or match[2], int(match[3])
        numeric = match[1] or host.rpartition(".")[2].isdigit()
        if port <= 65535 and (is_literal(host) or not numeric):
            return host, port
    raise ValueError("write host:port, as in 127.0.0.1:17001, or [::1]:17001; ports are 0 to 65535")


def is_literal(host: str) -> bool:
    """Whether `host` is an IP address, not a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


@lru_cache(maxsize=1024)
def is_loopback(host: str) -> bool:
    """Whether `host` is this machine by its own word: a loopback literal or `localhost`."""
    return host == "localhost" or (is_literal(host) and ip_address(host).is_loopback)


def _valid(value: str) -> str:
    host_and_port(value)
    return value


def _loopback(value: str) -> str:
    if not is_loopback(host_and_port(value)[0]):
        raise ValueError("not loopback, where callers are known by their uids; write 127.0.0.1:PORT")
    return value


HostPort = Annotated[str, AfterValidator(_valid)]
"""A field of a section: an address to listen on. Port 0: any free one."""
LoopbackHostPort = Annotated[str, AfterValidator(_loopback)]
"""The same where nothing but the connection's uid says who calls."""
