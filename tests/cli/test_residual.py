"""What is left of a credential's life at its tool is told by every command alike: rounded up, and as without end when it is."""

import io
import json

import pytest

from sidecar.cli import demo, exec, main, operator
from sidecar.cli.demo import Story
from sidecar.client.summary import summary
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


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (IssuerOutcome.FAILED, "1 credential: 1 failed, residual at the tool (t: introspection, at most 9 s); not all revoked within 38 ms, the sidecar tries on"),
        (IssuerOutcome.MINT_UNKNOWN, "1 credential: 1 mint_unknown, residual at the tool (t: introspection, at most 9 s)"),
    ],
)  # fmt: skip
def test_what_was_not_revoked_is_not_said_to_be(outcome: IssuerOutcome, says: str) -> None:
    assert summary(report(end("t", outcome, 9.0, TokenCheck.INTROSPECTION))) == says


def test_calls_that_were_refused_are_told_beside_the_credentials() -> None:
    some = report(SEARCH)
    some.refused["policy_denied"] = 2
    some.refused["unknown_tool"] = 1
    told = "; revoked in 38 ms; 3 calls were refused: policy_denied, unknown_tool (spanlock explain policy_denied)"
    assert summary(some).endswith(told)
    none = report()
    none.refused["unknown_caller"] = 1
    assert (
        summary(none)
        == "no credentials were needed; 1 call was refused: unknown_caller (spanlock explain unknown_caller)"
    )


def test_a_static_secret_has_no_end_on_the_last_line_and_null_in_the_receipt() -> None:
    assert "residual at the tool (legacy: unknown, no end)" in summary(report(LEGACY))
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
