"""Reads spanlock.yaml: strict YAML, every problem with its key path. Never from the working directory unasked (L3)."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sidecar.config import strict_yaml
from sidecar.config.schema import Settings
from sidecar.errors import ConfigError, Reason
from sidecar.proxy.config import ListenersConfig

_DEFAULT = Path("/etc/spanlock/spanlock.yaml")


def find_config(explicit: str | None) -> Path:
    """-c, then SPANLOCK_CONFIG, then /etc/spanlock/spanlock.yaml. Raises `ConfigError` when there is none."""
    path = strict_yaml.named(explicit) or _DEFAULT
    if not path.is_file():
        raise ConfigError(Reason.CONFIG_INVALID, f"{path} does not exist; name the configuration with -c FILE")
    return path


def load(path: Path) -> Settings:
    """The validated settings. Raises `ConfigError` whose detail holds one line a problem."""
    return parse(strict_yaml.read(path), str(path), path.parent)


def parse(text: str, name: str, directory: Path) -> Settings:
    """The same from text; `name` is for messages, relative files are in `directory`. Raises `ConfigError`."""
    raw = strict_yaml.keys(text, name)
    try:
        return Settings.model_validate(raw, context={"directory": directory.resolve()})
    except ValidationError as error:
        raise ConfigError(Reason.CONFIG_INVALID, "\n".join(_lines(error.errors()))) from None


def embedded(settings: Settings, run_dir: str) -> Settings:
    """The same for a sidecar of one command's own: sockets in `run_dir`, ports of its own, so that many run side by side."""
    otlp = {door: "127.0.0.1:0" for door in ("grpc", "http") if getattr(settings.otlp, door) is not None}
    return settings.model_copy(
        update={
            "run_dir": run_dir,
            "health": None,
            "listeners": ListenersConfig(explicit=None, reverse="127.0.0.1:0"),
            "otlp": settings.otlp.model_copy(update=otlp),
        }
    )


_FIXES = {
    "extra_forbidden": "remove it, or check its spelling against deploy/spanlock.schema.json",
    "missing": "add it",
    "union_tag_not_found": "add kind: token_exchange or kind: static",
}
_WORDS = {
    "too_short": "write at least one entry",
    "tuple_type": "write a list: [...]",
    "model_type": "write keys and values: {key: value}",
    "model_attributes_type": "write keys and values: {key: value}",
    "ip_v4_network": "write a network: 10.1.0.0/16 or fd00::/8",
    "ip_v6_network": "write a network: 10.1.0.0/16 or fd00::/8",
}
"""Where pydantic speaks of Python's types."""


def _lines(problems: Sequence[Any]) -> Iterable[str]:
    """One line a problem. A list whose entries are wrong is not told to be empty as well."""
    places = [problem["loc"] for problem in problems]
    told = [p for p in problems if p["type"] != "too_short" or not any(_inside(p["loc"], place) for place in places)]
    return dict.fromkeys(map(_line, told))


def _inside(outer: tuple[Any, ...], inner: tuple[Any, ...]) -> bool:
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _line(problem: Any) -> str:
    """`tools[0].url: what is wrong; fix: what to do`. The input itself is left out: it may be a secret in a wrong place."""
    path = ""
    for part in problem["loc"]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("token_exchange", "static") and not part.startswith("lax-or-strict["):
            path += f".{part}" if path else part
    message = _WORDS.get(problem["type"]) or str(problem["msg"]).removeprefix("Value error, ")
    fix = _FIXES.get(problem["type"])
    return f"{path or 'spanlock.yaml'}: {message}" + (f"; fix: {fix}" if fix else "")
