"""What is measured is measured once, written down as it comes, and taken up again after a kill."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import audit_tiny
from layerprune.data.judging import definition_of
from layerprune.data.tasks import load_eval_set
from layerprune.errors import DocumentError
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring import cached_evaluator
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import evaluate

REMOVALS = [Removal(()), Removal.of(1), Removal.of(4), Removal.of(1, 4)]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluator")
    audit_tiny.base_model(folder / "base")
    for name in ("one", "two"):
        audit_tiny.eval_set(folder / "base", folder / "tasks", name, test=23 if name == "one" else 9, train=4)
    loaded = LoadedModel.load(str(folder / "base"))
    return loaded, load_eval_set(["one", "two"], loaded.encoder, use="evaluation", include_path=[folder / "tasks"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cached_evaluator, "BLOCK_ITEMS", 5)


def test_blocks_together_are_the_whole(asked):
    loaded, eval_set = asked
    whole = evaluate(Engine(loaded), eval_set, REMOVALS)
    made = CachedEvaluator(Engine(loaded), eval_set)
    assert len(made.blocks) == 5
    found = made.outcomes(REMOVALS)
    for removal in REMOVALS:
        for name in eval_set.tasks:
            assert found[removal][name].correct == whole[removal][name].correct
            assert found[removal][name].gold_probability == pytest.approx(
                whole[removal][name].gold_probability, abs=2e-5
            )


def test_nothing_is_measured_twice(asked, monkeypatch):
    loaded, eval_set = asked
    made = CachedEvaluator(Engine(loaded), eval_set)
    made.outcomes(REMOVALS[:2])
    measured = []
    measure = made.measure

    def noted(block, removals, *rest):
        measured.append(removals)
        measure(block, removals, *rest)

    monkeypatch.setattr(made, "measure", noted)
    made.outcomes(REMOVALS)
    assert measured == [REMOVALS[2:]] * 5


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_a_killed_run_goes_on_where_it_was_with_the_same_figures(asked, tmp_path, monkeypatch, cut):
    loaded, eval_set = asked
    straight = CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path / "straight")
    expected = straight.outcomes(REMOVALS)
    killed = CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path / "killed")
    measure = killed.measure

    def dies(block, removals, *rest):
        if block == cut:
            raise KeyboardInterrupt
        measure(block, removals, *rest)

    monkeypatch.setattr(killed, "measure", dies)
    with pytest.raises(KeyboardInterrupt):
        killed.outcomes(REMOVALS)
    (tmp_path / "killed").mkdir(exist_ok=True)
    with (tmp_path / "killed" / "journal.jsonl").open("ab") as file:
        file.write(b'{"key":"half a li')  # what a kill in the middle of a write leaves
    resumed = CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path / "killed")
    assert len(resumed.known) == cut * len(REMOVALS)
    assert resumed.outcomes(REMOVALS) == expected
    assert resumed.account == straight.account
    assert resumed.path == straight.path == "trees"
    journals = [(tmp_path / name / "journal.jsonl").read_bytes() for name in ("straight", "killed")]
    assert journals[0] == journals[1]


def test_what_another_command_left_in_the_folder_is_not_counted(asked, tmp_path):
    loaded, eval_set = asked
    alone = CachedEvaluator(Engine(loaded), eval_set)
    alone.outcomes(REMOVALS[:2])
    for removals in (REMOVALS[:2], REMOVALS[2:]):  # an earlier command that went further
        CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path).outcomes(removals)
    again = CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path)
    assert again.outcomes(REMOVALS[:2]) == alone.outcomes(REMOVALS[:2])
    again.outcomes(REMOVALS[:1])
    assert again.account == alone.account


def test_other_settings_are_another_key_and_are_left_alone(asked, tmp_path):
    loaded, eval_set = asked
    CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path).outcomes(REMOVALS[:1])
    other = CachedEvaluator(Engine(loaded, tokens=77), eval_set, folder=tmp_path)
    assert not other.known
    other.outcomes(REMOVALS[:1])
    assert CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path).known


@pytest.mark.parametrize(
    "change",
    [
        ('doc_to_text: "', 'description: "Answer. "\ndoc_to_text: "'),  # other tokens, the same items
        ("num_fewshot: 0", "num_fewshot: 1"),
        ("  version: 1.0", "  version: 2.0"),  # who raises this says that figures are other ones
    ],
)
def test_a_task_that_asks_otherwise_is_measured_anew(asked, tmp_path, change):
    loaded, _ = asked
    base = loaded.model.config._name_or_path
    folder = audit_tiny.eval_set(base, tmp_path / "tasks", "one", test=9, train=4)
    path = folder / "one.yaml"
    path.write_text(path.read_text() + "num_fewshot: 0\nfewshot_split: train\n")

    def made():
        eval_set = load_eval_set(["one"], loaded.encoder, use="evaluation", include_path=[folder])
        return CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path / "run")

    made().outcomes(REMOVALS[:1])
    assert made().known
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    assert not made().known


def test_a_task_folder_that_was_moved_is_the_same_task(asked, tmp_path):
    loaded, _ = asked
    folder = audit_tiny.eval_set(loaded.model.config._name_or_path, tmp_path / "tasks", "one", test=9, train=4)

    def mark(place):
        return load_eval_set(["one"], loaded.encoder, use="evaluation", include_path=[place]).mark()

    before = mark(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert mark(tmp_path / "copy") == before


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a file and load it as lm-eval loads a task's functions."""

    def reopened(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"made_for_the_test.{name}", path)
        made = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, made)
        spec.loader.exec_module(made)
        return made

    return reopened


