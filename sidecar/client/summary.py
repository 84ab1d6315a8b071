"""How a workflow ended, in one line; and what is left of a credential's life at its tool: never less than it may be."""

from collections import Counter

from sidecar.wire.spanlock.v1 import workflows_pb2 as pb

_NO_END = 315_576_000_000
"""Seconds of the largest Duration, with which the protocol says that there is no end."""


def summary(report: pb.CloseResponse | None) -> str:
    """What died and what did not, in one line; None: nobody told. For example:

    2 credentials: 1 confirmed dead, 1 confirmed, residual at the tool (reports: offline, at most 241 s); revoked in 38 ms
    """
    if report is None:
        return "the sidecar went away; what it held ends with its own expiry"
    if not report.leases:
        return "no credentials were needed"
    counts = Counter(map(_outcome, report.leases))
    parts = [f"{count} {word}" for word, count in counts.items()]
    living = [end for end in report.leases if seconds(end) != 0]
    if living:
        tools = ", ".join(f"{end.tool}: {end.token_check}, {residual(end)}" for end in living)
        parts.append(f"residual at the tool ({tools})")
    milliseconds = report.revoked_after.ToNanoseconds() / 1e6
    number = len(report.leases)
    return f"{number} credential{'s' * (number != 1)}: {', '.join(parts)}; revoked in {milliseconds:.0f} ms"


def _outcome(end: pb.LeaseEnd) -> str:
    return "confirmed dead" if end.at_issuer == "confirmed" and seconds(end) == 0 else str(end.at_issuer)


def seconds(end: pb.LeaseEnd) -> int | None:
    """At most this many, rounded up; 0: dead there; None: no end (a static secret)."""
    if end.residual.seconds >= _NO_END:
        return None
    return int(-(-end.residual.ToNanoseconds() // 1_000_000_000))


def residual(end: pb.LeaseEnd) -> str:
    """`none`, `at most 241 s` or `no end`."""
    left = seconds(end)
    return "no end" if left is None else f"at most {left} s" if left else "none"
