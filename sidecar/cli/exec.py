"""Runs a command inside a workflow of its own: its calls carry credentials that it never sees, and all of them die when it
ends. With -c FILE a sidecar is embedded when none runs. Exit status: the command's own; 125 Spanlock failed, 126 not
executable, 127 not found."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, TypeVar

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.cli import environment
from sidecar.cli.residual import residual, seconds
from sidecar.client import sockets
from sidecar.client.workflow import SpanlockUnavailable, WorkflowHold, workflow
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb

_Answer = TypeVar("_Answer")
_FAILED = 125
_START_SECONDS = 15.0
_RECEIPT = (
    "Writes how each credential ended to this file, as JSON. `residual_seconds` is rounded up; null: no end. When the sidecar "
    "went away, `reason` is unknown and `credentials` null."
)
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


def command(
    cmd: list[str] = typer.Argument(..., metavar="-- CMD…", help="The command and its arguments."),
    config: str | None = typer.Option(
        None, "-c", "--config", help="Embed a sidecar with this configuration when none runs."
    ),
    agent: str | None = typer.Option(
        None, "--agent", help="Which declared agent the command is. Default: the only one."
    ),
    name: str = typer.Option("", "--name", help="The workflow's name. Default: the command's."),
    receipt: str | None = typer.Option(None, "--receipt", help=_RECEIPT),
) -> None:
    try:
        status = _exec(cmd, config, agent, name, receipt)
    except _Failure as failure:
        print(f"spanlock: {failure}", file=sys.stderr)
        status = _FAILED
    raise typer.Exit(status)


def _exec(cmd: list[str], config: str | None, agent: str | None, name: str, receipt: str | None) -> int:
    sidecar: subprocess.Popen[bytes] | None = None
    with tempfile.TemporaryDirectory(prefix="spanlock-exec-") as private, _receipt(receipt) as writing:
        try:
            socket = _only(sockets.candidates(agent))
            if socket is None and config is not None:
                sidecar, socket = _embed(config, agent, Path(private))
            if socket is None:
                raise _Failure("no sidecar runs here; start one with `spanlock run`, or embed one with -c FILE")
            _await_identity(socket)
            trace_id = secrets.token_hex(16)
            held = _hold(socket, name or Path(cmd[0]).name, trace_id)
            variables = environment.build(
                os.environ,
                held.proxy_url,
                Path(held.write_bundle(private)),
                f"00-{trace_id}-{secrets.token_hex(8)}-01",
                held.opened.otlp_endpoint,
            )
            variables["SPANLOCK_SOCKET"] = str(socket)
            variables["SPANLOCK_WORKFLOW"] = held.id
            status = _run(cmd, variables)
            _tell(variables["SPANLOCK_WORKFLOW"], held.close(), writing)
            return status
        finally:
            if sidecar is not None:
                sidecar.terminate()
                sidecar.wait()


def _receipt(path: str | None) -> AbstractContextManager[IO[str] | None]:
    """The receipt's file, opened before anything runs: one that cannot be written is said while it can still be mended."""
    if path is None:
        return nullcontext()
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise _Failure(f"--receipt {path}: {error.strerror}") from None


def _hold(socket: Path, name: str, trace_id: str) -> WorkflowHold:
    """Held open by a stream: if this process dies, the stream ends and the workflow closes."""
    try:
        return workflow(name, socket=str(socket), trace_id=trace_id).open()
    except SpanlockUnavailable as error:
        raise _Failure(f"the sidecar did not open a workflow: {error}") from None


def _only(found: list[Path]) -> Path | None:
    """The socket of a sidecar that runs; None when none does."""
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
        return _only(sockets.below(run_dir, agent))

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
            if not _await(lambda: check(request, timeout=_START_SECONDS).status == serving):
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
    with _Foreground(child.pid) as terminal:
        for number in (*_FORWARDED, signal.SIGINT, signal.SIGQUIT):
            signal.signal(number, lambda received, _: _signal_group(child.pid, received))
        status = _wait(child, terminal)
    return 128 - status if status < 0 else status


