"""Messages that are no valid protobuf: INVALID_ARGUMENT and a reason, where gRPC answers UNKNOWN and logs a traceback."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from sidecar.control.rescue import Context, refuse
from sidecar.errors import CallerError, Reason, SpanlockError

OnRefusal = Callable[[str, SpanlockError], None]
"""Is told the RPC's name and why."""
TurnAway = Callable[[Context], Awaitable[None]]
"""Ends the call; does not return."""


class _Unreadable:
    """Stands for a message that is no valid protobuf of its type."""


class RefuseUnreadable(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """For every method of a server. `on_refusal` is told of messages that come alone; of one in a stream, its reader tells."""

    def __init__(self, on_refusal: OnRefusal = lambda *_: None) -> None:
        self._on_refusal = on_refusal

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or handler.request_deserializer is None:
            return handler
        read = handler.request_deserializer

        def deserializer(data: bytes) -> Any:
            try:
                return read(data)
            except DecodeError:
                return _Unreadable()

        async def turn_away(context: Context) -> None:
            error = _unreadable()
            self._on_refusal(details.method.rpartition("/")[2], error)
            await refuse(context, error)

        if handler.request_streaming:
            guarded = {"stream_stream": _guard_streams(handler.stream_stream)}
        elif handler.response_streaming:
            guarded = {"unary_stream": _guard_stream(handler.unary_stream, turn_away)}
        else:
            guarded = {"unary_unary": _guard_unary(handler.unary_unary, turn_away)}
        return handler._replace(request_deserializer=deserializer, **guarded)


def _unreadable() -> CallerError:
    return CallerError(Reason.INVALID_ARGUMENT, "the message is not valid protobuf of its type")


def _guard_unary(method: Any, turn_away: TurnAway) -> Any:
    async def guarded(request: Any, context: Context) -> Any:
        if isinstance(request, _Unreadable):
            await turn_away(context)
        return await method(request, context)

    return guarded


async def _answers(running: Any) -> AsyncIterator[Any]:
    """Of both kinds of streaming methods: those that yield, and coroutines that write to the context by themselves."""
    if inspect.isawaitable(running):
        await running
        return
    async for message in running:
        yield message


def _guard_stream(method: Any, turn_away: TurnAway) -> Any:
    async def guarded(request: Any, context: Context) -> AsyncIterator[Any]:
        if isinstance(request, _Unreadable):
            await turn_away(context)
        async for message in _answers(method(request, context)):
            yield message

    return guarded


def _guard_streams(method: Any) -> Any:
    """Both ways: the reader is told by the error that its iterator raises."""

    async def readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            if isinstance(request, _Unreadable):
                raise _unreadable()
            yield request

    async def guarded(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async for message in _answers(method(readable(requests), context)):
            yield message

    return guarded
