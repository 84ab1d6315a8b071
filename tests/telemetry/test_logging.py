"""What a log line may hold: no local variable of a traceback, no field whose name speaks of a secret."""

import contextlib
import json
import os
import sys

import pytest

from sidecar.telemetry import logging


def _fail() -> None:
    held = "sesame-" + "opens"
    raise ValueError(f"nothing about it but its length: {len(held)}")


@pytest.mark.parametrize("fmt", ["json", "console"])
def test_no_locals_and_no_named_secrets(fmt: str, capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("info", fmt)
    log = logging.logger("test")
    try:
        _fail()
    except ValueError as error:
        log.error("failed", exc_info=error, access_token="sesame-opens", Authorization="sesame-opens")
    written = capsys.readouterr().err
    assert "sesame-opens" not in written and written.count("****") == 2
    assert "ValueError" in written and "_fail" in written, "where it failed is told"
    if fmt == "json":
        assert json.loads(written)["exception"][0]["exc_type"] == "ValueError"


def test_the_level_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("warning", "json")
    logging.logger("test").info("unseen")
    assert not capsys.readouterr().err


def test_a_log_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`spanlock run 2>&1 | head` leaves a pipe without a reader."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        logging.configure("info", "json")
        logging.logger("test").error("into_the_void")
        monkeypatch.undo()
        with contextlib.suppress(BrokenPipeError):
            broken.close()
    logging.logger("test").error("and_when_it_is_closed")
