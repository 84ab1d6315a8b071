"""Reads spanlock.yaml: strict YAML, every problem with its key path. Never from the working directory unasked (L3)."""

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sidecar.config.schema import Settings
from sidecar.errors import ConfigError, Reason
from sidecar.proxy.config import ListenersConfig

_MAX_FILE = 1 << 20
_DEFAULT = Path("/etc/spanlock/spanlock.yaml")


class _Strict(yaml.SafeLoader):
    """Refuses duplicate keys and aliases: both hide what a reader would think is there."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "keys must be text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not supported")
        return super().compose_node(parent, index)


def find_config(explicit: str | None) -> Path:
    """-c, then SPANLOCK_CONFIG, then /etc/spanlock/spanlock.yaml. Raises `ConfigError` when there is none."""
    named = explicit or os.environ.get("SPANLOCK_CONFIG")
    path = Path(named) if named else _DEFAULT
    if not path.is_file():
        raise ConfigError(Reason.CONFIG_INVALID, f"{path} does not exist; name the configuration with -c FILE")
    return path


def load(path: Path) -> Settings:
    """The validated settings. Raises `ConfigError` whose detail holds one line a problem."""
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ConfigError(Reason.CONFIG_INVALID, f"{path} is over 1 MiB")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(Reason.CONFIG_INVALID, f"{path} cannot be read ({type(error).__name__})") from None
    return parse(text, str(path), path.parent)


def parse(text: str, name: str, directory: Path) -> Settings:
    """The same from text; `name` is for messages, relative files are in `directory`. Raises `ConfigError`."""
    try:
        raw = yaml.load(text, Loader=_Strict)  # noqa: S506 - a SafeLoader made stricter
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(
            Reason.CONFIG_INVALID, f"{name}{where}: {getattr(error, 'problem', 'not valid YAML')}"
        ) from None
    if not isinstance(raw, dict):
        raise ConfigError(Reason.CONFIG_INVALID, f"{name}: the top level must be keys such as agents: and tools:")
    try:
        return Settings.model_validate(raw, context={"directory": directory.resolve()})
    except ValidationError as error:
        raise ConfigError(Reason.CONFIG_INVALID, "\n".join(_line(problem) for problem in error.errors())) from None


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


def _line(problem: Any) -> str:
    """`tools[0].url: what is wrong; fix: what to do`. The input itself is left out: it may be a secret in a wrong place."""
    path = ""
    for part in problem["loc"]:
        if part not in ("token_exchange", "static"):
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    message = str(problem["msg"]).removeprefix("Value error, ")
    fix = _FIXES.get(problem["type"])
    return f"{path or 'spanlock.yaml'}: {message}" + (f"; fix: {fix}" if fix else "")
