"""The operator's side of the Admin service: one call, tables or JSON, and clear words when nobody answers."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from sidecar.config import strict_yaml
from sidecar.errors import ConfigError
from sidecar.wire.spanlock.v1 import admin_pb2_grpc

_Answer = TypeVar("_Answer")
SOCKET = typer.Option(None, "--socket", help="Operator socket. Default: operator/operator.sock in run_dir.")
CONFIG = typer.Option(
    None, "-c", "--config", help="spanlock.yaml, for its run_dir. Default: SPANLOCK_CONFIG, then SPANLOCK_RUN_DIR."
)
JSON = typer.Option(False, "--json", help="One JSON object.")


def call(socket: str | None, config: str | None, ask: Callable[[admin_pb2_grpc.AdminStub], _Answer]) -> _Answer:
    """Calls the Admin service. Exits 1 with one line when the daemon does not answer or refuses, 2 without a configuration."""
    try:
        path = Path(socket) if socket else _run_dir(config) / "operator/operator.sock"
    except ConfigError as error:
        print(f"spanlock: {error.detail}", file=sys.stderr)
        raise typer.Exit(2) from None
    with grpc.insecure_channel(f"unix:{path}") as channel:
        try:
            return ask(admin_pb2_grpc.AdminStub(channel))  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            match error.code():
                case grpc.StatusCode.UNAVAILABLE:
                    why = _why(path)
                case grpc.StatusCode.UNIMPLEMENTED:
                    why = f"{path} is an agent's socket; the operator's is operator/operator.sock in run_dir"
                case _:
                    why = str(error.details())
            print(f"spanlock: {why}", file=sys.stderr)
            raise typer.Exit(1) from None


def _run_dir(config: str | None) -> Path:
    """As the daemon finds it; of a configuration that is broken otherwise too, since that is when an operator asks."""
    file = strict_yaml.named(config)
    named = strict_yaml.run_dir(file) if file is not None else None
    return named or Path(os.environ.get("SPANLOCK_RUN_DIR") or "/run/spanlock")


def _why(path: Path) -> str:
    """Why nobody answers on `path`, and what to do."""
    try:
        os.stat(path)
        allowed = os.access(path, os.W_OK)
    except PermissionError:
        allowed = False
    except OSError:
        allowed = True
    if not allowed:
        return f"{path} is for the sidecar's own user; run this as that user, or as root"
    return f"no sidecar answers on {path}; start it with `spanlock run`, or name it: -c FILE, or SPANLOCK_RUN_DIR"


def as_json(message: Message) -> str:
    """The message as one line, every field present."""
    return json.dumps(as_dict(message))


def as_dict(message: Message) -> dict[str, Any]:
    """The message as JSON has it, every field present."""
    fields: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return fields


def table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns as wide as they must be."""
    cells = [list(titles), *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def when(stamp: Timestamp) -> str:
    """A timestamp for people; "-" when unset."""
    return stamp.ToDatetime().strftime("%Y-%m-%d %H:%M:%SZ") if stamp.seconds else "-"
