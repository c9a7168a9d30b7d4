"""A metric that another distribution ships: installed with pip, listed with its owner, scored with, recorded."""

import os
import subprocess
import sys

import cli_tiny
import pytest

from layerprune.documents import Plan, Scores

METRIC = '''\
"""Prefers even layers."""
from dataclasses import dataclass
from typing import ClassVar
from layerprune.documents import Candidate

@dataclass(frozen=True)
class Parity:
    """Odd layers are worth more."""
    bonus: float = 1.0
    unit: ClassVar[str] = "oddness"
    scope: ClassVar[str] = "any set"
    needs: ClassVar[str] = "nothing"
    cost: ClassVar[str] = "none"
    source: ClassVar[str] = "a test"
    search: ClassVar[str] = "one-shot"

    def score(self, subject, removals, data):
        return [Candidate(removal=r.units, score=sum(self.bonus * (u % 2) for u in r)) for r in removals]
'''
PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "prune-parity"
version = "0.3"
[project.entry-points."layerprune.metrics"]
parity = "prune_parity:Parity"
[tool.setuptools]
py-modules = ["prune_parity"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The distribution, installed by pip into a folder of its own."""
    home = tmp_path_factory.mktemp("third")
    source, target = home / "source", home / "site"
    source.mkdir()
    (source / "prune_parity.py").write_text(METRIC)
    (source / "pyproject.toml").write_text(PROJECT)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True, text=True)
    cli_tiny.make(home)
    return home


def run(home, *words):
    environment = {**os.environ, "PYTHONPATH": str(home / "site")}
    command = [sys.executable, "-m", "layerprune", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_metric_is_under_twenty_lines():
    assert len(METRIC.splitlines()) < 20


def test_it_is_listed_with_its_owner_and_options(installed):
    listed = run(installed, "metrics")
    assert listed.returncode == 0, listed.stderr
    assert "prune-parity 0.3" in next(line for line in listed.stdout.splitlines() if line.strip().startswith("parity"))
    one = run(installed, "metrics", "parity").stdout
    assert "Odd layers are worth more." in one
    assert "bonus" in one


def test_it_plans_and_its_owner_is_recorded(installed):
    out = installed / "run"
    done = run(installed, "plan", installed / "base", "--metric", "parity:bonus=0.5", "--drop", 2, "-o", out)
    assert done.returncode == 0, done.stderr
    scores, plan = Scores.load(out / "scores.json"), Plan.load(out / "plan.json")
    assert plan.removal == (0, 2)
    assert scores.metric.owner == "prune-parity 0.3"
    assert scores.metric.spec == "parity:bonus=0.5"
    assert scores.metric.options == {"bonus": 0.5}
    assert scores.metric.unit == "oddness"


def test_without_the_distribution_the_name_is_unknown():
    assert cli_tiny.refused("metrics", "parity").startswith("unknown metric 'parity'")
