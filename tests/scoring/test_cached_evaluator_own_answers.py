"""The intact model's own answers as a signal: written once, read under removals, against plain forwards."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import audit_tiny
from cli_tiny import done, last_line, layerprune, refused
from layerprune.artifacts import OWN_ANSWER, Front, Plan, Scores
from layerprune.data.tasks import load_eval_set
from layerprune.errors import TaskError
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring import cached_evaluator
from layerprune.scoring.cached_evaluator import own_answers
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import evaluate

INTACT, REMOVALS = Removal(()), [Removal(()), Removal.of(1), Removal.of(2, 4)]
WRITING = """task: writing
dataset_path: json
dataset_kwargs:
  data_files: {{ train: {rows}, test: {rows} }}
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{ until: ["Z"], max_gen_toks: 5 }}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    audit_tiny.base_model(folder / "base")
    audit_tiny.eval_set(folder / "base", folder / "tasks", "toy")
    rows = [{"question": f"say {n}: " + "and " * (n % 3), "answer": f" word {n}"} for n in range(24)]
    path = folder / "tasks" / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "tasks" / "writing.yaml").write_text(WRITING.format(rows=path))
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    return LoadedModel.load(str(place / "base"))


def load(place, loaded, *names):
    return load_eval_set(names, loaded.encoder, use="selection", include_path=[place / "tasks"])


def by_plain_forwards(loaded, item, removal):
    """(nats per token, share of greedy tokens) of an item's answer, one forward of the bypassed model."""
    [request] = item.queries[0].parts
    ids = torch.tensor([request.tokens])
    with loaded.without(removal) as model, torch.no_grad():
        logs = model(input_ids=ids[:, :-1], use_cache=False).logits[0].double().log_softmax(-1)[-request.scored :]
    asked = ids[0, -request.scored :]
    own = logs.gather(1, asked[:, None])
    return float(own.mean()), float((logs.argmax(-1) == asked).double().mean())