def _wait(child: subprocess.Popen[bytes], terminal: "_Foreground") -> int:
    """The command's exit status. Stopped by Ctrl-Z, it takes us along, so that the shell gets its terminal; `fg` goes on."""
    while True:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode
        if terminal.is_ours:
            terminal.take_back()
            os.kill(os.getpid(), signal.SIGSTOP)
            terminal.give()
            _signal_group(child.pid, signal.SIGCONT)


def _signal_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


class _Foreground:
    """Gives the terminal to the child's group, and takes it back. Ours to give only while we are in its foreground."""

    def __init__(self, group: int) -> None:
        self._group = group
        self._terminal = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else -1
        self.is_ours = self._terminal >= 0 and os.tcgetpgrp(self._terminal) == os.getpgrp()

    def give(self) -> None:
        """The child's group is in the foreground from now on, if we are in it (`bg` leaves us out)."""
        if self.is_ours and os.tcgetpgrp(self._terminal) == os.getpgrp():
            os.tcsetpgrp(self._terminal, self._group)

    def take_back(self) -> None:
        """We are in the foreground again, unless the shell has it."""
        if self.is_ours and os.tcgetpgrp(self._terminal) == self._group:
            os.tcsetpgrp(self._terminal, os.getpgrp())

    def __enter__(self) -> "_Foreground":
        if self.is_ours:
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        self.give()
        return self

    def __exit__(self, *_: object) -> None:
        self.take_back()


def _tell(workflow_id: str, report: pb.CloseResponse | None, receipt: IO[str] | None) -> None:
    """The last line on standard error, and the receipt: what died, and what did not."""
    gone = "the sidecar went away; what it held ends with its own expiry"
    print(f"spanlock: {gone if report is None else summary(report)}", file=sys.stderr)
    if receipt is not None:
        receipt.write(json.dumps(_unknown(workflow_id) if report is None else _document(report), indent=1) + "\n")


def _document(report: pb.CloseResponse) -> dict[str, Any]:
    """The receipt."""
    ends = [
        {
            "lease": end.lease_id,
            "tool": end.tool,
            "at_issuer": end.at_issuer,
            "residual_seconds": seconds(end),
            "token_check": end.token_check,
            "uses": end.uses,
        }
        for end in report.leases
    ]
    return {
        "workflow": report.workflow_id,
        "reason": report.reason,
        "close_to_dropped_ms": report.dropped_after.ToNanoseconds() / 1e6,
        "close_to_revoked_ms": report.revoked_after.ToNanoseconds() / 1e6,
        "credentials": ends,
    }


def _unknown(workflow_id: str) -> dict[str, Any]:
    """The receipt of a workflow whose end nobody told us: the same fields, and not a word that is not known."""
    times = {"close_to_dropped_ms": None, "close_to_revoked_ms": None}
    return {"workflow": workflow_id, "reason": "unknown", **times, "credentials": None}


def summary(report: pb.CloseResponse) -> str:
    """What died and what did not, in one line; for example:

    2 credentials: 1 confirmed dead, 1 confirmed, residual at the tool (reports: offline, at most 241 s); revoked in 38 ms
    """
    if not report.leases:
        return "no credentials were needed"
    counts: dict[str, int] = {}
    for end in report.leases:
        word = "confirmed dead" if end.at_issuer == "confirmed" and seconds(end) == 0 else str(end.at_issuer)
        counts[word] = counts.get(word, 0) + 1
    parts = [f"{count} {word}" for word, count in counts.items()]
    living = [end for end in report.leases if seconds(end) != 0]
    if living:
        tools = ", ".join(f"{end.tool}: {end.token_check}, {residual(end)}" for end in living)
        parts.append(f"residual at the tool ({tools})")
    milliseconds = report.revoked_after.ToNanoseconds() / 1e6
    number = len(report.leases)
    return f"{number} credential{'s' * (number != 1)}: {', '.join(parts)}; revoked in {milliseconds:.0f} ms"
