"""Which workflows are open, on disk, so that the next start can say what a crash closed (`sidecar_restarted`).

Ids and names only: nothing that opens anything. One line an event; rewritten when it has grown. A disk that refuses costs
this report and nothing else.
"""

import json
import os
from pathlib import Path

from sidecar.model.workflow import CloseReason, Workflow, WorkflowState
from sidecar.secret import Secret
from sidecar.telemetry.logging import logger

_SLACK = 4096
"""Lines beyond those of the open workflows, at which the file is rewritten."""
_MAX_BYTES = 16 << 20


class Roll:
    """Owns `path`, in a directory of the operator's. `start` reads and empties it, `close` ends it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None
        self._open: dict[str, bytes] = {}
        self._lines = 0

    def start(self) -> list[Workflow]:
        """The workflows that were open when the last sidecar here died: closed, and said to be."""
        left = self._read()
        self._rewrite()
        return left

    def note(self, workflow: Workflow) -> None:
        """The workflow opened or began to close. Never raises."""
        if workflow.is_open:
            fields = [workflow.id, workflow.agent, workflow.name, workflow.opened_at, workflow.trace_id]
            line = self._open[workflow.id] = json.dumps(fields).encode() + b"\n"
        elif self._open.pop(workflow.id, None) is not None:
            line = json.dumps([workflow.id]).encode() + b"\n"
        else:
            return
        self._lines += 1
        if self._lines > len(self._open) + _SLACK:
            self._rewrite()
        elif self._descriptor is not None:
            self._write(line)

    def _read(self) -> list[Workflow]:
        found: dict[str, Workflow] = {}
        try:
            with self._path.open("rb") as file:
                lines = file.read(_MAX_BYTES).splitlines()
        except OSError:
            return []
        for line in lines:
            try:
                workflow_id, *rest = json.loads(line)
                if rest:
                    found[str(workflow_id)] = _closed(str(workflow_id), *rest)
                else:
                    found.pop(str(workflow_id), None)
            except (ValueError, TypeError):
                continue  # the line that the crash cut short
        return list(found.values())

    def _rewrite(self) -> None:
        """A new file in the old one's place, with the open workflows alone."""
        self.close()
        fresh = self._path.with_suffix(".new")
        try:
            fresh.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(fresh, flags, 0o600)
            self._write(b"".join(self._open.values()))
            fresh.rename(self._path)
        except OSError as error:
            self._failed(error)
        self._lines = len(self._open)

    def _write(self, data: bytes) -> None:
        try:
            while data and self._descriptor is not None:
                data = data[os.write(self._descriptor, data) :]
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        logger("workflows").warning("roll_lost", error=error.strerror, effect="a restart cannot name what it closed")
        self.close()

    def close(self) -> None:
        """Ends the file; what is on it stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _closed(workflow_id: str, agent: str, name: str, opened_at: float, trace_id: str | None) -> Workflow:
    return Workflow(
        id=workflow_id, agent=agent, name=name, handle=Secret(""), opened_at=float(opened_at), deadline=0.0, idle_seconds=0.0,
        trace_id=trace_id, state=WorkflowState.CLOSED, close_reason=CloseReason.SIDECAR_RESTARTED,
    )  # fmt: skip