def test_answers_are_read_as_plain_forwards_read_them(place, loaded):
    engine = Engine(loaded)
    eval_set = own_answers(engine, load(place, loaded, "writing", "toy"))
    assert eval_set.tasks["writing"].data().metric == OWN_ANSWER
    assert eval_set.tasks["toy"].data() == load(place, loaded, "toy").tasks["toy"].data()
    found = evaluate(engine, eval_set, REMOVALS)
    items = eval_set.tasks["writing"].items
    for removal in REMOVALS:
        expected = np.array([by_plain_forwards(loaded, item, removal) for item in items])
        own = found[removal]["writing"]
        np.testing.assert_allclose(own.answer, expected[:, 0], rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(own.agreed, expected[:, 1], atol=1e-5)
        assert own.correct == "".join("1" if share == 1 else "0" for share in own.agreed)
        assert found[removal]["toy"].answer is None
    assert set(found[INTACT]["writing"].agreed) == {1.0}, "the model agrees with what it has just written"
    assert min(found[Removal.of(2, 4)]["writing"].agreed) < 1


def test_an_answer_is_what_greedy_decoding_writes_with_the_token_that_ends_it(place, loaded):
    before = load(place, loaded, "writing").tasks["writing"].items
    after = own_answers(Engine(loaded), load(place, loaded, "writing")).tasks["writing"].items
    lengths = set()
    for item, own in zip(before, after, strict=True):
        [request] = own.queries[0].parts
        prompt = loaded.encoder.tok_encode(item.queries[0].generation.args[0])
        assert list(request.tokens[: -request.scored]) == prompt
        ids = list(prompt)
        for _ in range(request.scored):
            with torch.no_grad():
                ids.append(int(loaded.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert ids == list(request.tokens)
        lengths.add(request.scored)
    assert max(lengths) == 5


def test_what_was_written_is_kept_and_not_written_again(place, loaded, tmp_path, monkeypatch):
    first = own_answers(Engine(loaded), load(place, loaded, "writing"), folder=tmp_path)
    monkeypatch.setattr(cached_evaluator, "generate", None)
    again = own_answers(Engine(loaded), load(place, loaded, "writing"), folder=tmp_path)
    assert again.mark() == first.mark()
    with pytest.raises(TypeError):
        own_answers(Engine(loaded, rows=3), load(place, loaded, "writing"), folder=tmp_path)


def test_only_right_answers_count_where_asked(place, loaded, monkeypatch):
    eval_set = load(place, loaded, "writing")
    with pytest.raises(TaskError, match="task 'writing': the intact model is right on none of 24 prompts"):
        own_answers(Engine(loaded), eval_set, only_right=True)
    kind = type(eval_set.tasks["writing"].judge)
    judge = kind.__call__
    marks = [item.fingerprint for item in eval_set.tasks["writing"].items[::3]]

    def some(self, item, answers):
        return replace(judge(self, item, answers), correct=item.fingerprint in marks)

    monkeypatch.setattr(kind, "__call__", some)
    kept = own_answers(Engine(loaded), eval_set, only_right=True).tasks["writing"].items
    assert [item.fingerprint for item in kept] == marks


def test_choices_alone_have_nothing_to_read(place, loaded):
    with pytest.raises(TaskError, match="signal=answers reads what the model writes, and toy only offers choices"):
        own_answers(Engine(loaded), load(place, loaded, "toy"))


def test_a_plan_by_answers_and_choices_from_the_command_line(place, tmp_path):
    words = ["--include-path", place / "tasks", "--metric", "ablation:signal=answers", "--search", "one-shot"]
    said = done(
        "plan", place / "base", "--tasks", "writing,toy", "--drop", 2, *words, "--no-racing", "-o", tmp_path / "run"
    ).stdout
    scores, plan = Scores.load(tmp_path / "run" / "scores.json"), Plan.load(tmp_path / "run" / "plan.json")
    assert scores.metric.unit == "nats per token"
    assert "nats per token" in said
    base = scores.base["writing"].outcomes
    for one in scores.rounds[0].candidates:
        writing, toy = one.tasks["writing"], one.tasks["toy"]
        lost = np.mean(np.array(base.answer[: writing.items]) - np.array(writing.outcomes.answer))  # the rest predicts
        assert one.score == pytest.approx((lost + toy.relevance) / 2, abs=1e-5)
        assert writing.relevance == pytest.approx(1 - np.mean(writing.outcomes.agreed), abs=1e-5)
    ranked = sorted(scores.rounds[0].candidates, key=lambda one: one.score)
    assert set(plan.removal) == {one.removal[0] for one in ranked[:2]}
    assert {data.task: data.metric for data in plan.data} == {"writing": OWN_ANSWER, "toy": "acc"}
    again = done("plan", "--scores", tmp_path / "run" / "scores.json", "--drop", 1, "-o", tmp_path / "again").stdout
    assert f"layers {ranked[0].removal[0]} of 6" in again


def test_a_race_by_answers_ends_with_the_winners_of_all_items(place, tmp_path):
    words = ["--include-path", place / "tasks", "--metric", "ablation:signal=answers", "--search", "one-shot"]
    for option in ("--racing", "--no-racing"):
        done("plan", place / "base", "--tasks", "writing", "--drop", 1, *words, option, "-o", tmp_path / option[2:])
    plans = [Plan.load(tmp_path / name / "plan.json").removal for name in ("racing", "no-racing")]
    assert plans[0] == plans[1]


def test_a_certificate_of_answers_says_what_it_counts(place, tmp_path):
    done(
        "plan", place / "base", "--tasks", "writing", "--include-path", place / "tasks", "--search", "one-shot",
        "--metric", "ablation:signal=answers", "--max-drop", "99%", "--confidence", "50%", "--up-to", 1,
        "--limit", 12, "--certify-limit", 12, "-o", tmp_path / "run",
    )  # fmt: skip
    statement = Plan.load(tmp_path / "run" / "plan.json").certificate.statement
    assert "(of writing: the share of prompts answered token for token as before)" in statement
    assert "Not looked at" not in statement


def test_only_right_without_answers_is_refused(place, tmp_path):
    said = refused(
        "plan", place / "base", "--tasks", "toy", "--include-path", place / "tasks", "--metric", "ablation:only=right",
        "--drop", 1, "-o", tmp_path / "run",
    )  # fmt: skip
    assert said == "only=right is about answers that the model writes; give signal=answers too, or leave it out"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("{{question}}", "{{question[:0]}}"), "has a prompt of no tokens"),
        (("{{question}}", "{{ '' if 'and' in question else question }}"), "has a prompt of no tokens"),
        (("max_gen_toks: 5", "max_gen_toks: 0"), "lets the model write 0 tokens; needed is 1 or more"),
        (("max_gen_toks: 5", "max_gen_toks: 200"), "lets the model write 200 tokens, and it reads 128"),
    ],
    ids=["all empty", "some empty", "no tokens", "no room"],
)
def test_a_task_that_leaves_nothing_to_read_or_write_is_refused(place, loaded, change, said):
    text = (place / "tasks" / "writing.yaml").read_text().replace("task: writing", "task: nothing").replace(*change)
    (place / "tasks" / "nothing.yaml").write_text(text)
    with pytest.raises(TaskError, match=f"^the task 'nothing' {said}"):
        own_answers(Engine(loaded), load(place, loaded, "nothing"))


