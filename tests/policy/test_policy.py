"""Default deny, any error denies, most restrictive obligations win, and the memo is exact."""

import contextlib
import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import ConfigError, Denied, Reason
from sidecar.model.caller import Agent
from sidecar.model.policy import Action, Permit
from sidecar.model.tool import Authority, Tool
from sidecar.model.workflow import Workflow
from sidecar.policy.decider import Decider
from sidecar.policy.load import parse_policy
from sidecar.secret import Secret

TOOL = Tool(name="t", scheme="https", authority=Authority("t.test", 443), issuer="i", scopes=("a", "b", "c"))
CALL = 'principal, action == Spanlock::Action::"http.request", resource'
AGENTS = {"x": Agent("x", "spiffe://td/x"), "y": Agent("y", "spiffe://td/y")}


def decider(text: str) -> Decider:
    return Decider(parse_policy(text, "test"), AGENTS, {"t": TOOL})


def test_nothing_permits_nothing() -> None:
    with pytest.raises(Denied) as caught:
        decider('permit(principal == Spanlock::Agent::"y", action, resource);').decide_request(
            "x", "w", TOOL, "GET", "/"
        )
    assert caught.value.reason is Reason.POLICY_DENIED


def test_the_most_restrictive_obligations_win() -> None:
    permit = decider(
        '@id("p") @ttl("300") @scopes("a b") permit(principal, action, resource);'
        '@id("q") @ttl("60") @scopes("b c") permit(principal, action, resource);'
    ).decide_request("x", "w", TOOL, "GET", "/")
    assert (permit.ttl, permit.scopes, permit.policy_ids) == (60.0, ("b",), ("p", "q"))


def test_scopes_of_policy_hold_for_a_tool_that_has_none_configured() -> None:
    """Without them the issuer would give its own default, which is more than policy said."""
    bare = dataclasses.replace(TOOL, scopes=())
    one = '@scopes("a b") permit(principal, action, resource);'
    assert decider(one).decide_request("x", "w", bare, "GET", "/").scopes == ("a", "b")
    two = one + '@scopes("b c") permit(principal, action, resource);'
    assert decider(two).decide_request("x", "w", bare, "GET", "/").scopes == ("b",)
    with pytest.raises(Denied):
        decider(one + '@scopes("c") permit(principal, action, resource);').decide_request("x", "w", bare, "GET", "/")
    assert decider("permit(principal, action, resource);").decide_request("x", "w", bare, "GET", "/").scopes == ()


def test_no_scope_in_common_denies() -> None:
    with pytest.raises(Denied):
        decider(
            '@scopes("a") permit(principal, action, resource); @scopes("b") permit(principal, action, resource);'
        ).decide_request("x", "w", TOOL, "GET", "/")


def test_a_policy_that_errs_beside_a_permit_denies() -> None:
    """Cedar leaves out a policy that fails: a forbid that cannot be evaluated would forbid nothing."""
    text = f"permit(principal, action, resource); forbid({CALL}) when {{ 9223372036854775807 + 1 > 0 }};"
    with pytest.raises(Denied) as caught:
        decider(text).decide_request("x", "w", TOOL, "GET", "/")
    assert caught.value.reason is Reason.POLICY_ERROR


@pytest.mark.parametrize("forbidden", ["token.exchange", "lease.issue", "lease.renew"])
def test_each_action_is_asked_about_as_itself(forbidden: str) -> None:
    rule = (
        f'permit(principal, action, resource); forbid(principal, action == Spanlock::Action::"{forbidden}", resource);'
    )
    chosen, workflow = decider(rule), Workflow("wf_1", "x", "w", Secret("h"), 0.0, 0.0, 0.0)
    asked: dict[str, Callable[[], Permit]] = {
        "token.exchange": lambda: chosen.decide_exchange(workflow, TOOL, ("a",)),
        "lease.issue": lambda: chosen.decide_lease(Action.LEASE_ISSUE, workflow, TOOL, ("a",)),
        "lease.renew": lambda: chosen.decide_lease(Action.LEASE_RENEW, workflow, TOOL, ("a",)),
    }
    for action, ask in asked.items():
        if action == forbidden:
            with pytest.raises(Denied):
                ask()
        else:
            assert str(ask().question.action) == action


