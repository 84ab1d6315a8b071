"""Bad configuration: each problem with its key path, and never the value, which may be a secret in a wrong place."""

import os
from pathlib import Path

import pytest

from sidecar.address import host_and_port
from sidecar.config.advice import warnings
from sidecar.config.load import find_config, load, parse
from sidecar.config.obstacles import obstacles
from sidecar.errors import ConfigError
from sidecar.policy.load import parse_policy

GOOD = """\
agents: [{name: a, spiffe_id: "spiffe://td/a", uid: 5}]
issuers: [{name: i, kind: token_exchange, issuer: "https://i.test"}]
policy: {files: [p.cedar]}
tools: [{name: t, url: "https://t.test", issuer: i}]
"""


def test_the_smallest_configuration() -> None:
    settings = parse(GOOD, "x", Path())
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
        (("issuer: i}", "issuer: i, header: Host}"), "tools[0].header"),
        (("issuer: i}", "issuer: i, header: proxy-authorization}"), "tools[0].header"),
        (("issuer: i}", "issuer: i, address: somewhere}"), "tools[0].address"),
        (("agents:", "[1]: 2\nagents:"), "keys must be text"),
        (("https://i.test", "ftp://i.test"), "issuers[0].issuer"),
        (("kind: token_exchange, issuer: \"https://i.test\"", "kind: static"), "exactly one of secret_file and secret_env"),
        (("agents:", "spiffe: {socket: \"/run/x.sock\"}\nagents:"), "spiffe.socket"),
    ],
)  # fmt: skip
def test_each_problem_names_its_key(change: tuple[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace(*change), "spanlock.yaml", Path())
    assert says in caught.value.detail


@pytest.mark.parametrize(
    "value", ["2001-13-45", "0b_", "0x_", "!!bool foo", "!!int foo", "!!float foo", "!!timestamp foo", "9" * 5000, "!!binary é",
              "!!python/name:os.system", "! foo", "1e", "?", "!!set {1}", "!!omap [1]", "!!null foo", "190:20:30", "=", "<<", "0o9"],
)  # fmt: skip
def test_yaml_that_its_own_constructors_choke_on_is_refused_with_words(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f"{GOOD}x:\n  {value}\n", "spanlock.yaml", Path())
    assert caught.value.detail.startswith(("spanlock.yaml line 6", "x: Extra inputs")), caught.value.detail


def test_a_value_that_yaml_reads_otherwise_names_its_line_and_the_fix() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace("name: a,", "name: 2001-13-45,"), "spanlock.yaml", Path())
    assert (
        caught.value.detail == "spanlock.yaml line 1, column 17: the value is not a valid timestamp; put text in quotes"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("uid: 5", "uid: x"), "agents[0].uid: Input should be a valid integer"),
        (("uid: 5", "uid: true"), "agents[0].uid: Input should be a valid integer"),
        (("uid: 5", "gid: 4294967295"), "agents[0].gid: Input should be less than or equal to 4294967294"),
        (("issuer: i}", "issuer: i, max_ttl: yes}"), "tools[0].max_ttl: Input should be a valid number"),
        (("files: [p.cedar]", "files: p.cedar"), "policy.files: write a list: [...]"),
        (("policy: {files: [p.cedar]}", "policy: p.cedar"), "policy: write keys and values"),
        (("issuer: i}", "issuer: i, allow_networks: [ten]}"), "tools[0].allow_networks[0]: write a network: 10.1.0.0/16 or fd00::/8"),
        (("files: [p.cedar]", 'files: ["p\\0.cedar"]'), "policy.files[0]: has characters that no file's name should have"),
        (("policy:", 'run_dir: "a\\0b"\npolicy:'), "run_dir: has characters"),
        (("policy:", 'audit: {file: "\\ud800"}\npolicy:'), "audit.file: has characters"),
        (("policy:", 'spiffe: {socket: "unix:///a\\0b"}\npolicy:'), "spiffe.socket: has characters"),
        (("policy:", 'spiffe: {socket: "unix:///' + "s" * 107 + '"}\npolicy:'), "spiffe.socket: write unix:///"),
        (("policy:", 'spiffe: {socket: "tcp://"}\npolicy:'), "spiffe.socket: write"),
        (("policy:", 'spiffe: {socket: "tcp://spire:8081"}\npolicy:'), "spiffe.socket: write unix:///"),
        (("policy:", "telemetry: {otlp_endpoint: nonsense}\npolicy:"), "telemetry.otlp_endpoint: write http://HOST:PORT"),
        (("policy:", 'telemetry: {otlp_endpoint: "http://c:x"}\npolicy:'), "telemetry.otlp_endpoint: write http://HOST:PORT"),
        (("policy:", "workflows: {max_age: .inf}\npolicy:"), "workflows.max_age: Input should be a finite number"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_line_in_words_of_yaml(change: tuple[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace(*change), "spanlock.yaml", Path())
    assert caught.value.detail.startswith(says) and "\n" not in caught.value.detail, caught.value.detail
    assert "uple" not in caught.value.detail


def test_no_agent_at_all_is_said() -> None:
    with pytest.raises(ConfigError, match="agents: write at least one entry"):
        parse(GOOD.replace('[{name: a, spiffe_id: "spiffe://td/a", uid: 5}]', "[]"), "spanlock.yaml", Path())


def test_a_directory_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} is not a file"):
        find_config(str(tmp_path))


def test_problems_between_sections_have_a_line_and_a_key_each() -> None:
    text = """\
agents: [{name: a, spiffe_id: "spiffe://td/a", uid: 5}, {name: a, spiffe_id: "spiffe://td/b", uid: 6}]
issuers: [{name: i, kind: static, secret_env: X}, {name: i, kind: static, secret_env: Y}]
policy: {files: [p.cedar]}
tools:
- {name: t, url: "https://t.test", issuer: i}
- {name: t, url: "https://u.test", issuer: i}
- {name: v, url: "https://t.test:443", issuer: "{j}"}
"""
    with pytest.raises(ConfigError) as caught:
        parse(text, "spanlock.yaml", Path())
    assert caught.value.detail.split("\n") == [
        "agents[1].name: a is there twice",
        "issuers[1].name: i is there twice",
        "tools[1].name: t is there twice",
        "tools[2].url: t.test:443 is there twice",
        "tools[2].issuer: {j} is not the name of an entry in issuers",
    ]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("listeners: {explicit: \"127.0.0.1:abc\"}", "listeners.explicit: write host:port"),
        ("listeners: {reverse: \"127.0.0.1:65536\"}", "listeners.reverse: write host:port"),
        ("listeners: {reverse: \"0.0.0.0:17002\"}", "listeners.reverse: not loopback"),
        ("listeners: {explicit: \"[::]:17001\"}", "listeners.explicit: not loopback"),
        ("otlp: {grpc: \"tool.test:17317\"}", "otlp.grpc: not loopback"),
        ("otlp: {http: \"0.0.0.0:17318\"}", "otlp.http: not loopback"),
        ("otlp: {http: \"127.0.0.1:-1\"}", "otlp.http: write host:port"),
        ("health: \"127.0.0.1\"", "health: write host:port"),
        ("health: \":17091\"", "health: write host:port"),
        ("health: \"::1:17091\"", "health: write host:port"),
        ("health: \"[127.0.0.1]:17091\"", "health: write host:port"),
        ("health: \"127.0.0.1:١\"", "health: write host:port"),
        ("health: \"a..b:1\"", "health: write host:port"),
    ],
)  # fmt: skip
def test_an_address_that_cannot_be_listened_on_names_its_key_and_the_fix(more: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD + more, "spanlock.yaml", Path())
    assert caught.value.detail.startswith(says), caught.value.detail
    assert "127.0.0.1:" in caught.value.detail and "\n" not in caught.value.detail