def test_own_answers_are_greedy_whatever_the_task_says_of_sampling(place, loaded):
    plain, sampled = load(place, loaded, "writing"), load(place, loaded, "writing")
    for item in sampled.tasks["writing"].items:
        instance = item.queries[0].generation
        options = {**instance.args[1], "do_sample": True, "temperature": 5.0, "top_k": 200}
        instance.arguments = (instance.args[0], options)
    first, second = (own_answers(Engine(loaded), each).tasks["writing"].items for each in (plain, sampled))
    assert [item.queries for item in first] == [item.queries for item in second]


@pytest.fixture(scope="module")
def prompts(place):
    """A task of prompts alone: no gold answer, and a metric that is no accuracy."""
    text = (place / "tasks" / "writing.yaml").read_text().replace("task: writing", "task: prompts")
    text = text.replace('doc_to_target: "{{answer}}"', 'doc_to_target: ""').replace("exact_match", "bleu")
    (place / "tasks" / "prompts.yaml").write_text(text)
    return "prompts"


def test_prompts_without_a_gold_answer_are_enough(place, prompts, tmp_path):
    words = ["--include-path", place / "tasks", "--search", "one-shot", "--drop", 1, "--no-racing"]
    answers = ["--metric", "ablation:signal=answers"]
    said = done("plan", place / "base", "--tasks", prompts, *words, *answers, "-o", tmp_path / "prompts").stdout
    done("plan", place / "base", "--tasks", "writing", *words, *answers, "-o", tmp_path / "writing")
    scores = [Scores.load(tmp_path / name / "scores.json") for name in ("prompts", "writing")]
    assert [one.data[0].metric for one in scores] == [OWN_ANSWER, OWN_ANSWER]
    read = [sorted(c.tasks[name].outcomes.answer) for one, name in zip(scores, ("prompts", "writing"), strict=True)
            for c in one.rounds[0].candidates[:1]]  # fmt: skip
    assert len(read[0]) == len(read[1])
    [task] = Plan.load(tmp_path / "prompts" / "plan.json").predicted.tasks.values()
    flat = " ".join(said.split())
    low, high = task.nats_interval
    lost = f"{task.nats:.3f} nats per token lost of its own answers to prompts (95 % CI {low:.3f} … {high:.3f})"
    assert low < task.nats < high
    low, high = task.agreed_interval
    agreed = f"{100 * task.agreed:.1f} % of their tokens agreed with (95 % CI {100 * low:.1f} … {100 * high:.1f})"
    assert low < task.agreed < high
    assert f"predicted: {lost}, {agreed}, on 5 of 5 selection items held back from the search" in flat
    assert "predicted: accuracy" not in said
    assert "of each task: its relevance" not in flat
    assert "of prompts: the share of agreed tokens that is lost)" in flat


