"""What `spanlock explain` tells a user to do can be done: the keys, commands and functions that it names are there."""

import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from sidecar.config.schema import Settings
from sidecar.errors import EXPLANATIONS
from sidecar.model.endings import AT_THE_ISSUER, CLOSED_BY
from sidecar.model.lease import IssuerOutcome
from sidecar.model.workflow import CloseReason
from sidecar.section import Section

SAID = [*EXPLANATIONS.items(), *CLOSED_BY.items(), *AT_THE_ISSUER.items()]
NAMED = sorted({word for _, said in SAID for text in said for word in re.findall(r"`([^`]+)`", text)})


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field of this type holds: itself, in a tuple, or one of several kinds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)


def sections_below(section: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield section
    for field in section.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from sections_below(inner)


def is_key(word: str) -> bool:
    """Whether `word` is a key path from the root, or by itself a key of some section, where the text says of which."""
    first, *rest = re.sub(r":.*", "", word).split(".")
    holders = [section for section in sections_below(Settings) if first in section.model_fields]
    if rest:
        holders = [Settings] if first in Settings.model_fields else []
    for key in rest:
        fields = [holder.model_fields[first] for holder in holders]
        holders = [s for field in fields for s in sections_in(field.annotation) if key in s.model_fields]
        first = key
    return bool(holders)


def is_there(word: str) -> bool:
    if word.startswith("spanlock "):
        return find_spec(f"sidecar.cli.{word.split()[1]}") is not None
    if word.endswith("()"):
        module, _, function = word.removesuffix("()").rpartition(".")
        return callable(getattr(import_module(module), function, None))
    return is_key(word)


@pytest.mark.parametrize("word", NAMED)
def test_what_an_explanation_names_is_there(word: str) -> None:
    assert is_there(word)


def test_a_key_is_found_where_it_is_and_nowhere_else() -> None:
    for key in (
        "tools:",
        "max_uses",
        "secret_env",
        "tools.timeouts.idle",
        "tools.introspection.client_id",
        "issuers.kind",
    ):
        assert is_key(key)
    for key in ("tool:", "limits.workflows", "credentials.max_uses", "timeouts.idle", "tools.timeouts.idle.seconds"):
        assert not is_key(key)


def test_every_end_is_explained_and_no_word_means_two_things() -> None:
    assert set(CLOSED_BY) == set(CloseReason) and set(AT_THE_ISSUER) == set(IssuerOutcome)
    words = [str(word) for word, _ in SAID]
    assert len(words) == len(set(words))
