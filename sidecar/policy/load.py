"""Cedar policies from files: parsed once, validated against the shipped schema, their obligations checked.

Cedar itself passes unknown annotations (`@tll`), so names and values are checked here. A schema is always used.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import cedarpy

from sidecar.errors import ConfigError, Reason
from sidecar.policy.config import PolicyConfig

_KNOWN = ("id", "ttl", "scopes")
_MAX_FILE = 1 << 20
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


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


def schema_text() -> str:
    """The shipped Cedar schema."""
    return files("sidecar.policy").joinpath("schema.cedarschema").read_text(encoding="utf-8")


def load_policy(config: PolicyConfig) -> LoadedPolicy:
    """Reads and validates everything. Raises `ConfigError` (policy_invalid) that names the file or policy, and the fix."""
    text = "\n".join(_read(Path(name)) for name in config.files)
    return parse_policy(text, config.environment)


def parse_policy(text: str, environment: str) -> LoadedPolicy:
    """The same from text. Raises `ConfigError`."""
    try:
        policies = cedarpy.PolicySet.from_str(text)
    except Exception as error:  # noqa: BLE001 - cedarpy raises bare exceptions; whatever it is, the policy is not loaded
        raise _invalid(f"cannot be parsed: {error}") from None
    schema = schema_text()
    result = cedarpy.validate_policies(text, schema)
    if not result.validation_passed:
        raise _invalid("; ".join(str(getattr(e, "error", e)) for e in result.errors))
    described = json.loads(cedarpy.policies_to_json_str(text))
    obligations = {key: _obligations(key, policy) for key, policy in described.get("staticPolicies", {}).items()}
    digest = hashlib.sha256((schema + "\0" + text).encode()).hexdigest()
    return LoadedPolicy(policies, obligations, digest, environment)


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


def _obligations(key: str, policy: dict[str, Any]) -> Obligations:
    annotations: dict[str, Any] = policy.get("annotations", {})
    name = str(annotations.get("id") or key)
    for annotation in annotations:
        if annotation not in _KNOWN:
            raise _invalid(f"{name}: unknown annotation @{annotation}; known are @id, @ttl and @scopes")
    if policy.get("effect") == "forbid" and (set(annotations) - {"id"}):
        raise _invalid(f"{name}: obligations belong on permit, not on forbid")
    return Obligations(name, _ttl(name, annotations.get("ttl")), _scopes(name, annotations.get("scopes")))


def _ttl(name: str, value: str | None) -> float:
    if value is None:
        return float("inf")
    if not value.isdecimal() or not 1 <= int(value) <= 86400:
        raise _invalid(f'{name}: @ttl("{value}") is not a whole number of seconds from 1 to 86400')
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