@pytest.mark.parametrize("metric", ["ablation", "ablation:signal=answers,only=right"])
def test_what_needs_an_accuracy_refuses_prompts_alone(place, prompts, tmp_path, metric):
    said = refused(
        "plan", place / "base", "--tasks", prompts, "--include-path", place / "tasks", "--metric", metric, "--drop", 1,
        "-o", tmp_path / "run",
    )  # fmt: skip
    assert said == (
        "task 'prompts' has no accuracy to lose (its metrics: bleu); ablation needs one of acc_norm, acc, exact_match; "
        "signal=answers without only=right needs none"
    )
    assert not (tmp_path / "run" / "scores.json").exists()


def test_a_template_that_lm_eval_misses_is_named(place, prompts, loaded):
    text = (place / "tasks" / "prompts.yaml").read_text().replace("task: prompts", "task: untold")
    (place / "tasks" / "untold.yaml").write_text(text.replace('doc_to_target: ""\n', ""))
    with pytest.raises(TaskError, match="lm-eval asks for doc_to_text and doc_to_target; of prompts alone write"):
        load(place, loaded, "untold")


def test_no_metric_at_all_will_do_and_a_task_of_fractions_is_not_graded(place, prompts, loaded):
    """What the task makes of an answer matters to only=right alone: a score of 0.5 is no fault otherwise."""
    text = (place / "tasks" / "prompts.yaml").read_text()
    kind = text[text.index("metric_list") : text.index("metadata")]
    (place / "tasks" / "bare.yaml").write_text(
        text.replace("task: prompts", "task: bare").replace(kind, "metric_list: []\n")
    )
    eval_set = load_eval_set(
        ["bare", "writing"], loaded.encoder, use="selection", include_path=[place / "tasks"], ungraded=True
    )
    assert eval_set.tasks["bare"].metric == ""
    eval_set.tasks["writing"].judge.task.process_results = lambda doc, results: {"exact_match": 0.5}
    found = own_answers(Engine(loaded), eval_set)
    assert {name: task.data().metric for name, task in found.tasks.items()} == dict.fromkeys(found.tasks, OWN_ANSWER)
    read = [{item.queries for item in found.tasks[name].items} for name in ("bare", "writing")]
    assert read[0] == read[1]
    with pytest.raises(TaskError, match=r"^task 'bare' has no accuracy that says which answers are right"):
        own_answers(Engine(loaded), eval_set, only_right=True)
    del eval_set.tasks["bare"]
    with pytest.raises(TaskError, match=r"exact_match of one item is 0\.5; needed is 0 or 1"):
        own_answers(Engine(loaded), eval_set, only_right=True)


def test_prompts_alone_are_searched_with_what_cosine_proposes_and_asked_for_a_certificate(place, prompts, tmp_path):
    words = ["plan", place / "base", "--tasks", prompts, "--include-path", place / "tasks", "--limit", 12]
    words += ["--metric", "ablation:signal=answers"]
    done(*words, "--search", "exchange", "--drop", 2, "-o", tmp_path / "run")
    assert {data.metric for data in Plan.load(tmp_path / "run" / "plan.json").data} == {OWN_ANSWER}
    goal = ["--max-drop", "99%", "--confidence", "50%", "--certify-limit", 12]
    assert "of 12 certification items turn wrong" in last_line(*words, *goal, "-o", tmp_path / "certified")


