"""One record a flow, a lease event, a workflow event. A call appends a tuple; encoding and writing come in small batches."""

from collections.abc import Callable

from pydantic_core import to_json

from sidecar.clock import Clock
from sidecar.model.audit import FlowRecord, LeaseRecord, WorkflowRecord
from sidecar.ports import AuditSink
from sidecar.telemetry.logging import logger

Record = FlowRecord | LeaseRecord | WorkflowRecord

_INTERVAL = 0.2
_BATCH = 50
"""Records that are written at once: a batch holds up the calls that come meanwhile, 4 µs for each record."""
KINDS: dict[type[Record], bytes] = {FlowRecord: b"flow", LeaseRecord: b"lease", WorkflowRecord: b"workflow"}


def encode(record: Record) -> bytes:
    """One line of JSON, `kind` first."""
    kind = type(record)
    return b'{"kind":"%b",%b\n' % (KINDS[kind], to_json(dict(zip(kind._fields, record, strict=True)))[1:])


class AuditLog:
    """Owns its sink. `run` writes every 0.2 s; `close` writes what is left."""

    def __init__(self, sink: AuditSink, clock: Clock, on_lost: Callable[[int], None]) -> None:
        self._sink = sink
        self._clock = clock
        self._on_lost = on_lost
        self._queue: list[Record] = []
        self._log = logger("audit")
        self._broken = False

    def flow(self, record: FlowRecord) -> None:
        """Notes one call. Never raises. Each fiftieth record writes the batch, and waits as long as a file's disk takes."""
        self._note(record)

    def lease(self, record: LeaseRecord) -> None:
        """Notes one event in a lease's life."""
        self._note(record)

    def workflow(self, record: WorkflowRecord) -> None:
        """Notes a workflow's opening or end."""
        self._note(record)

    def _note(self, record: Record) -> None:
        self._queue.append(record)
        if len(self._queue) >= _BATCH:
            self.flush()

    async def run(self) -> None:
        """For ever: writes batches."""
        while True:
            await self._clock.sleep(_INTERVAL)
            self.flush()

    @property
    def healthy(self) -> bool:
        """False while the sink refuses lines."""
        return not self._broken

    def flush(self) -> None:
        """Writes what is noted. A sink that fails loses the batch: counted, and said once until it works again."""
        queue, self._queue = self._queue, []
        lost = 0
        if queue:
            try:
                self._sink.write(b"".join(map(encode, queue)))
                self._broken = False
            except (OSError, ValueError) as error:  # ValueError: a record that is no JSON, which is a bug of ours
                lost += len(queue)
                if not self._broken:
                    why = error.strerror if isinstance(error, OSError) else "a record cannot be encoded"
                    self._log.error("audit_sink_failed", error=why, lost=lost)
                self._broken = True
        if lost:
            self._on_lost(lost)

    def reopen(self) -> None:
        """Writes what is noted and goes on in a file opened anew (logrotate and SIGHUP). One that cannot be is said."""
        self.flush()
        try:
            self._sink.reopen()
        except OSError as error:
            self._log.error("audit_not_reopened", error=error.strerror, effect="records go on to the file as it was")

    def close(self) -> None:
        """Writes what is left and closes the sink."""
        self.flush()
        self._sink.close()