def test_addresses_that_can_be_listened_on() -> None:
    more = """\
listeners: {explicit: "localhost:0", reverse: "[::1]:65535"}
otlp: {grpc: "127.8.0.1:1", http: null}
health: "[::]:17091"
"""
    settings = parse(GOOD + more, "x", Path())
    assert (settings.listeners.explicit, settings.listeners.reverse) == ("localhost:0", "[::1]:65535")
    assert (settings.otlp.grpc, settings.otlp.http, settings.health) == ("127.8.0.1:1", None, "[::]:17091")
    assert host_and_port("[::1]:65535") == ("::1", 65535) and host_and_port("sidecar.test:0") == ("sidecar.test", 0)


def test_a_secret_in_a_wrong_place_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(GOOD.replace("uid: 5", "uid: hunter2-secret"), "spanlock.yaml", Path())
    assert "hunter2" not in caught.value.detail


def test_l3_the_working_directorys_file_is_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spanlock.yaml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPANLOCK_CONFIG", raising=False)
    with pytest.raises(ConfigError):
        find_config(None)


def test_relative_files_are_beside_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    more = "issuer: i, ca_file: ca.pem, introspection: {client_id: c, secret_file: /run/secrets/s}}"
    (tmp_path / "conf/spanlock.yaml").write_text(GOOD.replace("issuer: i}", more) + "audit: {file: audit.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    settings = load(Path("conf/spanlock.yaml"))
    (tool,) = settings.tools
    assert tool.introspection is not None
    assert (
        settings.policy.files == (f"{tmp_path}/conf/p.cedar",) and settings.audit.file == f"{tmp_path}/conf/audit.jsonl"
    )
    assert (tool.ca_file, tool.introspection.secret_file) == (f"{tmp_path}/conf/ca.pem", "/run/secrets/s")
    assert parse(GOOD, "x", tmp_path).audit.file == "-"
    assert parse(GOOD + "run_dir: run\n", "x", tmp_path).run_dir == f"{tmp_path}/run"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"x" * (1 << 20) + b"x", b"- 1\n", b"a: " + b"[" * 5000])
def test_what_is_no_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spanlock.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(path) in caught.value.detail


