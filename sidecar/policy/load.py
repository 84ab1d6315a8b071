"""Cedar policies from files: parsed once, validated against the shipped schema, their obligations checked.

Cedar itself passes unknown annotations (`@tll`), so names and values are checked here. A schema is always used.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import cedarpy

from sidecar.errors import ConfigError, Reason
from sidecar.policy.config import PolicyConfig
from sidecar.policy.text import Statement, statements

_KNOWN = ("id", "ttl", "scopes")
_MAX_FILE = 1 << 20
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")
_MAX_DIGITS = 20


@dataclass(frozen=True, slots=True)
class Obligations:
    """What a satisfied permit asks for. `scopes` None: it says nothing of them."""

    id: str
    ttl: float
    scopes: frozenset[str] | None


@dataclass(frozen=True)
class LoadedPolicy:
    """A whole valid policy. Immutable; a reload makes a new one."""

    policies: Any
    obligations: dict[str, Obligations]
    """By Cedar's own policy id."""
    digest: str
    environment: str
    named: frozenset[tuple[str, str]] = frozenset()
    """Type and id of every entity that it speaks of by name."""


def schema_text() -> str:
    """The shipped Cedar schema."""
    return files("sidecar.policy").joinpath("schema.cedarschema").read_text(encoding="utf-8")


def load_policy(config: PolicyConfig) -> LoadedPolicy:
    """Reads and validates everything. Raises `ConfigError` (policy_invalid) that names the file, the line and the fix."""
    return _load([(name, _read(Path(name))) for name in config.files], config.environment)


def parse_policy(text: str, environment: str) -> LoadedPolicy:
    """The same from text. Raises `ConfigError`."""
    return _load([("policy", text)], environment)


def _load(texts: list[tuple[str, str]], environment: str) -> LoadedPolicy:
    found = [statement for name, text in texts for statement in statements(name, text)]
    for statement in found:
        if statement.too_deep:
            raise _invalid(f"{statement.where}: {statement.too_deep}")
    text = "\n".join(text for _, text in texts)
    try:
        policies = cedarpy.PolicySet.from_str(text)
    except Exception as error:  # noqa: BLE001 - cedarpy raises bare exceptions; whatever it is, the policy is not loaded
        raise _invalid(f"{_where_not_parsed(found)}: {error}") from None
    schema = schema_text()
    result = cedarpy.validate_policies(text, schema)
    if not result.validation_passed:
        raise _invalid("; ".join(dict.fromkeys(_placed(str(getattr(e, "error", e)), found) for e in result.errors)))
    described = _described(text)
    obligations = {key: _obligations(found[_index(key)].where, key, policy) for key, policy in described.items()}
    digest = hashlib.sha256((schema + "\0" + text).encode()).hexdigest()
    return LoadedPolicy(policies, obligations, digest, environment, frozenset(_named(described)))


def _where_not_parsed(found: list[Statement]) -> str:
    """The engine does not say where: each policy is tried alone."""
    for statement in found:
        try:
            cedarpy.PolicySet.from_str(statement.text)
        except Exception:  # noqa: BLE001 - as above
            return f"{statement.where}: the policy that begins there cannot be parsed"
    return "cannot be parsed"


def _index(key: str) -> int:
    """Cedar's own policy ids are policy0, policy1 and so on, in the order of the text."""
    return int(key.removeprefix("policy"))


def _placed(error: str, found: list[Statement]) -> str:
    """A validation error with the policy's place instead of Cedar's number for it."""
    match = re.fullmatch(r"for policy `(policy\d+)`, (.*)", error, re.DOTALL)
    return f"{found[_index(match[1])].where}: {match[2]}" if match is not None else error


def _described(text: str) -> dict[str, Any]:
    """Each policy as Cedar's JSON has it."""
    try:
        described: dict[str, Any] = json.loads(cedarpy.policies_to_json_str(text)).get("staticPolicies", {})
    except RecursionError:
        raise _invalid("a policy is nested too deeply; make several of it") from None
    return described


def _named(described: Any) -> Iterator[tuple[str, str]]:
    """Type and id of every entity that the policies speak of by name."""
    left = [described]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, dict):
            left += part.values()
            if part.keys() == {"type", "id"} and isinstance(part["type"], str) and isinstance(part["id"], str):
                yield part["type"], part["id"]


def _invalid(what: str) -> ConfigError:
    return ConfigError(Reason.POLICY_INVALID, f"policy: {what}")


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_FILE:
            raise _invalid(f"{path} is over 1 MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise _invalid(
            f"policy.files: {path} cannot be read ({type(error).__name__}); paths are relative to spanlock.yaml"
        ) from None


def _obligations(where: str, key: str, policy: dict[str, Any]) -> Obligations:
    annotations: dict[str, Any] = policy.get("annotations", {})
    name = str(annotations.get("id") or key)
    told = f"{where}: {name}"
    for annotation in annotations:
        if annotation not in _KNOWN:
            raise _invalid(f"{told}: unknown annotation @{annotation}; known are @id, @ttl and @scopes")
    if policy.get("effect") == "forbid" and (set(annotations) - {"id"}):
        raise _invalid(f"{told}: obligations belong on permit, not on forbid")
    return Obligations(name, _ttl(told, annotations.get("ttl")), _scopes(told, annotations.get("scopes")))


def _ttl(name: str, value: str | None) -> float:
    if value is None:
        return float("inf")
    if not value.isdecimal() or len(value) > _MAX_DIGITS or not 1 <= int(value) <= 86400:
        raise _invalid(f'{name}: @ttl("{value[:20]}") is not a whole number of seconds from 1 to 86400')
    return float(value)


def _scopes(name: str, value: str | None) -> frozenset[str] | None:
    if value is None:
        return None
    scopes = frozenset(value.split(" ")) - {""}
    if not scopes:
        raise _invalid(f"{name}: @scopes is empty; name the scopes, separated by spaces")
    if not all(_SCOPE.fullmatch(scope) for scope in scopes):
        raise _invalid(f"{name}: @scopes has characters that no scope has (RFC 6749 section 3.3)")
    return scopes
