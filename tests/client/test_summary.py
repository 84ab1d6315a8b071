"""A report in one line: the same words for whoever uses the library and for whoever runs `spanlock exec`."""

import pytest

from sidecar.cli import exec, residual
from sidecar.client import summary as told
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from tests.cli.test_residual import LEGACY, REPORTS, SEARCH, report

REPORTED = {
    "nothing": report(), "dead": report(SEARCH), "two dead": report(SEARCH, SEARCH), "residual": report(SEARCH, REPORTS),
    "no end": report(LEGACY), "all": report(SEARCH, REPORTS, LEGACY),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTED)
def test_it_is_the_closing_line_of_exec(name: str) -> None:
    assert told.summary(REPORTED[name]) == exec.summary(REPORTED[name])
    for end in REPORTED[name].leases:
        assert (told.seconds(end), told.residual(end)) == (residual.seconds(end), residual.residual(end))


def test_a_sidecar_that_went_away_is_told_as_exec_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    exec._tell("wf_1", None, None)
    assert capsys.readouterr().err == f"spanlock: {told.summary(None)}\n"


def test_it_is_the_example_of_its_docstring() -> None:
    example = (told.summary.__doc__ or "").strip().splitlines()[-1].strip()
    assert told.summary(REPORTED["residual"]) == example


def test_a_residual_life_is_never_told_shorter_than_it_may_be() -> None:
    end = pb.LeaseEnd()
    end.residual.FromNanoseconds(1)
    assert (told.seconds(end), told.residual(end)) == (1, "at most 1 s")
