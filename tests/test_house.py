"""The house: rows and rooms as docs/ARCHITECTURE.md has them, no import circle, and files and classes a newcomer finds.

A module imports only from its own row or rows above it. Imports inside functions count everywhere; only those for type
checkers do not.
"""

import ast
import re
import subprocess
import sys

import pytest

from checkout import ROOT
from rooms import HEAVY, PACKAGE, PROJECT, PURE, ROW_OF, TESTS, Refusal, is_pure


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


def loaded_by(code):
    """Return which heavy packages a process of its own has loaded after ``code``."""
    code = f"{code}\nimport sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def test_the_pure_row_loads_nothing_heavy():
    modules = [dotted(path) for path in MODULES if room_of(path) in PURE]
    assert len(modules) > len(PURE)
    assert loaded_by(f"import {', '.join(modules)}") == "[]"
    assert loaded_by("import sys; sys.modules['torch'] = None") == "['torch']"  # what is asked can be seen


def collected(*options):
    """Return which files of tests pytest reads with ``options``, relative to ``tests/``, and how it ended."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "-o", "addopts=-q", *options]
    done = subprocess.run([*command, "--import-mode=importlib"], capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith("tests/")]
    return {line.partition("::")[0].removeprefix("tests/") for line in lines}, done.returncode, done.stdout


def test_the_pure_rooms_tests_do_without_anything_heavy():
    """`make pure` runs them; here they are only read, while importing torch is an error."""
    found, code, said = collected("--pure")
    assert code == 0, said
    expected = {path.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py") if is_pure(path)}
    assert found == expected
    assert {"test_house.py", "test_files_output.py", "artifacts/test_base.py", "stats/test_ranking.py"} <= expected
    assert not {"test_recipes.py", "models/test_bypass.py"} & expected


def test_a_test_of_another_row_that_is_named_all_the_same_is_refused():
    _, code, said = collected("--pure", "tests/models/test_bypass.py")
    assert code != 0
    assert "torch is heavy: the pure rooms and their tests do without it" in said


def test_what_is_heavy_is_refused_by_name():
    with pytest.raises(ImportError, match=r"torch\.nn is heavy"):
        Refusal().find_spec("torch.nn")
    assert Refusal().find_spec("numpy") is None


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


SMALL = {"__main__", "errors"}  # as long as what they say takes
LARGEST, SMALLEST = 500, 100  # lines
PARTICIPLE = re.compile(r".*[a-z]ed$|made|shown|written|found|kept|proven|taken|given|chosen|drawn|seen|ran$")
NOUNS = {"seed", "speed"}


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path):
    """Return the modules of the package that a file imports, the package's own face left out."""
    known = {dotted(each) for each in MODULES}
    tree = ast.parse(path.read_text())
    heavy_free = {line for line, _ in imports(tree)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.lineno in heavy_free:
            found |= {name if (name := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
        elif isinstance(node, ast.Import) and node.lineno in heavy_free:
            found |= {alias.name for alias in node.names}
    return (found & known) - {dotted(path)}


def test_no_import_goes_in_a_circle():
    follows = {dotted(path): imported(path) for path in MODULES}
    while free := {
        module for module, needs in follows.items() if not needs
    }:  # take away what needs nothing, repeatedly
        follows = {module: needs - free for module, needs in follows.items() if module not in free}
    assert not follows, f"these import one another, or what does: {sorted(follows)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_is_neither_a_crumb_nor_a_heap(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LARGEST
    if path.name != "__init__.py" and path.stem not in SMALL:
        assert lines >= SMALLEST, f"{lines} lines: it belongs to the module that uses it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_named_by_nouns(path):
    for name in path.relative_to(PACKAGE).with_suffix("").parts:
        assert name in NOUNS or not any(PARTICIPLE.fullmatch(word) for word in name.split("_")[-1:]), name


def test_no_class_name_has_two_meanings():
    homes = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


OUTSIDE = {"support", "end_to_end", "demo"}  # not of one room


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_tests_stand_where_their_module_does(path):
    room = path.parent.relative_to(TESTS)
    if room.parts[:1] and room.parts[0] in OUTSIDE:
        return
    subject = path.stem.removeprefix("test_")
    modules = {module.stem for module in (PACKAGE / room).glob("*.py")}
    named = any(subject == module or subject.startswith(f"{module}_") for module in modules)
    assert named or (not room.parts and subject in PROJECT), f"no module of {PACKAGE.name}/{room} is called so"


def private_names():
    """Return what the package keeps to itself: names of functions, methods and classes with one leading underscore."""
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
    return {name for name in found if re.fullmatch(r"_[a-z]\w*[a-z0-9]", name)}


PRIVATE = private_names()


@pytest.mark.parametrize(
    "path", [*sorted(TESTS.rglob("*.py")), *sorted((ROOT / "benchmarks").glob("*.py"))], ids=lambda path: path.name
)
def test_no_test_reaches_for_a_private_name(path):
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    reached = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            reached.append((node.lineno, node.attr))
        elif isinstance(node, ast.alias):
            reached.append((node.lineno, node.name))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "getattr", "patch", "object")):
            words = [each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            reached += [(node.lineno, word.rpartition(".")[2]) for word in words]
    assert [(line, name) for line, name in reached if name in PRIVATE - own] == []
