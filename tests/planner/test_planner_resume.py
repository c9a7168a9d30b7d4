"""Every search goes on where it was killed, with the same documents, and shows the best so far. On a tiny model."""

import pytest

import audit_tiny
from cli_tiny import done, layerprune
from layerprune.planner.goals import Drop, GoalResult
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.metrics.loss import Perplexity

SEARCHES = ["greedy", "blocks", "exchange"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return audit_tiny.model_and_task(tmp_path_factory.mktemp("resume"), train=16)


def plan(home, out, *words):
    return ["plan", home / "base", "--tasks", "toy", "--include-path", home / "tasks", "-o", out, *words]


def dying(monkeypatch, owner, name, after):
    """Let a method die at its call number ``after``; return how often it was called, a list of one number."""
    real, calls = getattr(owner, name), [0]

    def method(*args, **kwargs):
        calls[0] += 1
        if calls[0] == after:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, method)
    return calls


def documents(folder):
    return [(folder / name).read_bytes() for name in ("scores.json", "plan.json")]


@pytest.mark.parametrize("search", SEARCHES)
def test_a_search_that_was_killed_goes_on_and_measures_the_rest(home, tmp_path, monkeypatch, search):
    words = ("--drop", 3, "--search", search)
    with monkeypatch.context() as patch:
        whole = dying(patch, CachedEvaluator, "measure", 0)
        said = done(*plan(home, tmp_path / "straight", *words)).stderr
    assert "3 chosen: {" in said  # the best so far, with its score
    with monkeypatch.context() as patch:
        before = dying(patch, CachedEvaluator, "measure", whole[0])
        assert layerprune(*plan(home, tmp_path / "killed", *words)).exit_code == 130
        assert not (tmp_path / "killed" / "plan.json").exists()
    with monkeypatch.context() as patch:
        after = dying(patch, CachedEvaluator, "measure", 0)
        done(*plan(home, tmp_path / "killed", *words))
    assert before[0] == whole[0] > 2
    assert after[0] == 1  # only what was being measured when it was killed
    assert documents(tmp_path / "killed") == documents(tmp_path / "straight")


def test_a_metric_that_reads_text_goes_on_too(home, tmp_path, monkeypatch):
    words = ("--metric", "perplexity", "--drop", 3, "--search", "greedy")
    with monkeypatch.context() as patch:
        whole = dying(patch, Perplexity, "score", 0)
        done(*plan(home, tmp_path / "straight", *words))
    with monkeypatch.context() as patch:
        dying(patch, Perplexity, "score", whole[0])
        assert layerprune(*plan(home, tmp_path / "killed", *words)).exit_code == 130
    with monkeypatch.context() as patch:
        after = dying(patch, Perplexity, "score", 0)
        done(*plan(home, tmp_path / "killed", *words))
    assert whole[0] > 2
    assert after[0] == 1
    assert documents(tmp_path / "killed") == documents(tmp_path / "straight")
    with monkeypatch.context() as patch:  # another seed is another question
        other = dying(patch, Perplexity, "score", 0)
        done(*plan(home, tmp_path / "killed", *words, "--seed", 1, "--force"))
    assert other[0] == whole[0]


def test_going_further_asks_only_what_is_new(home, tmp_path, monkeypatch):
    """A certified path and a target ask the same search for more and more: nothing is judged twice."""
    words = ("--metric", "perplexity", "--search", "greedy")
    with monkeypatch.context() as patch:
        alone = dying(patch, Perplexity, "score", 0)
        done(*plan(home, tmp_path / "alone", *words, "--drop", 3))
    with monkeypatch.context() as patch:

        def step_by_step(self, session, look):
            found = [look(count) for count in (1, 2, 3)][-1]
            return GoalResult(found, found.rounds)

        patch.setattr(Drop, "pursue", step_by_step)
        stepwise = dying(patch, Perplexity, "score", 0)
        done(*plan(home, tmp_path / "steps", *words, "--drop", 3))
    assert stepwise[0] == alone[0] == 3
    assert documents(tmp_path / "steps") == documents(tmp_path / "alone")


@pytest.mark.parametrize(("metric", "owner", "name"), [
    ("ablation", CachedEvaluator, "measure"),
    ("perplexity", Perplexity, "score"),
])  # fmt: skip
def test_a_machine_of_another_size_answers_anew_and_one_of_the_same_size_does_not(
    home, tmp_path, monkeypatch, metric, owner, name
):
    """The default of --memory stands in the keys as what the machine has for it, as if it had been given."""
    words = ("--metric", metric, "--drop", 2, "--search", "greedy")
    machine = "layerprune.scoring.memory.process_memory"

    def asked(gibibytes, *more):
        with monkeypatch.context() as patch:
            patch.setattr(machine, lambda: gibibytes * 1024**3)
            calls = dying(patch, owner, name, 0)
            done(*plan(home, tmp_path / "run", "--force", *words, *more))
        return calls[0]

    first = asked(16)
    assert first > 0
    assert asked(16) == asked(2, "--memory", "6GiB") == 0
    assert asked(2) == first
