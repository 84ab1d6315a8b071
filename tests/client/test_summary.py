"""A report in one line: the same words for whoever uses the library and for whoever runs `spanlock exec`."""

import pytest

from sidecar.cli import exec
from sidecar.client import summary as told
from sidecar.wire.spanlock.v1 import workflows_pb2 as pb
from tests.cli.test_residual import REPORTS, SEARCH, report


def test_a_sidecar_that_went_away_is_told_as_exec_tells_it(capsys: pytest.CaptureFixture[str]) -> None:
    exec._tell("wf_1", None, None)
    assert capsys.readouterr().err == f"spanlock: {told.summary(None)}\n"


def test_it_is_the_example_of_its_docstring() -> None:
    example = (told.summary.__doc__ or "").strip().splitlines()[-1].strip()
    assert told.summary(report(SEARCH, REPORTS)) == example


def test_a_residual_life_is_never_told_shorter_than_it_may_be() -> None:
    end = pb.LeaseEnd()
    end.residual.FromNanoseconds(1)
    assert (told.seconds(end), told.residual(end)) == (1, "at most 1 s")
