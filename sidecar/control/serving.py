"""grpc.health.v1 on the sockets: whether calls there can get credentials, as it is at this moment.

The library's own service remembers a status that somebody must set; a Watch would tell of a change only when somebody did.
An SVID expires without any event, so whoever watches has it looked at.
"""

from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.clock import Clock
from sidecar.control.rescue import Context

LOOK_SECONDS = 1.0
"""Between two looks for a Watch: as often as the data plane looks after its connections."""
_Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """For the socket as a whole, the empty service name; no other has a status of its own."""

    def __init__(self, serving: Callable[[], bool], clock: Clock) -> None:
        self._serving = serving
        self._clock = clock

    async def Check(self, request: Any, context: Context) -> Any:
        if request.service:
            await context.abort(grpc.StatusCode.NOT_FOUND, "ask for the empty service name")
        return _Status(status=self._status(request.service))

    async def Watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """The status now, and each other one that follows, until the client goes."""
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                yield _Status(status=status)
                told = status
            await self._clock.sleep(LOOK_SECONDS)

    def _status(self, service: str) -> Any:
        if service:
            return _Status.SERVICE_UNKNOWN
        return _Status.SERVING if self._serving() else _Status.NOT_SERVING
