"""YAML as configuration is written in it: text keys, once each, no aliases, and every problem with its line."""

import os
from pathlib import Path
from typing import Any

import yaml

from sidecar.errors import ConfigError, Reason

_MAX_FILE = 1 << 20


class _Strict(yaml.SafeLoader):
    """Refuses duplicate keys and aliases: both hide what a reader would think is there."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The constructors of dates, numbers and so on raise whatever comes to them for text like `2001-13-45` or `0b_`."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError, TypeError):
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None, None, f"the value is not a valid {kind}; put text in quotes", node.start_mark
            ) from None

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


def read(path: Path) -> str:
    """The text of a configuration file. Raises `ConfigError`."""
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ConfigError(Reason.CONFIG_INVALID, f"{path} is over 1 MiB")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(Reason.CONFIG_INVALID, f"{path} cannot be read: {error.strerror}") from None
    except UnicodeError:
        raise ConfigError(Reason.CONFIG_INVALID, f"{path} cannot be read: it is not UTF-8") from None


def keys(text: str, name: str) -> dict[str, Any]:
    """The top level of `text`; `name` is for messages. Raises `ConfigError`."""
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
    return raw


def run_dir(path: Path) -> Path | None:
    """`run_dir` of a configuration, whatever else is wrong with it; None when it names none. Raises `ConfigError`."""
    named = keys(read(path), str(path)).get("run_dir")
    return path.parent.resolve() / named if isinstance(named, str) else None


def named(explicit: str | None) -> Path | None:
    """The file that is named by -c, then by SPANLOCK_CONFIG. Raises `ConfigError` when it is none."""
    name = explicit or os.environ.get("SPANLOCK_CONFIG")
    if not name:
        return None
    path = Path(name)
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        raise ConfigError(Reason.CONFIG_INVALID, f"{path} {what}; name the configuration with -c FILE")
    return path
