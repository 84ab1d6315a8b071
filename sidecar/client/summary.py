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
    counts = Counter(map(_outcome, report.leases))
    number = counts.total()
    parts = [f"{count} {word}" for word, count in counts.items()]
    living = [end for end in report.leases if seconds(end) != 0]
    if living:
        tools = ", ".join(f"{end.tool}: {end.token_check}, {residual(end)}" for end in living)
        parts.append(f"residual at the tool ({tools})")
    credentials = (
        f"{number} credential{'s' * (number != 1)}: {', '.join(parts)}" if number else "no credentials were needed"
    )
    return credentials + _time(report) + _refused(report)


def _time(report: pb.CloseResponse) -> str:
    """How long the issuers took, where they took anything back."""
    milliseconds = report.revoked_after.ToNanoseconds() / 1e6
    outcomes = {end.at_issuer for end in report.leases}
    if "failed" in outcomes:
        return f"; not all revoked within {milliseconds:.0f} ms, the sidecar tries on"
    return f"; revoked in {milliseconds:.0f} ms" if outcomes & {"confirmed", "acknowledged"} else ""


def _refused(report: pb.CloseResponse) -> str:
    number, reasons = sum(report.refused.values()), sorted(report.refused)
    if not number:
        return ""
    calls = "1 call was" if number == 1 else f"{number} calls were"
    return f"; {calls} refused: {', '.join(reasons)} (spanlock explain {reasons[0]})"


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
