"""An OpenTelemetry `SpanProcessor` that opens a workflow when a matching root span starts and closes it when that span ends.

Calls then bind by the trace id in their traceparent. Needs opentelemetry-sdk.
"""

import threading
from collections.abc import Callable

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from sidecar.client.workflow import SpanlockUnavailable, WorkflowHold, workflow

Match = Callable[[ReadableSpan], bool]


def is_root(span: ReadableSpan) -> bool:
    """A span without a parent."""
    return span.parent is None


class SpanlockSpanProcessor(SpanProcessor):
    """Opening happens in the span's start, so that the first call finds its workflow; closing never delays the agent.

    A sidecar that does not answer never breaks the agent: a span's start waits for it for 10 seconds at most, and the
    calls are then refused with `no_workflow`.
    """

    def __init__(self, socket: str | None = None, match: Match = is_root) -> None:
        self._socket = socket
        self._match = match
        self._held: dict[int, WorkflowHold] = {}

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Opens for a matching span."""
        if not self._match(span):
            return
        context = span.get_span_context()
        if context is None:
            return
        hold = workflow(
            span.name,
            socket=self._socket,
            trace_id=f"{context.trace_id:032x}",
            root_span_id=f"{context.span_id:016x}",
        )
        try:
            self._held[context.span_id] = hold.open()
        except SpanlockUnavailable:
            return

    def on_end(self, span: ReadableSpan) -> None:
        """Closes, in a thread of its own."""
        context = span.get_span_context()
        hold = self._held.pop(context.span_id, None) if context is not None else None
        if hold is not None:
            threading.Thread(target=hold.close, name="spanlock close").start()

    def shutdown(self) -> None:
        """Closes what is open."""
        for hold in self._held.values():
            hold.close()
        self._held.clear()
