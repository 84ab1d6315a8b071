"""Runs the sidecar until SIGTERM: the proxy, the agents' sockets, the operator's socket. SIGHUP reloads."""

import sys

import typer
import uvloop

from sidecar import app
from sidecar.config.load import embedded, find_config, load
from sidecar.errors import ConfigError


def command(
    config: str = typer.Option(None, "-c", "--config", help="spanlock.yaml."),
    embedded_in: str = typer.Option(None, "--embedded-in", hidden=True, help="For `exec -c`: where the sockets go."),
) -> None:
    """Runs the sidecar until SIGTERM: the proxy, the agents' sockets, the operator's socket. SIGHUP reloads."""
    try:
        path = find_config(config)
        settings = load(path) if embedded_in is None else embedded(load(path), embedded_in)
        app.configure_logging(settings)
        app.harden()
        status = uvloop.run(app.serve(settings, path))
    except ConfigError as error:
        print(f"spanlock: {error.detail}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(status)
