"""The rules of the house that no linter knows."""

import ast
import re
import tomllib
from itertools import takewhile
from pathlib import Path

import pytest

from sidecar.control import rescue as grpc_rescue
from sidecar.errors import EXPLANATIONS, Reason
from sidecar.proxy import rescue as http_rescue

ROOT = Path(__file__).parents[1] / "sidecar"
LINTED = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["importlinter"]
PACKAGES = sorted(
    str(path.parent.relative_to(ROOT)) for path in ROOT.glob("**/__init__.py") if "wire" not in path.parts
)
PACKAGES.remove(".")
REVEAL = {
    "secret.py", "credentials/header.py", "credentials/exchangers/token_exchange.py", "credentials/exchangers/http.py",
    "workflows/registry.py", "control/workflows_service.py", "control/token_exchange_service.py", "identity/source.py",
}  # fmt: skip


def sources() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if "wire" not in path.parts]


def modules_in(package: Path) -> set[str]:
    files, packages = package.glob("[a-z]*.py"), package.glob("*/__init__.py")
    return {path.stem for path in files} | {path.parent.name for path in packages}


def written_in(pattern: str) -> set[str]:
    return {str(path.relative_to(ROOT)) for path in sources() if re.search(pattern, path.read_text())}


def test_reveal_is_called_in_a_few_named_files() -> None:
    assert written_in(r"\breveal\(") == REVEAL


def test_proofs_are_made_in_one_place() -> None:
    assert written_in(r"(?<!class )\bPermit\(") == {"policy/decider.py"}
    assert written_in(r"(?<!class )\bOutboundRequest\(") == {"proxy/inject.py"}


def test_one_file_reads_heads() -> None:
    assert written_in(r"HTTP/1\\.\(\[01\]\)") == {"proxy/http1.py"}


def test_what_every_section_is_made_of_stands_once() -> None:
    assert written_in(r"extra=\"forbid\"") == {"section.py"}
    assert written_in(r"\[a-z0-9\]\[a-z0-9-\]\{0,62\}") == {"section.py"}


@pytest.mark.parametrize("table", [EXPLANATIONS, http_rescue.STATUS, grpc_rescue.CODE])
def test_every_reason_has_its_row(table: dict[Reason, object]) -> None:
    assert set(table) == set(Reason)


def test_packages_hold_no_logic_in_init() -> None:
    for path in ROOT.rglob("__init__.py"):
        code = re.sub(r'^""".*?"""', "", path.read_text(), flags=re.S).strip()
        assert code in ("", '__version__ = "0.1.0"'), path


def test_the_architecture_page_shows_the_levels_that_are_checked() -> None:
    page = ast.get_docstring(ast.parse((ROOT / "__init__.py").read_text())) or ""
    blocks = re.findall(r"^(?: {4}[a-z_]+(?:/|\.py).*\n)+", page, re.M)
    names = [{name for line in block.splitlines() for name in _names_at_the_start(line)} for block in blocks]
    (layers,) = (c for c in LINTED["contracts"] if c["type"] == "layers")
    levels = [set(layer.split(" | ")) for layer in layers["layers"]]
    assert names == [*levels, set(layers["exhaustive_ignores"])]


def _names_at_the_start(line: str) -> list[str]:
    """`a.py b.py what they are` begins with a and b."""
    words = takewhile(lambda word: word.endswith(("/", ".py")), line.split())
    return [word.removesuffix("/").removesuffix(".py") for word in words]


def test_what_stands_apart_may_import_nothing_else_of_ours_but_wire() -> None:
    for contract in LINTED["contracts"]:
        if contract["type"] == "forbidden":
            named = {
                name.removeprefix("sidecar.")
                for key in ("source_modules", "forbidden_modules")
                for name in contract[key]
            }
            assert named == modules_in(ROOT) - {"wire"}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_names_each_of_its_modules(package: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())) or ""
    assert not modules_in(ROOT / package) - set(re.findall(r"`(\w+)/?`", said))