def test_a_prediction_counts_answers_and_choices_apart(place, tmp_path):
    words = ["plan", place / "base", "--tasks", "writing,toy", "--include-path", place / "tasks", "--drop", 1,
             "--metric", "ablation:signal=answers", "--weights", "writing=3,toy=1", "--search", "one-shot"]  # fmt: skip
    refusal = refused(*words, "--floor", "writing=0.999", "-o", tmp_path / "strict")
    assert re.search(r"writing keeps 0\.\d+ of the tokens of the model's own answers, its floor is 0\.999", refusal)
    floor = 0.4
    said = done(*words, "--floor", f"writing={floor},toy=0.1", "-o", tmp_path / "run").stdout
    scores, plan = Scores.load(tmp_path / "run" / "scores.json"), Plan.load(tmp_path / "run" / "plan.json")
    for one in scores.rounds[0].candidates:
        writing, toy = one.tasks["writing"], one.tasks["toy"]
        lost = np.mean(np.array(scores.base["writing"].outcomes.answer[: writing.items]) - writing.outcomes.answer)
        assert one.score == pytest.approx((3 * lost + toy.relevance) / 4, abs=1e-5)
        assert ("writing" in one.below_floor) is bool(np.mean(writing.outcomes.agreed) < floor)
    own, toy = plan.predicted.tasks["writing"], plan.predicted.tasks["toy"]
    assert own.items == 5
    assert toy.nats is None
    flat = " ".join(said.split())
    assert f", on 5 of {plan.predicted.source} predicted: accuracy" in flat
    assert plan.predicted.accuracy_difference == toy.difference, "own answers are not averaged with choices"
    assert plan.predicted.interval == pytest.approx(toy.interval, abs=1e-6)
    assert (own.base_agreed, toy.base_agreed) == (1, None)
    assert f"predicted: accuracy {100 * toy.difference:+.1f} points" in flat
    kept = f"writing keeps its floor of 0.4 on the items that selected, but {own.agreed:.2f} of the tokens of"
    assert any(warning.startswith(kept) for warning in plan.warnings) is (own.agreed < floor)


@pytest.mark.parametrize("tasks", ["writing,toy", "writing"])
def test_a_front_by_answers_names_what_keeps_most_of_them(place, tmp_path, tasks):
    """No prompt is answered token for token as before at any step: the shares of those would make all steps equal."""
    said = done(
        "plan", place / "base", "--tasks", tasks, "--include-path", place / "tasks", "--search", "one-shot",
        "--metric", "ablation:signal=answers", "--front", "--up-to", 3, "-o", tmp_path / "run",
    ).stdout  # fmt: skip
    folder = tmp_path / "run" / "front"
    found = Front.load(folder / "front.json")
    written = [point.tasks["writing"] for point in found.points]
    losses = [task.nats - (point.tasks["toy"].difference if "toy" in point.tasks else 0)
              for task, point in zip(written, found.points, strict=True)]  # fmt: skip
    assert found.named == {"best": found.points[int(np.argmin(losses))].plan}
    assert max(task.agreed for task in written) < 1
    flat = " ".join(said.split())
    assert "most-at-no-loss: none, each step loses something on these items" in flat
    assert f"{folder / found.named['best']} -o smaller/" in said.replace("\n", "")
    counted = "accuracy difference 95 % CI nats lost tokens agreed" if "toy" in tasks else "last to go nats lost"
    assert counted in flat
    rows = list(csv.DictReader((folder / "front.csv").read_text().splitlines()))
    for row, point, task in zip(rows[1:], found.points, written, strict=True):
        assert (float(row["nats"]), float(row["agreed"])) == (task.nats, task.agreed)
        others = [own for own in point.tasks.values() if own.nats is None] or [task]
        assert (point.accuracy, point.accuracy_difference) == (others[0].accuracy, others[0].difference)
    assert found.accuracy == others[0].base_accuracy


def test_a_task_that_writes_under_every_removal_is_pointed_to_own_answers(place, tmp_path):
    told = "signal=answers reads what the intact model wrote instead"
    words = ["score", place / "base", "--include-path", place / "tasks", "-o", tmp_path / "run", "--limit", 4]
    writes = layerprune(*words, "--metric", "ablation", "--tasks", "toy,writing").stderr
    assert f"task 'writing' has the model write, under every removal; ablation:{told}" in writes
    assert "task 'toy' has the model write" not in writes
    assert told not in layerprune(*words, "--metric", "ablation:signal=answers", "--tasks", "toy,writing").stderr
