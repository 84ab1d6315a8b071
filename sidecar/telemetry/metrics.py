"""All metric and label names. Children are bound once: a labelled look-up costs 4 µs, a bound one 0.9."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

_CLOSE_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """One registry of our own, so that two sidecars in one process (tests, the demo) do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        self._flows = Counter(
            "spanlock_flows", "Calls by tool and outcome (ok or reason)", ["tool", "outcome"], registry=registry
        )
        self._seconds = Histogram("spanlock_flow_seconds", "Duration of calls", ["tool"], registry=registry)
        self._leases = Counter("spanlock_lease_events", "Lease events", ["tool", "event"], registry=registry)
        self._revoked = Counter(
            "spanlock_revocations", "Ends of leases at the issuer", ["tool", "outcome"], registry=registry
        )
        self._workflows = Counter("spanlock_workflow_closes", "Closed workflows", ["reason"], registry=registry)
        self.audit_lost = Counter("spanlock_audit_lost", "Audit records that could not be written", registry=registry)
        self.close_to_dropped = Histogram(
            "spanlock_close_to_dropped_seconds",
            "From a close to unusable here",
            buckets=_CLOSE_BUCKETS,
            registry=registry,
        )
        self.close_to_revoked = Histogram(
            "spanlock_close_to_revoked_seconds",
            "From a close to the last final outcome",
            buckets=_CLOSE_BUCKETS,
            registry=registry,
        )

    def flow_recorder(self, tool: str) -> Callable[[str, float], None]:
        """Bound children for one tool: call with (outcome, seconds)."""
        observe = self._seconds.labels(tool).observe
        increments: dict[str, Callable[[], None]] = {}

        def record(outcome: str, seconds: float) -> None:
            increment = increments.get(outcome)
            if increment is None:
                increment = increments[outcome] = self._flows.labels(tool, outcome).inc
            increment()
            observe(seconds)

        return record

    def lease_event(self, tool: str, event: str, outcome: str) -> None:
        self._leases.labels(tool, event).inc()
        if event == "revoked":
            self._revoked.labels(tool, outcome).inc()

    def workflow_closed(self, reason: str, dropped_ms: float, revoked_ms: float) -> None:
        self._workflows.labels(reason).inc()
        self.close_to_dropped.observe(dropped_ms / 1000)
        self.close_to_revoked.observe(revoked_ms / 1000)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(name, help_text, registry=self.registry).set_function(read)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
