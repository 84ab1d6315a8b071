"""All metric and label names. What is counted for each call is plain numbers, given to Prometheus when it asks."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

_CLOSE_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_FLOW_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
Metric = CounterMetricFamily | HistogramMetricFamily


class _ToolFlows:
    """The calls of one tool so far."""

    __slots__ = ("buckets", "outcomes", "seconds")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.buckets = [0] * (len(_FLOW_BUCKETS) + 1)
        self.seconds = 0.0


class _Flows(Collector):
    """Calls by tool. The library's own counters cost ten times as much for each call; one thread writes and reads these."""

    def __init__(self) -> None:
        self.tools: dict[str, _ToolFlows] = {}

    def note(self, tool: str, outcome: str, seconds: float) -> None:
        flows = self.tools.get(tool)
        if flows is None:
            flows = self.tools[tool] = _ToolFlows()
        flows.outcomes[outcome] = flows.outcomes.get(outcome, 0) + 1
        flows.buckets[bisect_left(_FLOW_BUCKETS, seconds)] += 1
        flows.seconds += seconds

    def collect(self) -> Iterator[Metric]:
        calls = CounterMetricFamily(
            "spanlock_flows", "Calls by tool and outcome (ok or reason)", labels=["tool", "outcome"]
        )
        times = HistogramMetricFamily("spanlock_flow_seconds", "Duration of calls", labels=["tool"])
        bounds = [*map(str, _FLOW_BUCKETS), "+Inf"]
        for tool, flows in self.tools.items():
            for outcome, count in flows.outcomes.items():
                calls.add_metric([tool, outcome], count)
            times.add_metric([tool], list(zip(bounds, accumulate(flows.buckets), strict=True)), flows.seconds)
        yield calls
        yield times


class Metrics:
    """One registry of our own, so that two sidecars in one process (tests, the demo) do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        flows = _Flows()
        registry.register(flows)
        self.flow = flows.note
        """Counts one call: (tool, outcome, seconds). Tools and reasons are configured or ours, so labels are bounded."""
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

    def lease_event(self, tool: str, event: str, outcome: str) -> None:
        self._leases.labels(tool, event).inc()
        if event == "revoked":
            self._revoked.labels(tool, outcome).inc()

    def workflow_closed(self, reason: str, dropped_ms: float | None, revoked_ms: float | None) -> None:
        """Counts a close, with its times as far as there were any: a crash measures none, no lease needs no issuer."""
        self._workflows.labels(reason).inc()
        if dropped_ms is not None:
            self.close_to_dropped.observe(dropped_ms / 1000)
        if revoked_ms is not None:
            self.close_to_revoked.observe(revoked_ms / 1000)

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is scraped."""
        Gauge(name, help_text, registry=self.registry).set_function(read)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
