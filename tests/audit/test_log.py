"""The audit log when its sink is slow, full or gone: calls go on, what is lost is counted and said once."""

import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from sidecar.audit.log import AuditLog, encode
from sidecar.audit.sinks import FileSink, StdoutSink
from sidecar.model.audit import WorkflowRecord
from sidecar.telemetry import logging
from tests.fakes.clock import FakeClock


def record(number: int) -> WorkflowRecord:
    return WorkflowRecord(1.0, "opened", f"wf_{number}", "demo", "name \n\"}{", "", "", 0, 0, 0.0, 0.0)  # fmt: skip


def numbers(lines: bytes) -> list[int]:
    return [int(json.loads(line)["workflow"][3:]) for line in lines.splitlines()]


def test_records_are_whole_lines_in_order_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lost: list[int] = []
    log = AuditLog(FileSink(str(path)), FakeClock(), lost.append)
    for number in range(120):
        log.workflow(record(number))
    assert len(numbers(path.read_bytes())) >= 100, "written in batches as they come"
    log.close()
    assert numbers(path.read_bytes()) == list(range(120)) and not lost
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_full_disk_is_counted_and_said_once_until_it_works_again(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure("info", "json")
    lost: list[int] = []
    log = AuditLog(FileSink("/dev/full"), FakeClock(), lost.append)
    for number in range(100):
        log.workflow(record(number))
    assert sum(lost) == 100 and not log.healthy
    assert capsys.readouterr().err.count("audit_sink_failed") == 1
    log._sink = FileSink("/dev/null")
    log.workflow(record(100))
    log.flush()
    assert log.healthy


def test_a_standard_output_that_nobody_reads_holds_nothing_up() -> None:
    read, write = os.pipe()
    lost: list[int] = []
    log = AuditLog(StdoutSink(write), FakeClock(), lost.append)
    total = 0
    while not lost:
        for _ in range(50):
            log.workflow(record(total))
            total += 1
        assert total < 100_000, "what waits is bounded"
    assert not log.healthy
    seen = b""
    while len(seen.splitlines()) < total - sum(lost):
        seen += os.read(read, 1 << 20)
    assert numbers(seen) == list(range(total - sum(lost))), "what was taken comes whole and in order"
    log.workflow(record(total))
    log.close()
    assert numbers(os.read(read, 1 << 20)) == [total] and log.healthy
    os.close(read)
    os.close(write)


def test_a_standard_output_whose_reader_has_gone_is_said() -> None:
    read, write = os.pipe()
    os.close(read)
    lost: list[int] = []
    log = AuditLog(StdoutSink(write), FakeClock(), lost.append)
    tries = 0
    while log.healthy:
        log.workflow(record(tries))
        log.flush()
        tries += 1
        assert tries < 100_000
    assert sum(lost) >= 1
    log.close()
    os.close(write)


def test_a_record_that_is_no_json_stops_nothing(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lost: list[int] = []
    log = AuditLog(FileSink(str(path)), FakeClock(), lost.append)
    log.workflow(record(1)._replace(name="\ud800"))
    log.flush()
    assert lost == [1] and not log.healthy
    log.workflow(record(2))
    log.close()
    assert numbers(path.read_bytes()) == [2]


class Disk:
    """Stands for `os.write`: takes `room` bytes, then is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._write = os.write

    def write(self, descriptor: int, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(descriptor, data[: self.room])
        self.room -= written
        return written


def whole(lines: bytes) -> list[int]:
    """The numbers of the lines that are whole; the others are cut short, none is glued to another."""
    assert lines.count(b'"kind"') == len(lines.splitlines())
    return numbers(b"".join(line + b"\n" for line in lines.splitlines() if line.endswith(b"}")))


def test_the_record_after_a_half_written_one_has_its_own_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    lost: list[int] = []
    log = AuditLog(FileSink(str(path)), FakeClock(), lost.append)
    size = len(encode(record(1)))
    disk = Disk(size + 9)
    monkeypatch.setattr(os, "write", disk.write)
    log.workflow(record(1))
    log.workflow(record(2))
    log.flush()
    assert not log.healthy and path.stat().st_size == size + 9
    log.workflow(record(3))
    log.flush()
    disk.room = 1 << 20
    for number in (4, 5):
        log.workflow(record(number))
        log.flush()
    disk.room = 9
    log.workflow(record(6))
    log.close()
    assert whole(path.read_bytes()) == [1, 4, 5]
    disk.room = 1 << 20
    again = AuditLog(FileSink(str(path)), FakeClock(), lost.append)
    again.workflow(record(7))
    again.close()
    assert whole(path.read_bytes()) == [1, 4, 5, 7], "a sidecar that starts on a file that another left cut short"


def test_standard_output_that_fails_once_loses_that_batch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    disk, failed = Disk(9), threading.Event()

    def noted(descriptor: int, data: bytes) -> int:
        try:
            return disk.write(descriptor, data)
        finally:
            if not disk.room:
                failed.set()

    monkeypatch.setattr(os, "write", noted)
    sink = StdoutSink(write)
    sink.write(encode(record(1)))
    assert failed.wait(10)
    while sink._error is None:  # the thread is between the failure and its note
        pass
    disk.room = 1 << 20
    with pytest.raises(OSError, match="No space left"):
        sink.write(encode(record(2)))
    sink.write(encode(record(3)))
    sink.close()
    assert whole(os.read(read, 1 << 20)) == [2, 3]
    os.close(read)
    os.close(write)


def test_a_rotation_takes_effect_at_a_reload(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(FileSink(str(path)), FakeClock(), lambda _: None)
    log.workflow(record(0))
    path.rename(tmp_path / "audit.jsonl.1")
    log.workflow(record(1))
    log.reopen()
    log.workflow(record(2))
    log.close()
    assert numbers((tmp_path / "audit.jsonl.1").read_bytes()) == [0, 1] and numbers(path.read_bytes()) == [2]


def test_a_file_that_cannot_be_opened_anew_stays(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "audit.jsonl"
    path.parent.mkdir()
    log = AuditLog(FileSink(str(path)), FakeClock(), lambda _: None)
    moved = path.parent.rename(tmp_path / "gone") / path.name
    log.reopen()
    log.workflow(record(0))
    log.close()
    assert numbers(moved.read_bytes()) == [0]


def test_a_pipe_that_nobody_reads_is_an_error_and_no_standstill(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "audit.fifo")
    with pytest.raises(OSError, match="No such device"):
        FileSink(str(tmp_path / "audit.fifo"))
