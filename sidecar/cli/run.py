"""Runs the sidecar until SIGTERM: the proxy, the agents' sockets, the operator's socket. SIGHUP reloads."""

import asyncio
import ctypes
import gc
import os
import resource
import signal
import sys
from pathlib import Path

import typer
import uvloop

from sidecar.app import App, world
from sidecar.config.advice import warnings
from sidecar.config.load import embedded, find_config, load
from sidecar.config.schema import Settings
from sidecar.errors import ConfigError
from sidecar.policy.load import load_policy
from sidecar.telemetry.logging import configure, logger

_PR_SET_DUMPABLE = 4


def command(
    config: str | None = typer.Option(None, "-c", "--config", help="spanlock.yaml."),
    embedded_in: str | None = typer.Option(
        None, "--embedded-in", hidden=True, help="For `exec -c`: where the sockets go."
    ),
) -> None:
    if embedded_in is not None:
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it logs to a terminal whose foreground is the command's
    try:
        path = find_config(config)
        settings = load(path) if embedded_in is None else embedded(load(path), embedded_in)
        configure(settings.telemetry.log_level, settings.telemetry.log_format)
        _harden()
        if embedded_in is None:
            for line in warnings(settings, load_policy(settings.policy)):
                logger("config").warning("allowed", detail=line)
        status = uvloop.run(_serve(settings, path))
    except ConfigError as error:
        print(f"spanlock: {error.detail}", file=sys.stderr)
        raise typer.Exit(2) from None
    raise typer.Exit(status)


def _harden() -> None:
    """No core dump and no ptrace by the same uid: what is in memory stays there (prctl(2) PR_SET_DUMPABLE). Files enough."""
    os.environ.pop("SSLKEYLOGFILE", None)  # ssl's default contexts would write the keys of our connections to it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # each call in flight needs two, and a shell gives 1,024
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _settle_garbage() -> None:
    """What start-up left lives as long as we do: the collector need never look at it again, nor so often at what comes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


async def _serve(settings: Settings, path: Path) -> int:
    """Runs until SIGTERM or SIGINT; SIGHUP reloads. Returns the exit status: 0, or 1 when something was not revoked."""
    app = App(settings, path, world())
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: app.background.spawn(app.reload(), "reload"))
    await app.start()
    _settle_garbage()
    await stopping.wait()
    return 1 if await app.stop() else 0
