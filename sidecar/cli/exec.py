"""Runs a command inside a workflow of its own: its calls carry credentials that it never sees, and all of them die when it
ends. With -c FILE a sidecar is embedded when none runs, and ends with it. Exit status: the command's own, 128+n when signal n
killed it, or came before it ran; 125 Spanlock failed, 126 not executable, 127 not found."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sidecar.cli import environment, shim, stdio
from sidecar.cli.embedded import Configuration, Embedded
from sidecar.cli.signals import Interrupted, Signals
from sidecar.cli.terminal import Terminal, wait
from sidecar.client import sockets
from sidecar.client.summary import seconds, summary
from sidecar.client.workflow import SpanlockUnavailable, WorkflowHold, workflow
from sidecar.errors import ConfigError
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb

_Answer = TypeVar("_Answer")
_FAILED = 125
_START_SECONDS = 15.0
_RECEIPT = (
    "Writes how each credential ended to this file, as JSON. `residual_seconds` is rounded up; null: no end. When the sidecar "
    "went away, `reason` is unknown and `credentials` null. `refused`: how many calls were, by reason."
)


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
    stdio.settle()
    try:
        status = _exec(cmd, config, agent, name, receipt)
    except _Failure as failure:
        print(f"spanlock: {failure}", file=sys.stderr)
        status = _FAILED
    except Interrupted as interrupted:
        print(f"spanlock: {interrupted} before the command ran", file=sys.stderr)
        status = interrupted.status
    raise typer.Exit(status)


def _exec(cmd: list[str], config: str | None, agent: str | None, name: str, receipt: str | None) -> int:
    signals = Signals()
    configuration = _configuration(config)
    inherited = dict(os.environ) if configuration is None else configuration.without_secrets(os.environ)
    with tempfile.TemporaryDirectory(prefix="spanlock-exec-") as directory, _receipt(receipt) as writing:
        work = _Work(cmd, name or Path(cmd[0]).name, inherited, Path(directory), signals)
        running = _only(sockets.candidates(agent))
        if configuration is not None and (running is None or not _lives(running)):
            ended = _with_a_sidecar_of_its_own(work, configuration, agent)
        elif running is None:
            raise _Failure("no sidecar runs here; start one with `spanlock run`, or embed one with -c FILE")
        else:
            ended = work.run(running)
        _tell(ended.workflow_id, ended.report, writing)
        return ended.status


def _configuration(path: str | None) -> Configuration | None:
    try:
        return Configuration(path) if path is not None else None
    except ConfigError as error:
        raise _Failure(error.detail) from None


def _with_a_sidecar_of_its_own(work: "_Work", configuration: Configuration, agent: str | None) -> "_Ended":
    """It ends before the closing line, which is the last: what it says at its end may be what it could not revoke."""
    sidecar = Embedded(configuration, work.private / "run")
    report = None
    try:
        with work.signals.waiting():
            running = _listening(sidecar, agent, configuration.path)
        ended = work.run(running)
        report = ended.report
    finally:
        problem = sidecar.end()
        if report is not None and not problem and any(end.at_issuer == "failed" for end in report.leases):
            problem = "what had failed at the close was revoked or expired before the embedded sidecar ended"
        if problem:
            print(f"spanlock: {problem}", file=sys.stderr)
    return ended


class _Ended(NamedTuple):
    status: int
    workflow_id: str
    report: pb.CloseResponse | None
    """How each credential ended; None when the sidecar went away."""


@dataclass(frozen=True)
class _Work:
    """The command, and what it gets."""

    command: list[str]
    name: str
    inherited: dict[str, str]
    private: Path
    signals: Signals

    def run(self, running: Path) -> _Ended:
        """Inside a workflow of the sidecar on the socket `running`, which closes however the command ends."""
        trace_id = secrets.token_hex(16)
        held = workflow(self.name, socket=str(running), trace_id=trace_id)
        with self.signals.waiting():
            _await_identity(running)
        try:
            with self.signals.waiting():
                _open(held)
            variables = environment.build(
                self.inherited,
                held.proxy_url,
                Path(held.write_bundle(self.private)),
                f"00-{trace_id}-{secrets.token_hex(8)}-01",
                held.opened.otlp_endpoint,
            )
            variables["SPANLOCK_SOCKET"] = str(running)
            variables["SPANLOCK_WORKFLOW"] = workflow_id = held.id
            status = _run(self.command, variables, self.signals)
        finally:
            report = held.close()
        return _Ended(status, workflow_id, report)


def _receipt(path: str | None) -> AbstractContextManager[IO[str] | None]:
    """The receipt's file, opened before anything runs: one that cannot be written is said while it can still be mended."""
    if path is None:
        return nullcontext()
    try:
        return Path(path).open("w", encoding="utf-8")
    except OSError as error:
        raise _Failure(f"--receipt {path}: {error.strerror}") from None


