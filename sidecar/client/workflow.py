"""`with workflow("nightly report") as work:` — everything that the sidecar leases inside dies when the block ends.

The workflow is held open by a stream, so that a crash of this process closes it too. Works with `with` and `async with`.
"""

import asyncio
import ssl
import threading
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import grpc

from sidecar.client import sockets, trust
from sidecar.client.stream import HoldStream
from sidecar.client.summary import summary
from sidecar.wire.spanlock.v1 import token_exchange_pb2, token_exchange_pb2_grpc, workflows_pb2

_OPEN_SECONDS = 10.0
_CALL_SECONDS = 30.0
"""The sidecar's own deadlines are shorter: past these it hangs, and the agent must not hang with it."""


class SpanlockUnavailable(RuntimeError):
    """No sidecar answers, or it refused; the text says what to do."""


class SpanlockRefused(SpanlockUnavailable):
    """The sidecar answers, and says no. `reason` is its stable word, which `spanlock explain` knows."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class Session(Protocol):
    """What `configure` sets, as a session of `requests` has it."""

    trust_env: bool
    proxies: Any
    verify: Any


class WorkflowHold:
    """An open workflow. `close` (or the end of the block) drops and revokes everything, and returns the report.

    One that is forgotten without a close closes its workflow when it is collected, with a ResourceWarning, as files do.
    """

    def __init__(self, socket: str | Path | None, request: workflows_pb2.OpenRequest) -> None:
        self._socket = socket
        self._request = request
        self._stream: HoldStream | None = None
        self._opened: workflows_pb2.OpenResponse | None = None
        self._was_closed = False
        self._bundle: trust.OwnBundle | None = None
        self._forgotten: weakref.finalize[..., WorkflowHold] | None = None
        self.report: workflows_pb2.CloseResponse | None = None
        """Set by the close: one `LeaseEnd` a credential; None when nobody told. `summary` says it in words."""

    @property
    def opened(self) -> workflows_pb2.OpenResponse:
        """The sidecar's answer. Raises RuntimeError outside the block."""
        if self._opened is None:
            raise RuntimeError("the workflow is not open")
        return self._opened

    @property
    def id(self) -> str:
        """The workflow's public id."""
        return self.opened.workflow.id

    @property
    def handle(self) -> str:
        """The WorkflowHandle: a secret of this workflow; send it as x-spanlock-workflow or in a proxy URL."""
        return self.opened.handle

    @property
    def summary(self) -> str:
        """What died with the workflow and what did not, in one line: the words with which `spanlock exec` ends."""
        if self._opened is not None:
            return "still open"
        return summary(self.report) if self._was_closed else "not opened"

    @property
    def proxy_url(self) -> str:
        """The workflow's own listener."""
        return self.opened.proxy_url

    @property
    def proxies(self) -> dict[str, str]:
        """For each call of `requests` by itself: `get(url, proxies=work.proxies, verify=…)`; for a session, `configure`."""
        return {"http": self.proxy_url, "https": self.proxy_url}

    @property
    def ca_pem(self) -> str:
        """The CA of intercepted connections, to trust beside others."""
        return self.opened.ca_pem

    def ssl_context(self) -> ssl.SSLContext:
        """Trusts the system's roots and the sidecar: for httpx (`verify=`), aiohttp (`ssl=`), urllib (`context=`).

        Given with `proxy=work.proxy_url`, httpx and aiohttp prefer both to the environment.
        """
        return trust.ssl_context(self.ca_pem)

    def write_bundle(self, directory: str | Path) -> str:
        """The same as a file in `directory`, for what takes a file, as `requests`' `verify` does."""
        return str(trust.write_bundle(Path(directory), self.ca_pem))

    def configure(self, session: Session) -> None:
        """A session of `requests` calls within this workflow from now on; it is of no use after the block.

        Setting its `proxies` and `verify` is not enough: while it trusts the environment, HTTPS_PROXY, NO_PROXY and
        REQUESTS_CA_BUNDLE win, and under `spanlock exec` those lead to the command's own workflow.
        """
        if not all(hasattr(session, name) for name in ("trust_env", "proxies", "verify")):
            raise TypeError(
                "configure() is for a session of requests; for httpx: Client(proxy=work.proxy_url, "
                "verify=work.ssl_context()); for aiohttp: get(url, proxy=work.proxy_url, ssl=work.ssl_context())"
            )
        if self._bundle is None:
            self._bundle = trust.OwnBundle(self.ca_pem)
        session.trust_env, session.proxies, session.verify = False, self.proxies, str(self._bundle.path)

    def __repr__(self) -> str:
        return f"WorkflowHold({self._opened.workflow.id if self._opened else 'not open'})"

    def open(self) -> "WorkflowHold":
        """Opens; after a close, a new workflow. Raises `SpanlockUnavailable`, or RuntimeError when it is open already.

        The sidecar's own no is the kind `SpanlockRefused`.
        """
        if self._stream is not None:
            raise RuntimeError("the workflow is open already; workflow() gives another")
        socket = sockets.path_of(self._socket) if self._socket else _only_socket()
        stream = self._stream = HoldStream(socket, self._request)
        try:
            self._opened = stream.opened(_OPEN_SECONDS)
        except (grpc.RpcError, StopIteration) as error:
            raise _failure(error, f"{socket}: {_why(error)}") from None
        finally:
            if self._opened is None:
                self._stream = None
                stream.end()
        self.report = None
        self._forgotten = weakref.finalize(self, _forgotten, stream, self.id)
        self._forgotten.atexit = False  # the connection ends with the process, and so does the workflow
        return self

    def _open_stream(self) -> HoldStream:
        if self._stream is None:
            raise RuntimeError("the workflow is not open")
        return self._stream

    def renew(self) -> None:
        """Pushes the idle time back. Raises RuntimeError outside the block."""
        self._open_stream().send(workflows_pb2.HoldRequest())

    def exchange(
        self, tool: str, scope: tuple[str, ...] = (), token_type: str = ""
    ) -> token_exchange_pb2.ExchangeResponse:
        """A CredentialHandle for `tool`, or its real token where export is allowed. Raises `SpanlockUnavailable`."""
        request = token_exchange_pb2.ExchangeRequest(
            workflow_id=self.id, tool=tool, scope=scope, requested_token_type=token_type
        )
        try:
            stub = token_exchange_pb2_grpc.TokenExchangeStub(self._open_stream().channel)  # type: ignore[no-untyped-call]
            response: token_exchange_pb2.ExchangeResponse = stub.Exchange(request, timeout=_CALL_SECONDS)
        except grpc.RpcError as error:
            raise _failure(error, str(error.details())) from None
        return response

    def close(self) -> workflows_pb2.CloseResponse | None:
        """Ends the workflow; the report, or None when the sidecar is gone or does not answer within 30 seconds.

        In a forked child of the process that opened it nothing happens: the work is the parent's, and so is the connection.
        """
        if self._opened is None or self._open_stream().is_inherited:
            return self.report
        stream, self._stream = self._stream, None
        if stream is None:  # another thread is closing it
            return self.report
        if self._forgotten is not None:
            self._forgotten.detach()
        try:
            self.report = stream.closed(_CALL_SECONDS)
        finally:
            stream.end()
            self._opened, self._was_closed = None, True
            self._remove_bundle()
        return self.report

    def _remove_bundle(self) -> None:
        if self._bundle is not None:
            self._bundle.remove()
            self._bundle = None

    def __enter__(self) -> "WorkflowHold":
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> "WorkflowHold":
        executor = ThreadPoolExecutor(1, "spanlock open")
        opening = executor.submit(self.open)
        executor.shutdown(wait=False)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(self._close_unwanted)
            raise

    def _close_unwanted(self, opening: Future["WorkflowHold"]) -> None:
        """A thread cannot be cancelled: what it opens after all, for nobody, is closed as soon as it is open."""
        if not opening.cancelled() and opening.exception() is None:
            threading.Thread(target=self.close, name="spanlock close").start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