def test_a_filter_of_the_tasks_own_is_part_of_it(module):
    def task(body):
        kept = module(f"filters{len(body)}", f"def kept(resps, docs):\n    return {body}\n").kept
        own = {"function": "custom", "filter_fn": kept}
        config = {"task": "x", "filter_list": [{"name": "own", "filter": [own]}]}
        return SimpleNamespace(dump_config=lambda: config)

    assert definition_of(task("resps")) == definition_of(task("resps"))
    assert definition_of(task("resps")) != definition_of(task("resps[:1]"))


def test_what_a_tasks_function_calls_is_part_of_it(module):
    def definition(name, body):
        text = f"def helper(doc):\n    return {body}\n\n\ndef target(doc):\n    return helper(doc)\n"
        own = module(name, text).target
        return definition_of(SimpleNamespace(dump_config=lambda: {"task": "x", "doc_to_target": own}))

    assert definition("a", "1") == definition("b", "1")
    assert definition("a", "1") != definition("c", "2")


def test_a_task_that_is_a_class_is_judged_as_its_file_says(module):
    def definition(name, body):
        own = module(name, f"class Own:\n    def check(self):\n        return {body}\n").Own
        own.dump_config = lambda self: {}
        return definition_of(own())

    assert definition("a", "1") == definition("b", "1")
    assert definition("a", "1") != definition("c", "2")


def test_what_only_judging_reads_of_an_item_is_part_of_it(asked, tmp_path):
    loaded, _ = asked
    folder = audit_tiny.eval_set(loaded.model.config._name_or_path, tmp_path, "one", test=9, train=1)

    def reopened():
        return load_eval_set(["one"], loaded.encoder, use="evaluation", include_path=[folder])

    before = reopened()
    for path in folder.glob("one-*.jsonl"):
        lines = [json.dumps(json.loads(line) | {"unseen": 1}) for line in path.read_text().splitlines()]
        path.write_text("\n".join(lines) + "\n")
    after = reopened()
    assert before.data() == after.data()
    assert before.mark() != after.mark()


def test_another_tokenizer_is_another_subject(asked):
    loaded, _ = asked

    def marks(tokenizer):
        return LoadedModel(loaded.model, tokenizer, loaded.architecture, loaded.ref).marks

    called, other = copy.deepcopy(loaded.tokenizer), copy.deepcopy(loaded.tokenizer)
    called(["a", "a b c"], padding=True, truncation=True, max_length=2)  # what a call sets says nothing
    other.add_tokens(["layerprune"])
    assert marks(called) == loaded.marks
    assert marks(other) != loaded.marks


def test_other_code_of_the_models_own_is_another_subject(asked, tmp_path):
    loaded, _ = asked
    base, own = Path(loaded.model.config._name_or_path), tmp_path / "own"
    shutil.copytree(base, own)
    config = json.loads((own / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (own / "config.json").write_text(json.dumps(config))
    code = "from transformers import LlamaForCausalLM as Base\nfrom .helper import X\n\nclass Own(Base):\n    x = X\n"
    (own / "modeling_own.py").write_text(code)

    def marks(helper):
        (own / "helper.py").write_text(helper)
        return LoadedModel.load(str(own), trust_remote_code=True).marks

    assert loaded.marks["code"] == ""
    first = marks("X = 1\n")
    assert first["code"]
    assert marks("X = 1\n") == first
    other = marks("X = 20\n")
    assert {name for name in other if other[name] != first[name]} == {"code"}


def test_other_examples_before_the_same_items_are_measured_anew(asked, tmp_path):
    loaded, _ = asked
    folder = audit_tiny.eval_set(loaded.model.config._name_or_path, tmp_path / "tasks", "one", test=9, train=1)
    with (folder / "one.yaml").open("a") as file:
        file.write("num_fewshot: 1\nfewshot_split: train\n")

    def made():
        eval_set = load_eval_set(["one"], loaded.encoder, use="evaluation", include_path=[folder])
        return CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path / "run")

    made().outcomes(REMOVALS[:1])
    assert made().known
    train = folder / "one-train.jsonl"
    train.write_text(train.read_text().replace("train one 0", "train two 0"))
    assert not made().known


def test_a_model_with_another_config_or_other_tools_is_measured_anew(asked, tmp_path, monkeypatch):
    from layerprune import util

    loaded, eval_set = asked

    def known():
        return CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path).known

    CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path).outcomes(REMOVALS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(loaded.model.config, "rms_norm_eps", 1e-3)  # the weights are the same
        assert not known()
    with monkeypatch.context() as patch:
        patch.setattr(util, "version", lambda name: "0.0")
        assert not known()
    assert known()


def test_a_damaged_journal_is_named(asked, tmp_path):
    loaded, eval_set = asked
    CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path).outcomes(REMOVALS[:1])
    path = tmp_path / "journal.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["no json", *lines[1:]]) + "\n")
    with pytest.raises(DocumentError, match="damaged"):
        CachedEvaluator(Engine(loaded), eval_set, folder=tmp_path)
    assert json.loads(lines[0])["block"] == 0


