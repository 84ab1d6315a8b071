"""Policy's answers. The only maker of `Permit`; its no is `Denied`, and whatever is not a clean yes is a no.

A decision is a pure function of its question and the policy, so equal questions are answered from a memo; a reload raises
the epoch and empties it. Obligations of all satisfied permits are merged, most restrictive first: the smallest ttl, the
intersection of scopes (an empty one denies). A path with parameters (`/a;x`) is two questions, with and without them, since
tools read it in either way; both must be permitted.
"""

import json
from collections.abc import Mapping
from typing import Any

import cedarpy

from sidecar.errors import Denied, Reason
from sidecar.model.caller import Agent
from sidecar.model.policy import Action, Permit, Question, readings
from sidecar.model.tool import Tool
from sidecar.model.workflow import Workflow
from sidecar.policy.load import LoadedPolicy

_MEMO, _MEMO_PATH = 8192, 1024
"""Answers remembered, and the longest path in one; paths come from the agent, so the memo is emptied when full."""

_Key = tuple[str, str, str, str, str]


class Decider:
    """Embedded Cedar. Implements `ports.LeaseDecider`."""

    def __init__(self, policy: LoadedPolicy, agents: Mapping[str, Agent], tools: Mapping[str, Tool]) -> None:
        self.epoch = 0
        self._memo: dict[_Key, Permit | Denied] = {}
        self.replace(policy, agents, tools)

    def replace(self, policy: LoadedPolicy, agents: Mapping[str, Agent], tools: Mapping[str, Tool]) -> None:
        """A reload: every earlier answer is worthless from now on."""
        self._policy = policy
        self._agents = frozenset(agents)
        self._entities = cedarpy.Entities.from_json_str(json.dumps(_entities(agents, tools)))
        self.epoch += 1
        self._memo.clear()

    @property
    def digest(self) -> str:
        """SHA-256 of schema and policies."""
        return self._policy.digest

    def decide_request(self, agent: str, workflow_name: str, tool: Tool, method: str, path: str) -> Permit:
        """One call. Raises `Denied`. A repeated question costs a dictionary look-up."""
        key = (agent, workflow_name, tool.name, method, path)
        answer = self._memo.get(key)
        if answer is None:
            answer = self._decide_request(agent, workflow_name, tool, method, path)
            if len(self._memo) >= _MEMO:
                self._memo.clear()
            if len(path) <= _MEMO_PATH:
                self._memo[key] = answer
        if isinstance(answer, Denied):
            raise Denied(answer.reason, answer.detail)
        return answer

    def _decide_request(self, agent: str, workflow_name: str, tool: Tool, method: str, path: str) -> Permit | Denied:
        question = Question(agent, Action.HTTP_REQUEST, tool.name, workflow_name, method, path)
        try:
            reasons = [
                r for reading in readings(path) for r in self._yes(question, {"method": method, "path": reading})
            ]
            return self._permit(question, reasons, tool.scopes)
        except Denied as denied:
            return denied.with_traceback(None)  # it would keep the frames, and all that they hold

    def decide_open(self, agent: str, name: str) -> Permit:
        """May `agent` open a workflow of this name? Raises `Denied`."""
        return self._ask(Question(agent, Action.WORKFLOW_OPEN, workflow_name=name), {}, ())

    def decide_exchange(self, workflow: Workflow, tool: Tool, scopes: tuple[str, ...]) -> Permit:
        """May the workflow's agent ask for a credential for `tool`? Raises `Denied`."""
        return self.decide_lease(Action.TOKEN_EXCHANGE, workflow, tool, scopes)

    def decide_lease(self, action: Action, workflow: Workflow, tool: Tool, scopes: tuple[str, ...]) -> Permit:
        """Issue, renewal, exchange. Raises `Denied`. Never from the memo: it is rare, and an epoch may have passed."""
        question = Question(workflow.agent, action, tool.name, workflow.name)
        return self._ask(question, {"scopes": list(scopes)}, scopes)

    def _ask(self, question: Question, context: dict[str, Any], scopes: tuple[str, ...]) -> Permit:
        return self._permit(question, self._yes(question, context), scopes)

    def _yes(self, question: Question, context: dict[str, Any]) -> list[str]:
        """Cedar's ids of the policies that permit it. Raises `Denied`."""
        if question.agent not in self._agents:
            raise Denied(Reason.POLICY_DENIED, f"agent {question.agent} is declared no more")
        resource = ("Spanlock::Tool", question.tool) if question.tool else ("Spanlock::Sidecar", "self")
        request = {
            "principal": {"type": "Spanlock::Agent", "id": question.agent},
            "action": {"type": "Spanlock::Action", "id": str(question.action)},
            "resource": {"type": resource[0], "id": resource[1]},
            "context": {"environment": self._policy.environment, "workflow": question.workflow_name, **context},
        }
        try:
            result = cedarpy.is_authorized(request, self._policy.policies, self._entities)
        except Exception:  # noqa: BLE001 - the engine raises bare exceptions; whatever it is, it is no yes
            raise Denied(Reason.POLICY_ERROR, f"the policy engine failed on {question.action}") from None
        reasons = [str(reason) for reason in result.diagnostics.reasons]
        if result.diagnostics.errors:
            raise Denied(Reason.POLICY_ERROR, f"a policy failed while it was evaluated for {question.action}")
        if not result.allowed:
            raise Denied(Reason.POLICY_DENIED, self._why_not(question, reasons))
        return reasons

    def _why_not(self, question: Question, reasons: list[str]) -> str:
        what = f"{question.action} by agent {question.agent}" + (f" on tool {question.tool}" if question.tool else "")
        names = ", ".join(self._policy.obligations[r].id for r in reasons if r in self._policy.obligations)
        return f"{what}: forbidden by {names}" if names else f"{what}: no policy permits it"

    def _permit(self, question: Question, reasons: list[str], scopes: tuple[str, ...]) -> Permit:
        satisfied = [self._policy.obligations[reason] for reason in set(reasons) if reason in self._policy.obligations]
        if not satisfied:
            raise Denied(Reason.POLICY_ERROR, "the policy engine named no policy for its yes")
        # None configured: whatever the issuer gives, unless policy names some.
        narrowed = frozenset(scopes) if scopes else None
        for obligation in satisfied:
            if obligation.scopes is not None:
                narrowed = obligation.scopes if narrowed is None else narrowed & obligation.scopes
        if narrowed is not None and not narrowed:
            raise Denied(Reason.POLICY_DENIED, f"the policies for tool {question.tool} leave no scope in common")
        ttl = min(obligation.ttl for obligation in satisfied)
        names = tuple(sorted(obligation.id for obligation in satisfied))
        return Permit(question, tuple(sorted(narrowed or ())), ttl, names, self.epoch)


def _entities(agents: Mapping[str, Agent], tools: Mapping[str, Tool]) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = [{"uid": {"type": "Spanlock::Sidecar", "id": "self"}, "attrs": {}, "parents": []}]
    for agent in agents.values():
        trust_domain = agent.spiffe_id.removeprefix("spiffe://").partition("/")[0]
        attributes = {"spiffe_id": agent.spiffe_id, "trust_domain": trust_domain}
        listed.append({"uid": {"type": "Spanlock::Agent", "id": agent.name}, "attrs": attributes, "parents": []})
    for tool in tools.values():
        attributes = {"host": tool.authority.host, "scheme": tool.scheme, "token_check": str(tool.token_check)}
        listed.append({"uid": {"type": "Spanlock::Tool", "id": tool.name}, "attrs": attributes, "parents": []})
    return listed
