"""An OpenTelemetry `SpanProcessor` that opens a workflow when a matching root span starts and closes it when that span ends.

Calls then bind by the trace id in their traceparent. Needs opentelemetry-sdk.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from sidecar.client.workflow import SpanlockRefused, SpanlockUnavailable, WorkflowHold, workflow

_PAUSE = 30.0
"""Seconds after which a sidecar that did not answer is asked again."""
_log = logging.getLogger("spanlock")

Match = Callable[[ReadableSpan], bool]


def is_root(span: ReadableSpan) -> bool:
    """A span without a parent."""
    return span.parent is None


class SpanlockSpanProcessor(SpanProcessor):
    """Opening happens in the span's start, so that the first call finds its workflow; closing never delays the agent.

    A sidecar that does not answer never breaks the agent, nor slows each of its spans: the first waits for it for 10
    seconds at most, then one span every 30 seconds asks again. Calls meanwhile are refused with `no_workflow`; the logger
    `spanlock` says so, once an outage. What the sidecar refuses is said once for each reason.
    """

    def __init__(self, socket: str | Path | None = None, match: Match = is_root) -> None:
        self._socket = socket
        self._match = match
        self._held: dict[int, WorkflowHold] = {}
        self._lock = threading.Lock()
        self._again: float | None = None
        """Monotonic seconds before which no span asks; None: the sidecar answered when it was last asked."""
        self._refused: set[str] = set()

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Opens for a matching span."""
        if not self._match(span):
            return
        context = span.get_span_context()
        if context is None or not self._may_ask():
            return
        hold = workflow(
            span.name,
            socket=self._socket,
            trace_id=f"{context.trace_id:032x}",
            root_span_id=f"{context.span_id:016x}",
        )
        try:
            self._held[context.span_id] = hold.open()
        except SpanlockRefused as error:
            self._answered()
            self._say_refusal(error)
        except SpanlockUnavailable as error:
            self._failed(error)
        else:
            self._answered()

    def _may_ask(self) -> bool:
        """Always, but in an outage: then one span after each pause, and no other waits with it."""
        with self._lock:
            if self._again is None:
                return True
            now = time.monotonic()
            if now < self._again:
                return False
            self._again = now + _PAUSE
            return True

    def _failed(self, error: SpanlockUnavailable) -> None:
        with self._lock:
            is_news, self._again = self._again is None, time.monotonic() + _PAUSE
        if is_news:  # not under the lock: what handles logs may start spans
            _log.warning("spans open no workflow, so their calls are refused with no_workflow: %s", error)

    def _answered(self) -> None:
        with self._lock:
            was_out, self._again = self._again is not None, None
        if was_out:
            _log.info("the sidecar answers again: spans open workflows")

    def _say_refusal(self, error: SpanlockRefused) -> None:
        with self._lock:
            is_news = error.reason not in self._refused
            self._refused.add(error.reason)
        if is_news:
            _log.warning("a span has no workflow, so its calls are refused with no_workflow: %s", error)

    def on_end(self, span: ReadableSpan) -> None:
        """Closes, in a thread of its own."""
        context = span.get_span_context()
        hold = self._held.pop(context.span_id, None) if context is not None else None
        if hold is not None:
            threading.Thread(target=hold.close, name="spanlock close").start()

    def shutdown(self) -> None:
        """Closes what is open."""
        while self._held:
            self._held.popitem()[1].close()
