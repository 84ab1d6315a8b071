"""Bad configuration: each problem with its key path, and never the value, which may be a secret in a wrong place."""

from pathlib import Path

import pytest

from sidecar.config.load import find_config, parse
from sidecar.errors import ConfigError

GOOD = """\
agents: [{name: a, spiffe_id: "spiffe://td/a", uid: 5}]
issuers: [{name: i, kind: token_exchange, issuer: "https://i.test"}]
policy: {files: [p.cedar]}
tools: [{name: t, url: "https://t.test", issuer: i}]
"""


def test_the_smallest_configuration() -> None:
    settings = parse(GOOD, "x")
    assert settings.tools[0].build().authority.port == 443


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("uid: 5", "uid: 5, uid: 6"), "there twice"),
        (("uid: 5", "uidd: 5"), "agents[0].uidd"),
        (("spiffe://td/a", "td/a"), "agents[0].spiffe_id"),
        (("https://t.test", "https://t.test/path"), "tools[0].url"),
        (("https://t.test", "ftp://t.test"), "tools[0].url"),
        (("https://t.test", "https://2130706433"), "tools[0].url"),
        (("issuer: i}", "issuer: j}"), "tools[0].issuer"),
        (("https://i.test", "http://i.test"), "issuers[0].issuer"),
        (("kind: token_exchange", "kind: magic"), "issuers[0]"),
        (("files: [p.cedar]", "files: []"), "policy.files"),
        (("agents: [{name: a, spiffe_id: \"spiffe://td/a\", uid: 5}]", "agents: []"), "agents"),
        (("policy:", "polcy:"), "polcy"),
        (("issuer: i}", "issuer: i, scopes: ['a\"b']}"), "tools[0].scopes"),
        (("agents:", "x: &a [1]\ny: *a\nagents:"), "aliases"),
        (("agents:", "\t:"), "line 1"),
    ],
)  # fmt: skip
def test_each_problem_names_its_key(change: tuple[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace(*change), "spanlock.yaml")
    assert says in caught.value.detail


def test_a_secret_in_a_wrong_place_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace("uid: 5", "uid: hunter2-secret"), "spanlock.yaml")
    assert "hunter2" not in caught.value.detail


def test_l3_the_working_directorys_file_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spanlock.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPANLOCK_CONFIG", raising=False)
    with pytest.raises(ConfigError):
        find_config(None)
