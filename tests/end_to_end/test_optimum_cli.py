"""``optimum-cli layerprune``: the same commands, found by optimum-cli in the installed package."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

from checkout import ROOT
from layerprune.cli.command import COMMANDS


def optimum_cli(folder, *words):
    script = Path(sys.executable).parent / "optimum-cli"
    return subprocess.run([script, *words], cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_command_says_what_it_says_under_its_own_name(tmp_path):
    ours = [sys.executable, "-m", "layerprune", "metrics", "cosine"]
    expected = subprocess.run(ours, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found = optimum_cli(tmp_path, "layerprune", "metrics", "cosine")
    assert found.returncode == 0, found.stderr
    assert "'all' | 'last'" in expected
    assert found.stdout == expected


def test_faults_take_one_line_and_exit_code_2(tmp_path):
    found = optimum_cli(tmp_path, "layerprune", "plan", "nowhere", "--tsks", "x")
    assert found.returncode == 2
    assert found.stderr == (
        "layerprune: No such option '--tsks'. Did you mean '--tasks'? (see optimum-cli layerprune plan --help)\n"
    )


@pytest.mark.parametrize("words", [["layerprune", "--help"], ["layerprune"]])
def test_every_command_is_listed(tmp_path, words):
    found = optimum_cli(tmp_path, *words)
    listed = " ".join((found.stdout + found.stderr).split())  # without words click shows help as a fault's answer
    assert all(text in listed for text, _ in COMMANDS.values())


def test_the_file_is_packaged_beside_the_package_alone_and_hides_nothing_of_optimum():
    where = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packaged = find_namespace_packages(str(ROOT), **where)
    assert "optimum.commands.register" in packaged
    assert {name.partition(".")[0] for name in packaged} == {"layerprune", "optimum"}  # no example, tool or test
    assert not list((ROOT / "optimum").rglob("__init__.py"))
