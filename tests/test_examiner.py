"""What is measured is measured once, written down as it comes, and taken up again after a kill."""

from __future__ import annotations

import importlib.util
import json
import shutil
from types import SimpleNamespace

import audit_tiny
import numpy as np
import pytest

from layerprune.engine import Engine, Examiner, examine, examiner
from layerprune.errors import DocumentError
from layerprune.removal import Removal
from layerprune.subject import Subject
from layerprune.tasks import load_questions
from layerprune.tasks.judging import definition_of

REMOVALS = [Removal(()), Removal.of(1), Removal.of(4), Removal.of(1, 4)]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examiner")
    audit_tiny.base_model(folder / "base")
    for name in ("one", "two"):
        audit_tiny.questions(folder / "base", folder / "tasks", name, test=23 if name == "one" else 9, train=4)
    subject = Subject.load(str(folder / "base"))
    return subject, load_questions(["one", "two"], subject.encoder, use="evaluation", include_path=[folder / "tasks"])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(examiner, "BLOCK_ITEMS", 5)


def test_blocks_together_are_the_whole(asked):
    subject, questions = asked
    whole = examine(Engine(subject), questions, REMOVALS)
    made = Examiner(Engine(subject), questions)
    assert len(made.blocks) == 5
    found = made.outcomes(REMOVALS)
    for removal in REMOVALS:
        for name in questions.tasks:
            assert found[removal][name].correct == whole[removal][name].correct
            assert found[removal][name].gold_probability == pytest.approx(
                whole[removal][name].gold_probability, abs=2e-5
            )


def test_nothing_is_measured_twice(asked, monkeypatch):
    subject, questions = asked
    made = Examiner(Engine(subject), questions)
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
    subject, questions = asked
    straight = Examiner(Engine(subject), questions, folder=tmp_path / "straight")
    expected = straight.outcomes(REMOVALS)
    killed = Examiner(Engine(subject), questions, folder=tmp_path / "killed")
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
    resumed = Examiner(Engine(subject), questions, folder=tmp_path / "killed")
    assert len(resumed.known) == cut * len(REMOVALS)
    assert resumed.outcomes(REMOVALS) == expected
    assert resumed.account == straight.account
    assert resumed.path == straight.path == "trees"
    journals = [(tmp_path / name / "journal.jsonl").read_bytes() for name in ("straight", "killed")]
    assert journals[0] == journals[1]


def test_other_settings_are_another_key_and_are_left_alone(asked, tmp_path):
    subject, questions = asked
    Examiner(Engine(subject), questions, folder=tmp_path).outcomes(REMOVALS[:1])
    other = Examiner(Engine(subject, tokens=77), questions, folder=tmp_path)
    assert not other.known
    other.outcomes(REMOVALS[:1])
    assert Examiner(Engine(subject), questions, folder=tmp_path).known


@pytest.mark.parametrize(
    "change",
    [
        ('doc_to_text: "', 'description: "Answer. "\ndoc_to_text: "'),  # other tokens, the same items
        ("num_fewshot: 0", "num_fewshot: 1"),
        ("  version: 1.0", "  version: 2.0"),  # who raises this says that figures are other ones
    ],
)
def test_a_task_that_asks_otherwise_is_measured_anew(asked, tmp_path, change):
    subject, _ = asked
    base = subject.model.config._name_or_path
    folder = audit_tiny.questions(base, tmp_path / "tasks", "one", test=9, train=4)
    path = folder / "one.yaml"
    path.write_text(path.read_text() + "num_fewshot: 0\nfewshot_split: train\n")

    def made():
        questions = load_questions(["one"], subject.encoder, use="evaluation", include_path=[folder])
        return Examiner(Engine(subject), questions, folder=tmp_path / "run")

    made().outcomes(REMOVALS[:1])
    assert made().known
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    assert not made().known