@pytest.fixture(scope="module")
def many(asked, tmp_path_factory):
    """Items enough for a race to end early: 120 of one task, 40 of another."""
    loaded, folder = asked[0], tmp_path_factory.mktemp("many")
    for name, test in (("one", 120), ("two", 40)):
        audit_tiny.eval_set(loaded.model.config._name_or_path, folder, name, test=test, train=4)
    return loaded, load_eval_set(["one", "two"], loaded.encoder, use="evaluation", include_path=[folder])


def missed(own):
    return {name: 1.0 - np.array([bit == "1" for bit in outcomes.correct]) for name, outcomes in own.items()}


def test_a_race_gives_full_outcomes_to_those_that_finish_and_the_first_items_of_the_others(many):
    loaded, eval_set = many
    removals = [Removal(()), *(Removal.of(layer) for layer in range(6))]
    whole = CachedEvaluator(Engine(loaded), eval_set).outcomes(removals)
    made = CachedEvaluator(Engine(loaded), eval_set)
    raced, accepted = made.race(removals, 1, missed)
    assert made.account == made.engine.account
    assert made.path == made.engine.path.name
    best = min(removals, key=lambda removal: np.concatenate(list(missed(whole[removal]).values())).mean())
    assert best == Removal(())  # far ahead: the race need not run to its end
    assert accepted == {best}
    for removal in removals:
        for name, outcomes in raced[removal].items():
            assert whole[removal][name].correct.startswith(outcomes.correct)
            assert len(outcomes.gold_probability) == len(outcomes.correct)
            assert 10 <= len(outcomes.correct) < len(whole[removal][name].correct)


def test_a_task_that_counts_for_nothing_keeps_no_race_open(many):
    """Weighed by nothing it shows no difference, whatever number of items is looked at."""
    loaded, eval_set = many
    removals = [Removal(()), *(Removal.of(layer) for layer in range(6))]

    def harm(own):
        return {name: harms * (name == "one") for name, harms in missed(own).items()}

    def lengths(**how):
        raced, _ = CachedEvaluator(Engine(loaded), eval_set).race(removals, 1, harm, **how)
        return {len(own["one"].correct) for own in raced.values()}

    assert lengths() == {120}
    assert min(lengths(counted=["one"])) < 120


def test_a_race_between_equals_is_run_to_its_end(many):
    loaded, eval_set = many
    removals = [Removal(()), Removal.of(1)]
    cached_evaluator = CachedEvaluator(Engine(loaded), eval_set)
    equal = lambda own: {name: np.ones(len(outcomes.correct)) for name, outcomes in own.items()}  # noqa: E731
    raced, accepted = cached_evaluator.race(removals, 1, equal)
    assert not accepted
    assert raced == cached_evaluator.outcomes(removals)


def test_every_block_holds_the_same_share_of_every_task(asked):
    loaded, eval_set = asked
    made = CachedEvaluator(Engine(loaded), eval_set)
    sizes = [[len(b.tasks[name].items) if name in b.tasks else 0 for name in ("one", "two")] for b in made.blocks]
    assert [sum(column) for column in zip(*sizes, strict=True)] == [23, 9]
    assert all(one in (4, 5) for one, _ in sizes)
    assert [two for _, two in sizes] == [5, 0, 0, 2, 2]  # what a race waits for comes first: here no more than a block


def test_a_short_task_does_not_keep_a_race_from_ending(many, monkeypatch, tmp_path):
    monkeypatch.setattr(cached_evaluator, "BLOCK_ITEMS", 15)
    loaded, _ = many
    for name, test in (("one", 150), ("two", 6)):
        audit_tiny.eval_set(loaded.model.config._name_or_path, tmp_path, name, test=test, train=4)
    eval_set = load_eval_set(["one", "two"], loaded.encoder, use="evaluation", include_path=[tmp_path])
    made = CachedEvaluator(Engine(loaded), eval_set)
    assert [len(block.tasks["two"].items) for block in made.blocks[:1]] == [6]
    removals = [Removal(()), *(Removal.of(layer) for layer in range(6))]
    raced, accepted = made.race(removals, 1, missed)
    assert accepted == {Removal(())}
    assert len(raced[Removal(())]["one"].correct) < 150