def _open(held: WorkflowHold) -> None:
    """Held open by a stream: if this process dies, the stream ends and the workflow closes."""
    try:
        held.open()
    except SpanlockUnavailable as error:
        raise _Failure(f"the sidecar did not open a workflow: {error}") from None


def _lives(path: Path) -> bool:
    """False for what a sidecar that was killed has left behind. What we may not ask lives, as far as we know."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_START_SECONDS)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def _only(found: list[Path]) -> Path | None:
    """The socket of a sidecar that runs; None when none does."""
    if len(found) > 1:
        raise _Failure(
            f"several agents are declared; say which with --agent ({', '.join(p.parent.name for p in found)})"
        )
    return found[0] if found else None


def _listening(sidecar: Embedded, agent: str | None, config: str) -> Path:
    """The agent's socket of the embedded sidecar; its log goes where ours goes."""

    def found() -> Path | None:
        if not sidecar.runs:
            raise _Failure("the embedded sidecar did not start; its messages are above")
        return _only(sockets.below(sidecar.run_dir, agent))

    path = _await(found)
    if path is None:
        raise _Failure(f"the embedded sidecar was not up after {_START_SECONDS:g} s; `spanlock check -c {config}`")
    return path


def _await_identity(path: Path) -> None:
    """A command that started before its identity had come would be refused its first calls."""
    with grpc.insecure_channel(f"unix:{path}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            request, serving = health_pb2.HealthCheckRequest(), health_pb2.HealthCheckResponse.SERVING
            if not _await(lambda: check(request, timeout=_START_SECONDS).status == serving):
                raise _Failure(f"no identity for this agent within {_START_SECONDS:g} s; `spanlock status` says why")
        except grpc.RpcError as error:
            raise _Failure(f"no sidecar answers on {path}: {error.details()}") from None


def _await(ask: Callable[[], _Answer]) -> _Answer:
    """What another process says once it has something to say; at the deadline, what it said last."""
    deadline = time.monotonic() + _START_SECONDS  # noqa: TID251 - a process of its own, waiting for another
    while not (answer := ask()) and time.monotonic() < deadline:  # noqa: TID251
        time.sleep(0.02)
    return answer


def _run(cmd: list[str], variables: dict[str, str], signals: Signals) -> int:
    """The command in a process group of its own, in the foreground of a terminal if there is one."""
    signals.check()
    child = subprocess.Popen(shim.words(cmd), env=variables, process_group=0)
    with signals.forwarded(child.pid), Terminal(child.pid) as terminal:
        return wait(child, terminal)


def _tell(workflow_id: str, report: pb.CloseResponse | None, receipt: IO[str] | None) -> None:
    """The last line on standard error, and the receipt: what died, and what did not."""
    print(f"spanlock: {summary(report)}", file=sys.stderr)
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
        "refused": dict(report.refused),
    }


def _unknown(workflow_id: str) -> dict[str, Any]:
    """The receipt of a workflow whose end nobody told us: the same fields, and not a word that is not known."""
    times = {"close_to_dropped_ms": None, "close_to_revoked_ms": None}
    return {"workflow": workflow_id, "reason": "unknown", **times, "credentials": None, "refused": None}