def test_a_task_folder_that_was_moved_is_the_same_task(asked, tmp_path):
    subject, _ = asked
    folder = audit_tiny.questions(subject.model.config._name_or_path, tmp_path / "tasks", "one", test=9, train=4)

    def mark(place):
        return load_questions(["one"], subject.encoder, use="evaluation", include_path=[place]).mark()

    before = mark(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert mark(tmp_path / "copy") == before


def test_a_filter_of_the_tasks_own_is_part_of_it(tmp_path):
    def task(body):
        path = tmp_path / f"filters{len(body)}.py"
        path.write_text(f"def kept(resps, docs):\n    return {body}\n")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        own = {"function": "custom", "filter_fn": module.kept}
        config = {"task": "x", "filter_list": [{"name": "own", "filter": [own]}]}
        return SimpleNamespace(dump_config=lambda: config)

    assert definition_of(task("resps")) == definition_of(task("resps"))
    assert definition_of(task("resps")) != definition_of(task("resps[:1]"))


def test_other_examples_before_the_same_items_are_measured_anew(asked, tmp_path):
    subject, _ = asked
    folder = audit_tiny.questions(subject.model.config._name_or_path, tmp_path / "tasks", "one", test=9, train=1)
    with (folder / "one.yaml").open("a") as file:
        file.write("num_fewshot: 1\nfewshot_split: train\n")

    def made():
        questions = load_questions(["one"], subject.encoder, use="evaluation", include_path=[folder])
        return Examiner(Engine(subject), questions, folder=tmp_path / "run")

    made().outcomes(REMOVALS[:1])
    assert made().known
    train = folder / "one-train.jsonl"
    train.write_text(train.read_text().replace("train one 0", "train two 0"))
    assert not made().known


def test_a_model_with_another_config_or_other_tools_is_measured_anew(asked, tmp_path, monkeypatch):
    from layerprune import versions

    subject, questions = asked

    def known():
        return Examiner(Engine(subject), questions, folder=tmp_path).known

    Examiner(Engine(subject), questions, folder=tmp_path).outcomes(REMOVALS[:1])
    with monkeypatch.context() as patch:
        patch.setattr(subject.model.config, "rms_norm_eps", 1e-3)  # the weights are the same
        assert not known()
    with monkeypatch.context() as patch:
        patch.setattr(versions, "version", lambda name: "0.0")
        assert not known()
    assert known()


def test_a_damaged_journal_is_named(asked, tmp_path):
    subject, questions = asked
    Examiner(Engine(subject), questions, folder=tmp_path).outcomes(REMOVALS[:1])
    path = tmp_path / "journal.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["no json", *lines[1:]]) + "\n")
    with pytest.raises(DocumentError, match="damaged"):
        Examiner(Engine(subject), questions, folder=tmp_path)
    assert json.loads(lines[0])["block"] == 0


@pytest.fixture(scope="module")
def many(asked, tmp_path_factory):
    """Items enough for a race to end early: 120 of one task, 40 of another."""
    subject, folder = asked[0], tmp_path_factory.mktemp("many")
    for name, test in (("one", 120), ("two", 40)):
        audit_tiny.questions(subject.model.config._name_or_path, folder, name, test=test, train=4)
    return subject, load_questions(["one", "two"], subject.encoder, use="evaluation", include_path=[folder])


def missed(own):
    return {name: 1.0 - np.array([bit == "1" for bit in outcomes.correct]) for name, outcomes in own.items()}


def test_a_race_gives_full_outcomes_to_those_that_finish_and_the_first_items_of_the_others(many):
    subject, questions = many
    removals = [Removal(()), *(Removal.of(layer) for layer in range(6))]
    whole = Examiner(Engine(subject), questions).outcomes(removals)
    raced = Examiner(Engine(subject), questions).race(removals, 1, missed)
    best = min(removals, key=lambda removal: np.concatenate(list(missed(whole[removal]).values())).mean())
    assert best == Removal(())  # far ahead: the race need not run to its end
    assert raced.accepted == {best}
    for removal in removals:
        for name, outcomes in raced.outcomes[removal].items():
            assert whole[removal][name].correct.startswith(outcomes.correct)
            assert len(outcomes.gold_probability) == len(outcomes.correct)
            assert 10 <= len(outcomes.correct) < len(whole[removal][name].correct)


def test_a_race_between_equals_is_run_to_its_end(many):
    subject, questions = many
    removals = [Removal(()), Removal.of(1)]
    examiner = Examiner(Engine(subject), questions)
    raced = examiner.race(removals, 1, lambda own: {name: np.ones(len(o.correct)) for name, o in own.items()})
    assert not raced.accepted
    assert raced.outcomes == examiner.outcomes(removals)


def test_every_block_holds_the_same_share_of_every_task(asked):
    subject, questions = asked
    made = Examiner(Engine(subject), questions)
    sizes = [[len(block.tasks[name].items) for name in ("one", "two")] for block in made.blocks]
    assert [sum(column) for column in zip(*sizes, strict=True)] == [23, 9]
    assert all(one in (4, 5) and two in (1, 2) for one, two in sizes)
