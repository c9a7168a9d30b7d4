"""A module imports only from its own row or rows above it: the table of docs/ARCHITECTURE.md, held against the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "layerprune"
HEAVY = {"torch", "transformers", "lm_eval", "datasets", "safetensors", "accelerate", "peft", "huggingface_hub"}


def rows():
    """Return the rooms of each row of the table, top row first."""
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
    lines = re.findall(r"^\| (\w+)[^|]*\| (`.*) \|$", text, re.M)
    found = [(row, re.findall(r"`(\w+)`", cells)) for row, cells in lines]
    assert [row for row, _ in found] == ["pure", "reading", "torch", "verbs", "shell"]
    return found


ROW_OF = {room: number for number, (_, rooms) in enumerate(rows()) for room in rooms}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree):
    """Return (line, module) of every import in a file, those inside functions too, but not those for types alone."""
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            parts = [f"{node.module}.{alias.name}" for alias in node.names]  # `from layerprune import documents`
            yield from ((node.lineno, name) for name in (parts if node.module == "layerprune" else [node.module]))


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_from_its_row_or_above(path):
    room = room_of(path)
    assert room in ROW_OF, f"{room} stands in no row of docs/ARCHITECTURE.md"
    for line, module in imports(ast.parse(path.read_text())):
        parts = module.split(".")
        if parts[0] != "layerprune" or len(parts) == 1 or parts[1] == "__version__":
            continue
        if (path.name, module) == ("plan.py", "layerprune.models.bypass") and room == "artifacts":
            continue  # Plan.applied, as docs/ARCHITECTURE.md says
        assert ROW_OF[parts[1]] <= ROW_OF[room], f"{path.name}:{line}: {room} must not import {module}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_pure_row_names_nothing_heavy(path):
    if ROW_OF[room_of(path)] > 0:
        return
    for line, module in imports(ast.parse(path.read_text())):
        assert module.partition(".")[0] not in HEAVY, f"{path.name}:{line}: the pure row must not import {module}"


def test_the_pure_row_loads_nothing_heavy():
    pure = [f"layerprune.{room}" for room, row in ROW_OF.items() if row == 0]
    code = f"import sys, {', '.join(pure)}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_room_of_the_table_exists():
    for room in ROW_OF:
        assert (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file(), f"{room} is in the table only"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_shell_prints_and_exits(path):
    if room_of(path) == "cli":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "sys.exit", "exit", "quit", "os._exit"), f"{path}:{node.lineno}: {called}"
