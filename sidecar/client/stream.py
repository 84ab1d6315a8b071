"""The call that holds a workflow open, with its channel: what the sidecar sees of a hold."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from sidecar.wire.spanlock.v1 import workflows_pb2_grpc


class HoldStream:
    """One call of `Workflows.Hold`. Every wait has an end: the call lives as long as the work, so it has no deadline itself."""

    def __init__(self, socket: str, request: pb.OpenRequest) -> None:
        self.channel = grpc.insecure_channel(f"unix:{socket}")
        self._requests: queue.SimpleQueue[pb.HoldRequest | None] = queue.SimpleQueue()
        self.send(pb.HoldRequest(open=request))
        self._answers: Any = workflows_pb2_grpc.WorkflowsStub(self.channel).Hold(_feed(self._requests))  # type: ignore[no-untyped-call]

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

    def end(self) -> None:
        """Ends the call, however far it is, and the connection."""
        self._requests.put(None)
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


def _feed(requests: "queue.SimpleQueue[pb.HoldRequest | None]") -> Iterator[pb.HoldRequest]:
    while (request := requests.get()) is not None:
        yield request