def _forgotten(stream: HoldStream, workflow_id: str) -> None:
    """What a hold leaves to be done that is collected without having been closed."""
    if not stream.is_inherited:
        stream.let_go()
        warnings.warn(f"unclosed workflow {workflow_id}", ResourceWarning, stacklevel=2)


def _only_socket() -> Path:
    """Raises `SpanlockUnavailable` when it cannot be known which socket is this agent's."""
    found = sockets.candidates()
    if len(found) == 1:
        return found[0]
    where = sockets.run_dir() / "agents"
    if found:
        names = ", ".join(path.parent.name for path in found)
        raise SpanlockUnavailable(
            f"several agents have a socket in {where} ({names}); set SPANLOCK_SOCKET to this one's"
        )
    raise SpanlockUnavailable(
        f"no agent's socket in {where}; is the sidecar running (`spanlock run`)? Set SPANLOCK_SOCKET or SPANLOCK_RUN_DIR"
    )


def _failure(error: Exception, text: str) -> SpanlockUnavailable:
    metadata = error.trailing_metadata() if isinstance(error, grpc.RpcError) else None
    reason = next((str(item.value) for item in metadata or () if item.key == "x-spanlock-reason"), None)
    return SpanlockUnavailable(text) if reason is None else SpanlockRefused(text, reason)


def _why(error: Exception) -> str:
    if not isinstance(error, grpc.RpcError):
        return "the sidecar ended the stream; is it shutting down?"
    if error.code() is grpc.StatusCode.CANCELLED:
        return f"no answer within {_OPEN_SECONDS:g} s; the sidecar hangs"
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return f"{error.details()}; is the sidecar running, and is SPANLOCK_SOCKET this agent's socket?"
    return str(error.details())


def workflow(
    name: str, *, socket: str | Path | None = None, trace_id: str = "", root_span_id: str = "", subject_token: str = ""
) -> WorkflowHold:
    """A workflow for one piece of work: use it in a `with` or `async with` block.

    `socket`: the agent's socket, as a path or as gRPC names it (unix:PATH); default SPANLOCK_SOCKET, else the only one under
    SPANLOCK_RUN_DIR (/run/spanlock), looked for when the block begins. `trace_id` (32 hex digits) lets calls bind by
    traceparent, and `root_span_id` names the span whose end in OTLP closes. `subject_token`: a user's token to exchange on
    behalf of.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: text, not {type(name).__name__}")
    shown = "".join(c if c.isprintable() else "?" for c in name[:128])  # it is a label: no reason to fail the work
    request = workflows_pb2.OpenRequest(
        name=shown, trace_id=trace_id, root_span_id=root_span_id, subject_token=subject_token, listener=True
    )
    return WorkflowHold(socket, request)
