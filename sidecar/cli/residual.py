"""What is left of a credential's life at its tool, in words and in numbers: never less than it may be."""

from sidecar.control.convert import UNBOUNDED
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb


def seconds(end: pb.LeaseEnd) -> int | None:
    """At most this many, rounded up; 0: dead there; None, which is null in JSON: no end (a static secret)."""
    if end.residual.seconds >= UNBOUNDED:
        return None
    return int(-(-end.residual.ToNanoseconds() // 1_000_000_000))


def residual(end: pb.LeaseEnd) -> str:
    """`none`, `at most 241 s` or `no end`."""
    left = seconds(end)
    return "no end" if left is None else f"at most {left} s" if left else "none"
