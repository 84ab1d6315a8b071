"""What is known and said of an issuer: from the first answer on, once a change."""

from typing import Any

import pytest
from structlog.testing import capture_logs

from sidecar.errors import IssuerError, Reason
from tests.credentials.test_broker import World


async def asked(world: World, error: Exception | None = None) -> dict[str, Any]:
    """One exchange that ends like this, and the issuer's row after it."""
    world.error = error
    if error is None:
        await world.lease(ttl=float(len(world.minted) + 1))  # of a key of its own: no lease that is there will do
    else:
        with pytest.raises(IssuerError):
            await world.lease(ttl=1000.0 + len(world.minted))
    (row,) = world.broker.health()
    return dict(row)


async def test_an_issuer_is_listed_before_it_is_asked_and_that_is_no_failure() -> None:
    (row,) = World().broker.health()
    assert (row["name"], row["ok"], row["state"], row["since"]) == ("issuer i", True, "not asked yet", None)


async def test_each_change_of_an_issuer_is_said_once_with_its_reason() -> None:
    world = World()
    world.server = "https://issuer.test/realms/a"
    down = IssuerError(Reason.ISSUER_UNAVAILABLE, "issuer i: cannot be reached")
    refused = IssuerError(Reason.ISSUER_REFUSED, "issuer i refused: invalid_client")
    with capture_logs() as said:
        rows = [await asked(world, down), await asked(world, down)]
        await world.clock.advance(5.0)
        rows += [await asked(world, refused), await asked(world), await asked(world), await asked(world, down)]
    assert [(line["log_level"], line["event"], line.get("reason")) for line in said] == [
        ("warning", "issuer_down", "issuer_unavailable"), ("warning", "issuer_down", "issuer_refused"),
        ("info", "issuer_up", None), ("warning", "issuer_down", "issuer_unavailable"),
    ]  # fmt: skip
    assert said[1]["detail"] == refused.detail and {line["url"] for line in said} == {world.server}
    assert [row["state"] for row in rows] == ["down", "down", "down", "ok", "ok", "down"]
    assert rows[2]["since"] == rows[0]["since"] and rows[3]["since"] > rows[0]["since"]


async def test_an_issuer_that_works_at_once_is_said_to() -> None:
    world = World()
    with capture_logs() as said:
        await asked(world)
        await asked(world)
    assert [line["event"] for line in said] == ["issuer_up"]
