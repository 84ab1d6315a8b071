"""Runs a command inside a workflow of its own: its calls carry credentials that it never sees, and all of them die when it
ends. With -c FILE a sidecar is embedded when none runs. Exit status: the command's own; 125 Spanlock failed, 126 not
executable, 127 not found."""

import json
import os
import queue
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.cli import environment
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from sidecar.wire.spanlock.v1 import workflows_pb2_grpc

_Answer = TypeVar("_Answer")
_FAILED = 125
_START_SECONDS = 15.0
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Between fork and exec of a process with gRPC's threads nothing may run, so a fresh interpreter asks for the parent-death
# signal (prctl(2) PR_SET_PDEATHSIG, kept over exec) and becomes the command: if we are killed, CMD is told by SIGTERM.
_SHIM = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(125)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except FileNotFoundError:
    print(f"spanlock: {sys.argv[2]}: not found", file=sys.stderr)
    sys.exit(127)
except OSError as error:
    print(f"spanlock: {sys.argv[2]}: {error.strerror}", file=sys.stderr)
    sys.exit(126)
"""


class _Failure(Exception):
    """Ours, not the command's; the text is for the user."""


class _Held:
    """A workflow held open by a stream: if this process dies, the stream ends and the workflow closes."""

    def __init__(self, socket: Path, name: str, trace_id: str) -> None:
        self._requests: queue.SimpleQueue[pb.HoldRequest | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        opening = pb.OpenRequest(name=name, trace_id=trace_id, listener=True)
        self._requests.put(pb.HoldRequest(open=opening))
        self._stream: Any = workflows_pb2_grpc.WorkflowsStub(self._channel).Hold(self._feed())  # type: ignore[no-untyped-call]
        try:
            self.opened: pb.OpenResponse = next(self._stream).opened
        except grpc.RpcError as error:
            raise _Failure(f"the sidecar on {socket} did not open a workflow: {error.details()}") from None

    def _feed(self) -> Iterator[pb.HoldRequest]:
        while (request := self._requests.get()) is not None:
            yield request

    def close(self) -> pb.CloseResponse | None:
        """The report; None when the sidecar is gone."""
        self._requests.put(pb.HoldRequest(close=True))
        try:
            for response in self._stream:
                if response.HasField("closed"):
                    closed: pb.CloseResponse = response.closed
                    return closed
        except grpc.RpcError:
            return None
        finally:
            self._requests.put(None)
            self._channel.close()
        return None


def command(
    cmd: list[str] = typer.Argument(..., metavar="-- CMD…", help="The command and its arguments."),
    config: str = typer.Option(None, "-c", "--config", help="Embed a sidecar with this configuration when none runs."),
    agent: str = typer.Option(None, "--agent", help="Which declared agent the command is. Default: the only one."),
    name: str = typer.Option("", "--name", help="The workflow's name. Default: the command's."),
    receipt: str = typer.Option(None, "--receipt", help="Writes how each credential ended to this file, as JSON."),
) -> None:
    """Runs a command inside a workflow of its own; everything it was given dies when it ends."""
    try:
        status = _exec(cmd, config, agent, name, receipt)
    except _Failure as failure:
        print(f"spanlock: {failure}", file=sys.stderr)
        status = _FAILED
    raise typer.Exit(status)


def _exec(cmd: list[str], config: str | None, agent: str | None, name: str, receipt: str | None) -> int:
    sidecar: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryDirectory(prefix="spanlock-exec-") as private:
        try:
            socket = _agent_socket(agent)
            if socket is None and config is not None:
                sidecar, socket = _embed(config, agent, Path(private))
            if socket is None:
                raise _Failure("no sidecar runs here; start one with `spanlock run`, or embed one with -c FILE")
            _await_identity(socket)
            trace_id = secrets.token_hex(16)
            held = _Held(socket, name or Path(cmd[0]).name, trace_id)
            bundle = environment.write_bundle(Path(private), held.opened.ca_pem)
            variables = environment.build(
                os.environ,
                held.opened.proxy_url,
                bundle,
                f"00-{trace_id}-{secrets.token_hex(8)}-01",
                held.opened.otlp_endpoint,
            )
            variables["SPANLOCK_SOCKET"] = str(socket)
            variables["SPANLOCK_WORKFLOW"] = held.opened.workflow.id
            status = _run(cmd, variables)
            report = held.close()
            _tell(report, receipt)
            return status
        finally:
            if sidecar is not None:
                sidecar.terminate()
                sidecar.wait()


def _agent_socket(agent: str | None) -> Path | None:
    """The socket of a sidecar that runs: SPANLOCK_SOCKET, or the (only) agent's in the run directory."""
    if (named := os.environ.get("SPANLOCK_SOCKET")) and agent is None:
        return Path(named)
    return _socket_in(Path(os.environ.get("SPANLOCK_RUN_DIR", "/run/spanlock")), agent)


def _socket_in(run_dir: Path, agent: str | None) -> Path | None:
    found = sorted((run_dir / "agents").glob(f"{agent or '*'}/agent.sock"))
    if len(found) > 1:
        raise _Failure(
            f"several agents are declared; say which with --agent ({', '.join(p.parent.name for p in found)})"
        )
    return found[0] if found else None


def _embed(config: str, agent: str | None, private: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """A sidecar of our own, with a private run directory; its log goes where ours goes."""
    run_dir = private / "run"
    words = [sys.executable, "-m", "sidecar", "run", "-c", config, "--embedded-in", str(run_dir)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)

    def listening() -> Path | None:
        if process.poll() is not None:
            raise _Failure("the embedded sidecar did not start; its messages are above")
        return _socket_in(run_dir, agent)

    socket = _await(listening)
    if socket is None:
        process.terminate()
        raise _Failure(f"the embedded sidecar was not up after {_START_SECONDS:g} s; `spanlock check -c {config}`")
    return process, socket


def _await_identity(socket: Path) -> None:
    """A command that started before its identity had come would be refused its first calls."""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            request, serving = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse.SERVING
            if not _await(lambda: check(request).status == serving):
                raise _Failure(f"no identity for this agent within {_START_SECONDS:g} s; `spanlock status` says why")
        except grpc.RpcError as error:
            raise _Failure(f"no sidecar answers on {socket}: {error.details()}") from None


def _await(ask: Callable[[], _Answer]) -> _Answer:
    """What another process says once it has something to say; at the deadline, what it said last."""
    deadline = time.monotonic() + _START_SECONDS  # noqa: TID251 - a process of its own, waiting for another
    while not (answer := ask()) and time.monotonic() < deadline:  # noqa: TID251
        time.sleep(0.02)
    return answer


def _run(cmd: list[str], variables: dict[str, str]) -> int:
    """The command in a process group of its own, in the foreground of a terminal if there is one."""
    shim = [sys.executable, "-I", "-S", "-c", _SHIM, str(os.getpid()), *cmd]
    child = subprocess.Popen(shim, env=variables, process_group=0)
    with _Foreground(child.pid):
        for number in (*_FORWARDED, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, lambda received, _: _signal_group(child.pid, received))
        status = child.wait()
    return 128 - status if status < 0 else status


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


class _Foreground:
    """Gives the terminal to the child's group, and takes it back."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._terminal = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else None

    def __enter__(self) -> None:
        if self._terminal is not None:
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            os.tcsetpgrp(self._terminal, self._group)

    def __exit__(self, *_: object) -> None:
        if self._terminal is not None:
            os.tcsetpgrp(self._terminal, os.getpgrp())


def _tell(report: pb.CloseResponse | None, receipt: str | None) -> None:
    """The last line on standard error: what died, and what did not."""
    if report is None:
        print("spanlock: the sidecar went away; what it held ends with its own expiry", file=sys.stderr)
        return
    print(f"spanlock: {summary(report)}", file=sys.stderr)
    if receipt is not None:
        ends = [
            {
                "lease": end.lease_id,
                "tool": end.tool,
                "at_issuer": end.at_issuer,
                "residual_seconds": end.residual.seconds,
                "token_check": end.token_check,
                "uses": end.uses,
            }
            for end in report.leases
        ]
        document = {
            "workflow": report.workflow_id,
            "reason": report.reason,
            "close_to_dropped_ms": report.dropped_after.ToNanoseconds() / 1e6,
            "close_to_revoked_ms": report.revoked_after.ToNanoseconds() / 1e6,
            "credentials": ends,
        }
        Path(receipt).write_text(json.dumps(document, indent=1) + "\n")


def summary(report: pb.CloseResponse) -> str:
    """`3 credentials: 2 confirmed dead, 1 residual at most 240 s (reports: offline); closed in 38 ms`."""
    if not report.leases:
        return "no credentials were needed"
    counts: dict[str, int] = {}
    for end in report.leases:
        word = (
            "confirmed dead"
            if end.at_issuer == "confirmed" and not end.residual.ToNanoseconds()
            else str(end.at_issuer)
        )
        counts[word] = counts.get(word, 0) + 1
    parts = [f"{count} {word}" for word, count in counts.items()]
    residual = [e for e in report.leases if e.residual.ToNanoseconds()]
    if residual:
        tools = ", ".join(f"{e.tool}: {e.token_check}, at most {e.residual.seconds} s" for e in residual)
        parts.append(f"residual at the tool ({tools})")
    milliseconds = report.revoked_after.ToNanoseconds() / 1e6
    return f"{len(report.leases)} credentials: {', '.join(parts)}; revoked in {milliseconds:.0f} ms"
