"""Labels outside an item's choices: the item is wrong whatever the model says, as lm-eval has it, and it is said."""

import json

import pytest

import audit_tiny
from cli_tiny import done
from layerprune.artifacts import Scores
from layerprune.data.items import Verdict
from layerprune.data.tasks import load_eval_set
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import evaluate

INTACT = Removal(())
WORDS = list(audit_tiny.WORDS[:4])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return audit_tiny.base_model(tmp_path_factory.mktemp("labels") / "base")


@pytest.fixture(scope="module")
def loaded(base):
    return LoadedModel.load(str(base))


def lay(folder, labels, target="gold"):
    """Write a task of one item for each label, first a good one: lm-eval tries the first when it loads a task."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"question": f"item {n}:", "choices": WORDS, "gold": gold}) for n, gold in enumerate(labels)]
    for split in ("train", "test"):
        (folder / f"odd-{split}.jsonl").write_text("\n".join(lines) + "\n")
    text = audit_tiny.TASK.format(name="odd", folder=folder).replace('"{{gold}}"', target)
    (folder / "odd.yaml").write_text(text)
    return folder


def asked(loaded, folder, use="evaluation"):
    return load_eval_set(["odd"], loaded.encoder, use=use, include_path=[folder])


ALL_LAST = [(-9.0, False)] * 3 + [(-1.0, True)]  # the model's favourite is the last choice
NO_GOLD = Verdict(False, 0.0, 0.0)


@pytest.mark.parametrize(
    ("labels", "target"),
    [
        ([3, -1, 4, 9, -100], "gold"),
        ([3, -1, 4, None, 7], "gold"),
        ([3, -1, 4, 9, -2], '"{{gold}}"'),
        ([WORDS[3], "no such", "", "RED FOX", "-1"], "gold"),
        ([WORDS[3], "no such", "a", "RED FOX", "-1"], '"{{gold}}"'),
        ([[3], [-1], [7, 9], [], [-100]], "gold"),
    ],
)
def test_an_item_without_a_gold_answer_is_wrong(loaded, tmp_path, labels, target):
    eval_set = asked(loaded, lay(tmp_path, labels, target))
    task = eval_set.tasks["odd"]
    assert [item.answerable for item in task.items] == [True, False, False, False, False]
    assert [item.chance for item in task.items] == [0.25, 0, 0, 0, 0]
    good, *bad = (task.judge(item, ALL_LAST) for item in task.items)
    assert (good.correct, good.margin) == (True, 8.0)
    assert bad == [NO_GOLD] * 4
    assert eval_set.remarks() == [
        "task 'odd': the label of 4 of 5 items is none of their choices; they are counted wrong, as lm-eval does"
    ]


def test_it_is_what_lm_eval_says(loaded, tmp_path):
    task = asked(loaded, lay(tmp_path, [3, -1, 4, 9, 2])).tasks["odd"]
    for item in task.items:
        theirs = task.judge.task.process_results(item.key[0].doc, ALL_LAST)["acc"]
        assert task.judge(item, ALL_LAST).correct == bool(theirs)


def test_of_several_labels_those_that_are_choices_count(loaded, tmp_path):
    task = asked(loaded, lay(tmp_path, [[0, 3], [3, 9], [1, -1]])).tasks["odd"]
    assert [item.chance for item in task.items] == [0.5, 0.25, 0.25]
    verdicts = [task.judge(item, ALL_LAST) for item in task.items]
    assert [one.correct for one in verdicts] == [True, True, False]
    assert verdicts[2].gold_probability == pytest.approx(0.0003, abs=1e-4)
    assert not asked(loaded, tmp_path).remarks()


def test_tasks_with_good_labels_have_nothing_said_of_them(loaded, tmp_path):
    assert asked(loaded, lay(tmp_path, [0, 1, 2, 3])).remarks() == []


def test_every_signal_of_a_task_with_such_items_is_scored_and_said(base, loaded, tmp_path):
    folder = audit_tiny.eval_set(base, tmp_path, "odd", train=60, test=2)
    file = folder / "odd-train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number in (3, 40):
        rows[number]["gold"] = -1
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for signal in ("accuracy", "probability", "margin", "blend"):
        out = tmp_path / signal
        ran = done("score", base, "--metric", f"ablation:signal={signal}", "--tasks", "odd", "--include-path", folder,
                   "-o", out)  # fmt: skip
        assert "the label of 2 of 60 items is none of their choices; they are counted wrong" in ran.stderr
        scores = Scores.load(out / "scores.json")
        assert scores.data[0].chance == pytest.approx(0.25 * 58 / 60, abs=1e-6)
        assert scores.base["odd"].outcomes.gold_probability.count(0.0) >= 2
    found = evaluate(Engine(loaded), asked(loaded, folder, "selection"), [INTACT], margins=True)[INTACT]["odd"]
    assert found.margin.count(0.0) == 2
