"""Whose connection is it? The uid of a loopback TCP peer by NETLINK_SOCK_DIAG (sock_diag(7)); unprivileged, about 30 µs.

SO_PEERCRED on TCP says (0, -1, -1) without an error, so it is never asked. The client's own socket is looked up; one
without an inode belongs to a process that has closed it, and keeps a uid that proves nothing: refused.
"""

import socket
import struct
from ipaddress import ip_address

from sidecar.errors import CallerError, Reason

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_ALL_STATES = 0xFFFFFFFF
_ANSWER = struct.Struct("=BBBB")
_OFFSET_UID = 16 + 64
"""After the netlink header (16) and family, state, timer, retrans (4), the socket id (48), expires, rqueue, wqueue (12)."""


def uid_of_peer(local: tuple[str, int], peer: tuple[str, int]) -> int:
    """The uid of the process that owns the client's end of the connection `peer` → `local`.

    Both are addresses of one network namespace. Raises `CallerError` (unknown_caller) when the kernel does not know, or
    the client has closed its socket.
    """
    source, target = ip_address(peer[0]), ip_address(local[0])
    family = socket.AF_INET if source.version == 4 else socket.AF_INET6
    identity = struct.pack(
        "!HH16s16sI8s",
        peer[1],
        local[1],
        source.packed.ljust(16, b"\0"),
        target.packed.ljust(16, b"\0"),
        0,
        b"\xff" * 8,
    )
    body = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, _ALL_STATES) + identity
    header = struct.pack("=IHHII", 16 + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(1.0)
            netlink.send(header + body)
            answer = netlink.recv(4096)
    except OSError:
        raise CallerError(Reason.UNKNOWN_CALLER, "the kernel did not say whose connection this is") from None
    if len(answer) < _OFFSET_UID + 8 or struct.unpack_from("=H", answer, 4)[0] != _SOCK_DIAG_BY_FAMILY:
        raise CallerError(Reason.UNKNOWN_CALLER, "the connection's other end is not on this machine")
    uid, inode = struct.unpack_from("=II", answer, _OFFSET_UID)
    if inode == 0:
        raise CallerError(Reason.UNKNOWN_CALLER, "the caller has closed its socket already")
    return int(uid)
