"""A metric and a search that another distribution ships: installed with pip, scored with, searched with, recorded."""

import subprocess
import sys

import pytest

import cli_tiny
from layerprune.artifacts import Plan, Scores

METRIC = '''\
"""Prefers even layers."""
from dataclasses import dataclass
from layerprune.artifacts import Candidate
from layerprune.scoring.metrics.base import Metric

@dataclass(frozen=True)
class Parity(Metric):
    """Odd layers are worth more."""
    bonus: float = 1.0
    unit, needs, cost, source = "oddness", (), "none", "a test"

    def score(self, model, removals, data):
        return [Candidate(removal=r.layers, score=sum(self.bonus * (layer % 2) for layer in r)) for r in removals]
'''
SEARCH = '''\
"""Takes every other layer."""
from dataclasses import dataclass
from layerprune.artifacts import Round
from layerprune.search import Search, SearchResult, by_importance
from layerprune.removal import Removal

@dataclass(frozen=True)
class EveryOther(Search):
    """Judge two combs of layers, the even ones from ``start`` and the odd ones, and take the better."""
    start: int = 0
    short: int = 0
    cost, source = "two removals", "a test"

    def find(self, judge, constraints, drop, *, seed=0, watch=None, others=None):
        combs = [range(first, first + 2 * (drop - self.short), 2) for first in (self.start, self.start + 1)]
        asked = tuple(judge([Removal.of(*comb) for comb in combs]))
        best = min(asked, key=by_importance)
        return SearchResult(best.removal, (Round(removed=(), candidates=asked),), (), best, nested=False)
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
[project.entry-points."layerprune.searches"]
every-other = "prune_combs:EveryOther"
[tool.setuptools]
py-modules = ["prune_parity", "prune_combs"]
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The distribution, installed by pip into a folder of its own."""
    home = tmp_path_factory.mktemp("third")
    source, target = home / "source", home / "site"
    source.mkdir()
    (source / "prune_parity.py").write_text(METRIC)
    (source / "prune_combs.py").write_text(SEARCH)
    (source / "pyproject.toml").write_text(PROJECT)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", target, source], check=True, capture_output=True, text=True)
    cli_tiny.make(home)
    return home


def run(home, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home / "site")
        return cli_tiny.layerprune(*words)


def test_metric_and_search_are_under_twenty_lines():
    assert len(METRIC.splitlines()) < 20
    assert len(SEARCH.splitlines()) < 20


def test_it_is_listed_with_its_owner_and_options(installed):
    listed = run(installed, "metrics")
    assert listed.exit_code == 0, listed.stderr
    assert "prune-parity 0.3" in next(line for line in listed.stdout.splitlines() if line.strip().startswith("parity"))
    one = run(installed, "metrics", "parity").stdout
    assert "Odd layers are worth more." in one
    assert "bonus" in one


def test_it_plans_and_its_owner_is_recorded(installed):
    out = installed / "run"
    done = run(installed, "plan", installed / "base", "--metric", "parity:bonus=0.5", "--drop", 2, "-o", out)
    assert done.exit_code == 0, done.stderr
    scores, plan = Scores.load(out / "scores.json"), Plan.load(out / "plan.json")
    assert plan.removal == (0, 2)
    assert scores.metric.owner == "prune-parity 0.3"
    assert scores.metric.spec == "parity:bonus=0.5"
    assert scores.metric.options == {"bonus": 0.5}
    assert scores.metric.unit == "oddness"


def test_its_search_plans_with_any_metric_and_is_recorded(installed):
    words = ["plan", installed / "base", "--metric", "parity", "--drop", 2]
    done = run(installed, *words, "--search", "every-other:start=1", "-o", installed / "combs")
    assert done.exit_code == 0, done.stderr
    scores, plan = Scores.load(installed / "combs" / "scores.json"), Plan.load(installed / "combs" / "plan.json")
    assert [one.removal for one in scores.rounds[0].candidates] == [(1, 3), (2, 4)]
    assert plan.removal == (2, 4)
    assert (plan.search.name, plan.search.options) == ("every-other", {"start": 1, "short": 0})


@pytest.mark.parametrize(
    ("search", "rules", "why"),
    [
        ("every-other", ["--protect", "0,2"], "{0, 2}, which may not go: layer 0 does not exist, is to stay"),
        ("every-other:short=1", [], "{0}, which may not go: 2 layers were to go, and these are 1"),
        ("every-other", ["--contiguous"], "{0, 2}, which may not go: {0, 2} is not one contiguous run"),
    ],
)
def test_what_its_search_finds_against_the_rules_is_refused(installed, tmp_path, search, rules, why):
    words = ["plan", installed / "base", "--metric", "parity", "--drop", 2, "--search", search, *rules]
    done = run(installed, *words, "-o", tmp_path / "run")
    assert done.exit_code == 2
    assert f"layerprune: the search 'every-other' found {why}" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "plan.json").exists()


def test_without_the_distribution_the_names_are_unknown(tmp_path):
    assert cli_tiny.refused("metrics", "parity").startswith("unknown metric 'parity'")
    words = ["plan", "m", "--drop", 1, "--metric", "random", "--search", "every-other"]
    said = cli_tiny.refused(*words, "-o", tmp_path / "run")
    assert said.startswith("unknown search 'every-other'. Known: blocks, exchange, greedy, one-shot")
