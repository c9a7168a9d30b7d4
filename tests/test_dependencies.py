"""What the package imports is what pyproject.toml declares: nothing may come along by another package's grace."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from checkout import ROOT

DISTRIBUTION = {"yaml": "pyyaml"}  # where a distribution is not called as its module is
OPTIONAL: dict[str, str] = {"vllm": "vllm"}  # modules that work is done without, and the extra that brings them


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in requirements}  # type: ignore[index]


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}  # type: ignore[misc]
    return {name.partition(".")[0] for name in found} - {*sys.stdlib_module_names, "layerprune"}


FILES = sorted([*(ROOT / "layerprune").rglob("*.py"), *(ROOT / "optimum").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_declared(path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = names(project["dependencies"])
    for module in imported(path):
        name = DISTRIBUTION.get(module, module).lower().replace("_", "-")
        extra = OPTIONAL.get(module)
        assert name in (declared if extra is None else names(project["optional-dependencies"][extra])), module


def test_every_dependency_is_imported() -> None:
    """So that the list says what the package stands on."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    used = {DISTRIBUTION.get(module, module).replace("_", "-") for path in FILES for module in imported(path)}
    assert names(project["dependencies"]) <= used