def test_the_environment_is_the_configured_one() -> None:
    rule = 'permit(principal, action, resource) when { context.environment == "prod" };'
    for environment, permitted in (("prod", True), ("test", False)):
        chosen = Decider(parse_policy(rule, environment), AGENTS, {"t": TOOL})
        if permitted:
            assert chosen.decide_request("x", "w", TOOL, "GET", "/") and chosen.decide_open("x", "w")
        else:
            with pytest.raises(Denied):
                chosen.decide_request("x", "w", TOOL, "GET", "/")


@pytest.mark.parametrize(
    "text",
    ['@tll("1") permit(principal, action, resource);', '@ttl("-1") permit(principal, action, resource);',
     '@ttl("x") permit(principal, action, resource);', '@scopes("a b\u00e9") permit(principal, action, resource);',
     '@scopes("a\tb") permit(principal, action, resource);', '@scopes("") permit(principal, action, resource);',
     '@approval("required") permit(principal, action, resource);', '@ttl("1") forbid(principal, action, resource);',
     "permit(principal, action, resource) when { context.nonsense };", 'permit(principal == Foo::"x", action, resource);', "nonsense"],
)  # fmt: skip
def test_bad_policies_are_refused_with_a_reason(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policy(text, "test")
    assert caught.value.reason is Reason.POLICY_INVALID


@pytest.mark.parametrize(
    ("path", "permitted"),
    [("/v1/a", True), ("/v1/a;x=1", True), ("/v1/a;x=1/b;y", True), ("/v1/a;admin", False), ("/admin", False), ("/admin;x", False),
     ("/v1;x/admin", False), ("/v1/admin", False), ("/v1/admin;x", False), ("/v1/admin;x=/y", False), ("/v2;/v1/a", False)],
)  # fmt: skip
def test_d7_a_path_with_parameters_is_asked_about_with_and_without_them(path: str, permitted: bool) -> None:
    """Some tools cut `;…` off each segment and others do not: what either would serve must be permitted."""
    chosen = decider(
        f'permit({CALL}) when {{ context.path like "/v1*" }};'
        f'forbid({CALL}) when {{ context.path like "/v1/admin*" }};'
        f'forbid({CALL}) when {{ context.path like "*;admin*" }};'
    )
    for _ in range(2):  # the second from the memo
        if permitted:
            chosen.decide_request("x", "w", TOOL, "GET", path)
        else:
            with pytest.raises(Denied) as caught:
                chosen.decide_request("x", "w", TOOL, "GET", path)
            assert caught.value.reason is Reason.POLICY_DENIED


def test_d7_the_obligations_of_both_readings_count() -> None:
    chosen = decider(
        f'@id("p") @ttl("300") @scopes("a b") permit({CALL}) when {{ context.path like "*;*" }};'
        f'@id("q") @ttl("60") @scopes("b c") permit({CALL}) when {{ context.path == "/v1" }};'
        '@id("r") permit(principal, action, resource);'
    )
    permit = chosen.decide_request("x", "w", TOOL, "GET", "/v1;x")
    assert (permit.ttl, permit.scopes, permit.policy_ids) == (60.0, ("b",), ("p", "q", "r"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\npermit(principal, action, resource);\n\n@id(\"b\")\npermit(nonsense;\npermit(principal, action, resource);", "policy, line 4: the policy"),
        ('// a; "\npermit(principal, action, resource)\nwhen { context.workflow == "a;b" };\npermit(principal, action', "policy, line 4: the policy"),
        ('permit(principal, action, resource);\n\npermit(principal == Foo::"x", action, resource);', "policy, line 3: unrecognized entity type"),
        ('\n@id("b")\n@ttl("0") permit(principal, action, resource);', "policy, line 2: b: @ttl"),
        ('@ttl("' + "9" * 5000 + '") permit(principal, action, resource);', "policy, line 1: policy0: @ttl"),
        ('permit(principal, action, resource);\npermit(principal, action, resource) when { "no end };', "policy, line 2: the policy"),
    ],
)  # fmt: skip
def test_what_is_wrong_has_a_file_and_a_line(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policy(text, "test")
    assert says in caught.value.detail and len(caught.value.detail) < 400, caught.value.detail


_DEEP: dict[str, Callable[[int], str]] = {
    "brackets": lambda n: "(" * n + "true" + ")" * n,
    "a set": lambda n: "[" * n + "1" + "]" * n + " == []",
    "a record": lambda n: '{"a":' * n + "1" + "}" * n + " == {}",
    "and": lambda n: " && ".join(["true"] * n),
    "or": lambda n: " || ".join(["true"] * n),
    "sums": lambda n: "+".join(["1"] * n) + " == 1",
    "if": lambda n: "if true then true else " * n + "true",
    "attributes": lambda n: "context" + ".a" * n,
    "calls": lambda n: "[1]" + ".contains(1)" * n,
    "indices": lambda n: "context" + '["a"]' * n + ".b",
}


@pytest.mark.parametrize("name", _DEEP)
def test_a_policy_that_would_overrun_the_engines_stack_is_refused_before_it(name: str) -> None:
    text = (
        f"permit(principal, action, resource);\npermit(principal, action, resource) when {{ {_DEEP[name](40_000)} }};"
    )
    with pytest.raises(ConfigError, match="line 2: (brackets are nested|more than 400 operators)"):
        parse_policy(text, "test")


def test_what_is_in_strings_and_comments_does_not_nest() -> None:
    brackets, operators = "(" * 1000, "&&" * 1000
    text = f'// {brackets}\npermit(principal, action, resource) when {{ context.workflow != "\\"{brackets}{operators};" }};'
    assert len(parse_policy(text * 3, "test").obligations) == 3
    many = " || ".join(f'context.workflow like "{n}*"' for n in range(190))
    assert parse_policy(f"permit(principal, action, resource) when {{ {many} }};", "test").obligations


def test_text_of_any_kind_is_read_in_bounded_time() -> None:
    for text in ('\\"' * 300_000, '"' * 300_001, "//" * 300_000, "/" * 300_000, "\n" * 300_000, ";" * 100_000):
        with contextlib.suppress(ConfigError):
            parse_policy(text, "test")


RULES = (
    'permit(principal == Spanlock::Agent::"x", action == Spanlock::Action::"http.request", resource) when { context.path like "/v1/*" };'
    '@ttl("30") permit(principal, action == Spanlock::Action::"http.request", resource) when { context.method == "GET" };'
    'forbid(principal, action == Spanlock::Action::"http.request", resource) when { context.workflow == "bad" };'
)
SHARED = decider(RULES)


@given(
    st.sampled_from("xy"),
    st.sampled_from(["w", "bad"]),
    st.sampled_from(["GET", "POST"]),
    st.sampled_from(["/", "/v1/a", "/v2"]),
)
def test_the_memo_answers_what_a_fresh_decision_answers(agent: str, workflow: str, method: str, path: str) -> None:
    def ask(of: Decider) -> object:
        try:
            permit = of.decide_request(agent, workflow, TOOL, method, path)
            return permit.scopes, permit.ttl, permit.policy_ids
        except Denied as denied:
            return denied.reason, denied.detail

    first, again = ask(SHARED), ask(SHARED)
    assert first == again == ask(decider(RULES))


def test_a_remembered_no_holds_no_frame() -> None:
    """Its traceback would hold what the first call was about, in a cycle, for as long as the answer is remembered."""
    chosen = decider("forbid(principal, action, resource);")
    with pytest.raises(Denied):
        chosen.decide_request("x", "w", TOOL, "GET", "/")
    (answer,) = chosen._memo.values()
    assert isinstance(answer, Denied) and answer.__traceback__ is None and answer.__context__ is None


def test_a_reload_cuts_the_memo() -> None:
    chosen = decider("permit(principal, action, resource);")
    before = chosen.decide_request("x", "w", TOOL, "GET", "/")
    chosen.replace(
        parse_policy('permit(principal == Spanlock::Agent::"y", action, resource);', "test"), AGENTS, {"t": TOOL}
    )
    with pytest.raises(Denied):
        chosen.decide_request("x", "w", TOOL, "GET", "/")
    assert chosen.epoch > before.epoch


@pytest.mark.parametrize("path", ["/users/a%40b", "/users%3Aadmin", "/%40admin"])
def test_an_escaped_delimiter_passes_no_rule_on_the_plain_one(path: str) -> None:
    """Many clients escape them in a segment, and many servers read them as plain: policy must permit both."""
    rule = (
        "permit(principal, action, resource);"
        'forbid(principal, action == Spanlock::Action::"http.request", resource) when {'
        ' context.path == "/users/a@b" || context.path == "/users:admin" || context.path like "/@admin*" };'
    )
    with pytest.raises(Denied):
        decider(rule).decide_request("x", "w", TOOL, "GET", path)
    assert decider(rule).decide_request("x", "w", TOOL, "GET", "/users/c%40d")
