"""`spanlock`: finds the verb and loads only its file, so that the command starts fast."""

import ast
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from sidecar import __version__

_UsageError: Any = typer.BadParameter.__base__  # typer does not name it

_VERBS = ("demo", "run", "exec", "check", "status", "workflows", "leases", "revoke", "explain")


class _Exec(TyperCommand):
    """`exec` passes its command's status on, so what is wrong with its own words is 125 as its other failures are, not 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except _UsageError as error:
            error.exit_code = 125
            raise


class _Verbs(TyperGroup):
    """Each verb is a module of this package, and its `command` is what runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _VERBS:
            return None
        if cmd_name == "exec" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it handles a Ctrl-C itself: 130, not 1 and "Aborted!"
        module = importlib.import_module(f"sidecar.cli.{cmd_name}")
        app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
        cls = _Exec if cmd_name == "exec" else TyperCommand
        settings = {"ignore_unknown_options": True, "allow_interspersed_args": False} if cls is _Exec else {}
        app.command(cmd_name, cls=cls, help=module.__doc__, context_settings=settings)(module.command)
        return typer.main.get_command(app)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(verb, _sentence(verb)) for verb in _VERBS])


def _sentence(verb: str) -> str:
    """What the verb is for: the first sentence of its file, which is read and not run, so that the list is there at once."""
    source = Path(__file__).with_name(f"{verb}.py").read_text(encoding="utf-8")
    words = (ast.get_docstring(ast.parse(source)) or "").split()
    return " ".join(words).partition(". ")[0].removesuffix(".") + "."


app = typer.Typer(
    cls=_Verbs, add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"spanlock {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Prints the version.", callback=_print_version, is_eager=True
    ),
) -> None:
    """Credentials for AI agents that live exactly as long as the work they are for."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script."""
    # Its fork handlers only log here: the children that we start exec at once.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    words = list(arguments) if arguments is not None else sys.argv[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no `…` is shown a `?`
    try:
        try:
            app(args=words, prog_name="spanlock")
        finally:
            if sys.stdout is not None:  # as it is when it was closed
                sys.stdout.flush()
    except OSError as error:
        if words[:1] == ["run"]:
            raise  # a daemon's bug: where it happened counts
        print(f"spanlock: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer has no place to go
        sys.exit(125 if words[:1] == ["exec"] else 1)