def test_what_is_allowed_and_should_be_known_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 2102)
    (tmp_path / "open.secret").write_text("x")
    (tmp_path / "open.secret").chmod(0o644)
    (tmp_path / "ca.pem").write_text("no certificate")
    text = """\
agents: [{name: a, spiffe_id: "spiffe://td/a", uid: 5}, {name: b, spiffe_id: "spiffe://td/b", uid: 5}, {name: c, spiffe_id: "spiffe://td/c"}]
issuers:
- {name: i, kind: token_exchange, issuer: "https://i.test", ca_file: nowhere.pem}
- {name: f, kind: static, secret_file: open.secret}
- {name: v, kind: static, secret_env: SPANLOCK_TEST_UNSET}
policy: {files: [p.cedar]}
tools:
- {name: t, url: "http://t.test", issuer: i, scopes: [x], export: true, ca_file: ca.pem, introspection: {client_id: c, secret_file: gone}}
- {name: u, url: "https://10.0.0.1.nip.io", issuer: i, scopes: [x]}
- {name: v, url: "http://localhost:81", address: 203.0.113.7, issuer: i, scopes: [x]}
- {name: w, url: "http://w.test", address: 127.0.0.1, issuer: i, scopes: [x]}
"""
    policy = """
        permit(principal == Spanlock::Agent::"d", action, resource == Spanlock::Tool::"t");
        @id("more") @scopes("read") permit(principal, action, resource) when { resource == Spanlock::Tool::"z" };
    """
    settings = parse('spiffe: {socket: "unix:///nonexistent.sock"}\n' + text, "x", tmp_path)
    said = "\n".join(warnings(settings, parse_policy(policy, "test")))
    for part in (
        "a, b share uid 5", "c runs as the sidecar's own uid", f"issuers[0].ca_file: {tmp_path}/nowhere.pem: No such file",
        f"issuers[1].secret_file: {tmp_path}/open.secret can be read by every user",
        "issuers[2].secret_env: the variable SPANLOCK_TEST_UNSET is not set", "tools[0]: t is plain http",
        "t exports its real token", f"tools[0].ca_file: {tmp_path}/ca.pem is not PEM",
        f"tools[0].introspection.secret_file: {tmp_path}/gone: No such file", "10.0.0.1.nip.io is the address 10.0.0.1",
        "spiffe.socket: /nonexistent.sock: No such file", "agents: a: its socket is open to the sidecar's group", "agents: b: its",
        'policy: Spanlock::Agent::"d" is no agent of', 'policy: Spanlock::Tool::"z" is no tool of',
        "policy: more: @scopes: read is a scope of no tool", "tools[2]: v is plain http",
    ):  # fmt: skip
        assert part in said, said
    assert len(said.splitlines()) == 17
    assert "no policy in them" in warnings(settings, parse_policy("// none", "test"))[-1]


def _as_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a uid that is not root, in no group but its own: nothing may be written but what is in a directory `ours`."""
    monkeypatch.setattr(os, "geteuid", lambda: 2102)
    monkeypatch.setattr(os, "getegid", lambda: 2102)
    monkeypatch.setattr(os, "getgroups", list)
    monkeypatch.setattr(os, "access", lambda path, _: "ours" in Path(path).parts)


def test_what_keeps_the_daemon_from_starting_here_is_said_by_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _as_stranger(monkeypatch)
    for name in ("ours", "theirs", "ours/open/operator", "ours/link"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ours/open/operator").chmod(0o777)
    (tmp_path / "ours/file").write_text("")
    (tmp_path / "ours/link.jsonl").symlink_to("file")

    def said(more: str, uid: str = "uid: 5") -> list[str]:
        return obstacles(parse(GOOD.replace("uid: 5", uid) + more, "x", tmp_path))

    assert said("run_dir: ours/run\naudit: {file: ours/audit.jsonl}") == []
    assert said("run_dir: ours/run", "uid: 5, gid: 77") == [
        "agents: a: gid 77: the sidecar is not in that group; add it to it"
    ]
    for more, says in (
        ("run_dir: theirs/run", f"run_dir: {tmp_path}/theirs cannot be written in as uid 2102"),
        ("run_dir: ours/file", f"run_dir: {tmp_path}/ours/file is not a directory"),
        ("run_dir: ours/" + "r" * 100, "run_dir: "),
        ("run_dir: ours/open", f"run_dir: {tmp_path}/ours/open/operator is uid {os.getuid()}'s and others may write in it"),
        ("run_dir: ours/run\naudit: {file: nowhere/audit.jsonl}", f"audit.file: {tmp_path}/nowhere/audit.jsonl cannot be opened: No such"),
        ("run_dir: ours/run\naudit: {file: theirs/audit.jsonl}", "audit.file: "),
        ("run_dir: ours/run\naudit: {file: ours/open}", "audit.file: "),
        ("run_dir: ours/run\naudit: {file: ours/link.jsonl}", "audit.file: "),
    ):  # fmt: skip
        lines = said(more)
        assert lines and all(line.startswith(says) for line in lines), lines
