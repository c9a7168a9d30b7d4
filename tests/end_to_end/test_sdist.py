"""The source distribution: all that git tracks and nothing else, so that its own tests run where it is unpacked."""

import subprocess
import sys

import pytest

from checkout import ROOT
from source_tree import copied, tracked, unpacked, walked

STRAY = (
    "tests/__pycache__/test_api.cpython-311.pyc", "examples/demo/__pycache__/gguf.cpython-311.pyc",
    "layerprune/__pycache__/api.cpython-311.pyc", ".venv/bin/python", ".venv-pure/bin/python",
    "tests/.pytest_cache/README.md", "docs/.ruff_cache/CACHEDIR.TAG", ".coverage", "build/lib/layerprune/api.py",
    "dist/layerprune-0.0.0.tar.gz", "layerprune-demo/report.html", "run/plan.json", "smaller/config.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The project's files, among what work leaves beside them."""
    folder = copied(tracked(), tmp_path_factory.mktemp("sdist") / "source")
    for name in STRAY:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stray")
    return folder


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    return unpacked(source, tmp_path_factory.mktemp("unpacked"))


def test_it_holds_every_file_of_the_project_and_no_other(sdist):
    held = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert {name for name in held - tracked() if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}
    assert tracked() - held == set()
    assert {"tests/end_to_end/test_sdist.py", "recipes/quickstart.yaml", "Makefile", ".ci/run"} <= held
    for name in tracked():
        assert (sdist / name).read_bytes() == (ROOT / name).read_bytes(), name
        assert (sdist / name).stat().st_mode == (ROOT / name).stat().st_mode, name


def test_where_there_is_no_git_its_files_are_those_that_lie_there(source, sdist):
    assert walked(sdist) == tracked()
    assert walked(source) == tracked()


def test_its_tests_run_where_it_is_unpacked(sdist):
    """Some that read files of the project; `make test` runs the others there, which takes long."""
    tests = ["tests/test_dependencies.py", "tests/artifacts/test_recipe.py", "tests/test_removal.py"]
    command = [sys.executable, "-m", "pytest", "--pure", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, capture_output=True, text=True, cwd=sdist)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout.splitlines()[-1]
