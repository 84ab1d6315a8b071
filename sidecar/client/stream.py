"""The call that holds a workflow open, with its channel: what the sidecar sees of a hold."""

import ctypes
import os
import queue
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from sidecar.wire.spanlock.v1 import workflows_pb2_grpc

_LIVE: "weakref.WeakSet[HoldStream]" = weakref.WeakSet()


class HoldStream:
    """One call of `Workflows.Hold`. Every wait has an end: the call lives as long as the work, so it has no deadline itself."""

    def __init__(self, socket: Path, request: pb.OpenRequest) -> None:
        self._pid = os.getpid()
        _LIVE.add(self)
        self.channel = grpc.insecure_channel(f"unix:{socket}")
        self._requests: queue.SimpleQueue[pb.HoldRequest | None] = queue.SimpleQueue()
        self.send(pb.HoldRequest(open=request))
        self._answers: Any = workflows_pb2_grpc.WorkflowsStub(self.channel).Hold(_feed(self._requests, self.channel))  # type: ignore[no-untyped-call]

    @property
    def is_inherited(self) -> bool:
        """Whether a forked child asks: gRPC's threads are only in the process that made the call; to wait for them hangs."""
        return os.getpid() != self._pid

    def send(self, request: pb.HoldRequest) -> None:
        """Never waits."""
        self._requests.put(request)

    def opened(self, seconds: float) -> pb.OpenResponse:
        """The first answer. Raises `grpc.RpcError` (CANCELLED: none within `seconds`) or StopIteration."""
        with self._within(seconds):
            opened: pb.OpenResponse = next(self._answers).opened
        return opened

    def closed(self, seconds: float) -> pb.CloseResponse | None:
        """Asks for the close and reads to the end; None when the sidecar is gone or not done within `seconds`."""
        self.send(pb.HoldRequest(close=True))
        report: pb.CloseResponse | None = None
        try:
            with self._within(seconds):
                for answer in self._answers:
                    if answer.HasField("closed"):
                        report = answer.closed
        except grpc.RpcError:
            return None
        return report

    def let_go(self) -> None:
        """The same as `end` by gRPC's own thread, soon: for a finalizer, which runs anywhere and can wait for no lock."""
        self._requests.put(None)

    def end(self) -> None:
        """Ends the call, however far it is, and the connection."""
        self.let_go()
        self.channel.close()

    @contextmanager
    def _within(self, seconds: float) -> Iterator[None]:
        """Cancels the call when the block takes longer."""
        timer = threading.Timer(seconds, self._answers.cancel)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _feed(requests: "queue.SimpleQueue[pb.HoldRequest | None]", channel: grpc.Channel) -> Iterator[pb.HoldRequest]:
    """No method: gRPC's thread, which reads it, would keep a call alive that nobody else remembers."""
    while (request := requests.get()) is not None:
        yield request
    channel.close()


def _keep_in_child() -> None:
    """A forked child never lets go of its parent's calls: gRPC would cancel them, over the connection that both have."""
    for stream in _LIVE:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(stream))  # outlives even the interpreter's end


os.register_at_fork(after_in_child=_keep_in_child)
