"""What is left of a credential's life at its tool is told by every command alike: rounded up, and as without end when it is."""

import io
import json

import pytest

from sidecar.cli import demo, exec, main, operator
from sidecar.cli.demo import Story
from sidecar.clock import SystemClock
from sidecar.control import convert
from sidecar.model.lease import CloseReport, IssuerOutcome, LeaseEnd, TokenCheck
from sidecar.wire.spanlock.v1 import admin_pb2
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb


def end(tool: str, outcome: IssuerOutcome, left: float, check: TokenCheck) -> LeaseEnd:
    return LeaseEnd("ls_1", "wf_1", "demo", tool, outcome, left, check)


SEARCH = end("search", IssuerOutcome.CONFIRMED, 0.0, TokenCheck.INTROSPECTION)
REPORTS = end("reports", IssuerOutcome.CONFIRMED, 240.9, TokenCheck.OFFLINE)
LEGACY = end("legacy", IssuerOutcome.LOCAL_ONLY, -1.0, TokenCheck.UNKNOWN)


def report(*ends: LeaseEnd) -> pb.CloseResponse:
    return convert.close_report(CloseReport("wf_1", "demo", "closed", ends, 0.2, 38.0))


def test_the_last_line_of_exec_is_the_example_of_its_docstring() -> None:
    example = (exec.summary.__doc__ or "").strip().splitlines()[-1].strip()
    assert exec.summary(report(SEARCH, REPORTS)) == example and "at most 241 s" in example


def test_a_static_secret_has_no_end_on_the_last_line_and_null_in_the_receipt() -> None:
    assert "residual at the tool (legacy: unknown, no end)" in exec.summary(report(LEGACY))
    receipt = io.StringIO()
    exec._tell("wf_1", report(SEARCH, REPORTS, LEGACY), receipt)
    told = json.loads(receipt.getvalue())["credentials"]
    assert [credential["residual_seconds"] for credential in told] == [0, 241, None]


def test_revoke_tells_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    done = admin_pb2.RevokeResponse(ends=report(SEARCH, REPORTS, LEGACY).leases)
    monkeypatch.setattr(operator, "call", lambda *_: done)
    for words in (["revoke", "--all"], ["revoke", "--all", "--json"]):
        with pytest.raises(SystemExit) as ended:
            main.main(words)
        assert ended.value.code == 0
    *table, last = capsys.readouterr().out.splitlines()
    for row, said in zip(table[1:], ("none", "at most 241 s", "no end"), strict=True):
        assert f"  {said}  " in row
    assert [shown["residual"] for shown in json.loads(last)["ends"]] == ["0s", "240.900s", None]


def test_the_demo_tells_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    story = Story(True, SystemClock())
    demo._tell_end(story, report(REPORTS, LEGACY), "closed", 2)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["residual_seconds"] for line in told if "residual_seconds" in line] == [241, None]
    assert "at most 241 s" in told[1]["text"] and "no end" in told[2]["text"]
