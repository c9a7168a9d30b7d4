"""Items come from lm-eval and are judged by it; what selects never evaluates."""

from __future__ import annotations

import copy
import json

import pytest

import audit_tiny
from layerprune.config import PromptOptions
from layerprune.data.items import EvalItem, EvalSet, EvalTask, Verdict
from layerprune.data.tasks import check_turns, load_eval_set, prompting_of
from layerprune.errors import TaskError, UsageError
from layerprune.models.generation import batches, generate
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import evaluate

INTACT = Removal(())
OTHER = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{ {files} }}
output_type: {kind}
{splits}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
{more}
metric_list:
  - metric: {metric}
    aggregation: {aggregation}
    higher_is_better: {better}
metadata:
  version: 1.0
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    audit_tiny.base_model(folder / "base")
    audit_tiny.eval_set(folder / "base", folder / "tasks", "toy")
    rows = [{"question": f"say {n}:", "answer": f" word {n}", "gold": n % 2} for n in range(40)]
    (folder / "tasks" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    only_test = f"test: {folder}/tasks/rows.jsonl"

    def write(name, kind, metric, target="{{answer}}", more="", aggregation="mean", better="true"):
        text = OTHER.format(
            name=name, kind=kind, metric=metric, target=target, files=only_test, splits="test_split: test", more=more,
            aggregation=aggregation, better=better,
        )  # fmt: skip
        (folder / "tasks" / f"{name}.yaml").write_text(text)

    write("halves", "multiple_choice", "acc", "{{gold}}", 'doc_to_choice: ["yes", "no"]')
    write("cloze", "loglikelihood", "acc")
    write("rolling", "loglikelihood_rolling", "word_perplexity", aggregation="weighted_perplexity", better="false")
    write(
        "writing", "generate_until", "exact_match",
        more='generation_kwargs: {until: ["\\n"], max_gen_toks: 4}',
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    return LoadedModel.load(str(place / "base"))


def load(place, loaded, *names, use="evaluation", **options):
    return load_eval_set(names, loaded.encoder, use=use, include_path=[place / "tasks"], **options)


def asked_prompting(**options):
    return prompting_of(PromptOptions(**options))


def by_lm_eval(place, loaded, task, metric, num_fewshot=None, limit=None, **prompting):
    """Return lm-eval's own per-item values, from its own loop and its own model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=7),
        tasks=[task],
        task_manager=TaskManager(include_path=str(place / "tasks"), include_defaults=False),
        num_fewshot=num_fewshot,
        limit=limit,
        bootstrap_iters=0,
        **prompting,
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return "".join(str(int(sample[metric])) for sample in samples)


@pytest.mark.parametrize("shots", [0, 2])
def test_choices_are_judged_as_lm_eval_judges_them(place, loaded, shots):
    eval_set = load(place, loaded, "toy", num_fewshot=shots)
    own = evaluate(Engine(loaded), eval_set, [INTACT, Removal.of(2)])
    assert own[INTACT]["toy"].correct == by_lm_eval(place, loaded, "toy", "acc", shots)
    with loaded.without(Removal.of(2)):
        assert own[Removal.of(2)]["toy"].correct == by_lm_eval(place, loaded, "toy", "acc", shots)
    assert own[INTACT]["toy"].correct != own[Removal.of(2)]["toy"].correct


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PROMPTINGS = [
    {"apply_chat_template": True, "fewshot_as_multiturn": True},
    {"apply_chat_template": True, "fewshot_as_multiturn": False, "system_instruction": "Be brief."},
    {"apply_chat_template": False, "fewshot_as_multiturn": False, "system_instruction": "Be brief."},
]


@pytest.fixture
def chatty(loaded):
    loaded.tokenizer.chat_template = CHAT
    yield loaded
    loaded.tokenizer.chat_template = None


@pytest.mark.parametrize("prompting", PROMPTINGS)
@pytest.mark.parametrize(("task", "metric"), [("toy", "acc"), ("writing", "exact_match")])
def test_prompts_go_through_the_chat_template_as_in_lm_eval(place, chatty, task, metric, prompting):
    shots = 2 if task == "toy" else 0
    asked = asked_prompting(**prompting, num_fewshot=shots or None)
    eval_set = load(place, chatty, task, num_fewshot=shots or None, prompting=asked, limit=20)
    prompts = [query.asked() for item in eval_set.tasks[task].items for query in item.queries]
    plain = [query.asked() for item in load(place, chatty, task, limit=20).tasks[task].items for query in item.queries]
    assert prompts != plain
    assert eval_set.data()[0].prompting == asked
    own = evaluate(Engine(chatty), eval_set, [INTACT])[INTACT]
    theirs = by_lm_eval(place, chatty, task, metric, shots or None, 20, **prompting)
    assert own[task].correct == theirs[: len(own[task].correct)]


def test_the_text_of_a_chat_prompt_is_lm_evals_to_the_letter(place, chatty):
    asked = asked_prompting(apply_chat_template=True, system_instruction="Be brief.", num_fewshot=2)
    item = load(place, chatty, "toy", use="evaluation", num_fewshot=2, prompting=asked, limit=1).tasks["toy"].items[0]
    text = item.key[0].args[0]
    assert text.startswith("<system>Be brief.</s><user>")
    assert text.count("<user>") == 3
    assert text.count("<assistant>") == 3
    assert text.endswith("</s><assistant>")
    options = {"system_instruction": "Be brief.", "num_fewshot": 2}
    asked = asked_prompting(apply_chat_template=True, fewshot_as_multiturn=False, **options)
    item = load(place, chatty, "toy", use="evaluation", num_fewshot=2, prompting=asked, limit=1).tasks["toy"].items[0]
    assert item.key[0].args[0].count("<user>") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fewshot_as_multiturn": True}, "--fewshot-as-multiturn makes turns of a chat; give --apply-chat-template"),
        ({"apply_chat_template": True, "fewshot_as_multiturn": True, "num_fewshot": 0}, "needs examples, and"),
    ],
)
def test_promptings_that_contradict_themselves_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        asked_prompting(**options)


def test_turns_asked_for_where_no_task_has_examples_are_refused(place, chatty):
    eval_set = load(place, chatty, "toy", limit=2)
    with pytest.raises(UsageError, match="needs examples, and toy has none: give --num-fewshot"):
        check_turns(True, eval_set)
    check_turns(None, eval_set)
    check_turns(True, load(place, chatty, "toy", num_fewshot=1, limit=2))


def test_a_template_that_the_tokenizer_does_not_have_is_refused(place, loaded, chatty):
    with pytest.raises(UsageError, match="no template named 'tools'; it has one, which needs no name"):
        load(place, chatty, "toy", prompting=asked_prompting(apply_chat_template="tools"))
    chatty.tokenizer.chat_template = {"default": CHAT, "tool_use": CHAT.replace("user", "human")}
    with pytest.raises(UsageError, match=r"'tools'; it has default, tool_use.* Did you mean 'tool_use'"):
        load(place, chatty, "toy", prompting=asked_prompting(apply_chat_template="tools"))
    asked = asked_prompting(apply_chat_template="tool_use")
    item = load(place, chatty, "toy", prompting=asked, limit=1).tasks["toy"].items[0]
    assert chatty.tokenizer.chat_template.keys() == {"default", "tool_use"}
    assert item.key[0].args[0].startswith("<user>")
    chatty.tokenizer.chat_template = None
    with pytest.raises(UsageError, match="the tokenizer has no chat template; leave it out"):
        load(place, loaded, "toy", prompting=asked_prompting(apply_chat_template=True))


def test_log_likelihoods_and_generations_are_judged_as_lm_eval_judges_them(place, loaded):
    eval_set = load(place, loaded, "cloze", "writing", limit=8)
    engine = Engine(loaded)
    own = evaluate(engine, eval_set, [INTACT])[INTACT]
    assert own["cloze"].correct == by_lm_eval(place, loaded, "cloze", "acc", limit=8)
    assert own["writing"].correct == by_lm_eval(place, loaded, "writing", "exact_match", limit=8)
    assert own["writing"].gold_probability is None
    assert len(own["cloze"].gold_probability) == 8


@pytest.mark.parametrize("gone", [(), (0,), (2, 4)])
def test_generated_text_under_a_removal_is_that_of_the_smaller_model_token_by_token(place, loaded, gone):
    """Batched, with a cache, on shared weights; against one text at a time without any of it."""
    import torch

    eval_set = load(place, loaded, "writing")
    items = eval_set.tasks["writing"].items
    instances = [query.generation for item in items for query in item.queries]
    assert len({len(loaded.encoder.tok_encode(instance.args[0])) for instance in instances}) > 1  # some are padded
    written = generate(loaded, instances, Removal.of(*gone), memory=2**30)
    assert len({own.text for own in written}) > 1
    with loaded.without(Removal.of(*gone)) as model, torch.no_grad():
        for instance, own in zip(instances, written, strict=True):
            ids = loaded.encoder.tok_encode(instance.args[0])
            start = len(ids)
            for _ in range(4):
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            text = loaded.tokenizer.decode(ids[start:])
            assert text.split("\n")[0].split("</s>")[0] == own.text
            assert (own.prompt, own.ids) == (tuple(ids[:start]), tuple(ids[start : start + len(own.ids)]))
            ended = loaded.tokenizer.decode(own.ids)
            assert len(own.ids) == 4 or any(ended.endswith(stop) for stop in ("\n", "</s>"))
            assert "\n" not in loaded.tokenizer.decode(own.ids[:-1])


def test_an_answer_ends_with_the_token_that_completes_its_stop_sequence(place, loaded):
    items = load(place, loaded, "writing").tasks["writing"].items
    instances = [query.generation for item in items for query in item.queries]

    def stopped_by(*stops):
        changed = [copy.deepcopy(instance) for instance in instances]
        for instance in changed:
            instance.arguments = (instance.args[0], {**instance.args[1], "until": list(stops)})
        return generate(loaded, changed, memory=2**30)

    whole, decode, cut = stopped_by(), loaded.tokenizer.decode, 0
    stop = next(c for own in whole for c in own.text[:-1] if c.isascii() and c.isprintable())
    for own, before in zip(stopped_by(stop), whole, strict=True):
        places = [n for n in range(1, len(before.ids) + 1) if stop in decode(before.ids[:n])]
        assert own.ids == before.ids[: places[0] if places else len(before.ids)]
        assert own.text == decode(before.ids).split(stop)[0]
        cut += len(own.ids) < len(before.ids)
    assert cut


def test_texts_are_batched_by_setting_and_length_as_far_as_the_cache_may_grow(place, loaded):
    instances = [i.queries[0].generation for i in load(place, loaded, "writing").tasks["writing"].items]
    lengths = [len(loaded.encoder.tok_encode(instance.args[0])) for instance in instances]
    together = batches(loaded, instances, memory=2**30)
    assert sorted(place for batch in together for place in batch) == list(range(len(instances)))
    assert [len(batch) for batch in together] == [16, 2]
    ordered = [lengths[place] for batch in together for place in batch]
    assert ordered == sorted(lengths, reverse=True)
    most = 3 * (max(lengths) + 4) * loaded.cache_bytes
    assert max(map(len, batches(loaded, instances, memory=most))) == 3
    assert {len(batch) for batch in batches(loaded, instances, memory=1)} == {1}


def test_a_task_without_accuracy_is_refused_by_name(place, loaded):
    with pytest.raises(TaskError, match=r"'rolling' has no accuracy to lose \(its metrics: word_perplexity\)"):
        load(place, loaded, "rolling")


def test_gold_probability_and_chance_of_choices(place, loaded):
    eval_set = load(place, loaded, "toy", limit=5)
    task = eval_set.tasks["toy"]
    assert {item.chance for item in task.items} == {0.25}
    assert task.data().chance == 0.25
    verdict = task.judge(task.items[0], [(-1.0, False), (-2.0, False), (-3.0, False), (-4.0, False)])
    gold = task.items[0].key[0].doc["gold"]
    weights = [0.6439, 0.2369, 0.0871, 0.0321]
    assert verdict == Verdict(gold == 0, pytest.approx(weights[gold], abs=1e-4), 1.0 if gold == 0 else -float(gold))


def test_selection_takes_the_training_split_and_evaluation_the_test_split(place, loaded):
    selection, evaluation = load(place, loaded, "toy", use="selection"), load(place, loaded, "toy")
    first, second = selection.tasks["toy"], evaluation.tasks["toy"]
    assert (first.split, len(first.items)) == ("train", 20)
    assert (second.split, len(second.items)) == ("test", 60)
    assert not {item.fingerprint for item in first.items} & {item.fingerprint for item in second.items}


def test_without_a_training_split_halves_are_disjoint_and_whole(place, loaded):
    halves = [load(place, loaded, "halves", use=use).tasks["halves"] for use in ("selection", "evaluation")]
    marks = [{item.fingerprint for item in half.items} for half in halves]
    assert not marks[0] & marks[1]
    assert len(marks[0] | marks[1]) == 40
    assert min(map(len, marks)) > 8
    assert [half.split for half in halves] == ["half of test", "half of test"]


def test_a_limit_samples_the_selection_by_seed_and_takes_the_first_of_the_evaluation(place, loaded):
    def marks(**options):
        return [item.fingerprint for item in load(place, loaded, "toy", **options).tasks["toy"].items]

    assert marks(use="selection", limit=6, seed=1) == marks(use="selection", limit=6, seed=1)
    assert marks(use="selection", limit=6, seed=1) != marks(use="selection", limit=6, seed=2)
    assert marks(limit=6) == marks()[:6]


def test_seen_items_are_left_out_and_counted(place, loaded):
    everything = [item.fingerprint for item in load(place, loaded, "toy").tasks["toy"].items]
    rest = load(place, loaded, "toy", exclude=set(everything[:15])).tasks["toy"]
    assert rest.excluded == 15
    assert [item.fingerprint for item in rest.items] == everything[15:]
    with pytest.raises(TaskError, match="no items left for evaluation"):
        load(place, loaded, "toy", exclude=set(everything))


def test_a_selection_item_is_never_its_own_example(place, loaded):
    task = load(place, loaded, "toy", use="selection", num_fewshot=6).tasks["toy"]
    assert len(task.items) == 20
    for item in task.items:
        context, _ = item.key[0].args
        asked = item.key[0].doc["question"]
        assert context.endswith(asked)
        assert context.count(asked) == 1


def test_unknown_names_and_folders_are_one_line(place, loaded):
    with pytest.raises(TaskError, match=r"unknown task 'halve'. Did you mean 'halves'\?"):
        load_eval_set(["toy", "halve"], loaded.encoder, use="selection", include_path=[place / "tasks"])
    with pytest.raises(TaskError, match="does not exist"):
        load_eval_set(["toy"], loaded.encoder, use="selection", include_path=[place / "nothing"])


def test_held_back_items_are_a_fixed_share_and_disjoint():
    items = tuple(EvalItem(f"{n:016x}", 0.5, ()) for n in range(50))
    task = EvalTask("t", "train", "acc", 0, items, lambda item, answers: Verdict(True, None))
    seen, unseen = EvalSet({"t": task}).held_back(0.2)
    assert (len(seen), len(unseen)) == (40, 10)
    assert {i.fingerprint for i in seen.tasks["t"].items}.isdisjoint(i.fingerprint for i in unseen.tasks["t"].items)
    assert seen.followed_by(unseen).tasks["t"].items == (*seen.tasks["t"].items, *unseen.tasks["t"].items)


def test_templates_compiled_once_render_the_same_and_are_forgotten():
    from lm_eval import utils

    from layerprune.data.tasks import templates_compiled_once

    docs = [{"x": number} for number in range(3)]
    plain = [utils.apply_template("{{x}} and {{x + 1}}", doc) for doc in docs]
    with templates_compiled_once():
        assert utils.env.from_string("{{x}}") is utils.env.from_string("{{x}}")
        assert [utils.apply_template("{{x}} and {{x + 1}}", doc) for doc in docs] == plain
    assert "from_string" not in vars(utils.env)
    assert utils.env.from_string("{{x}}") is not utils.env.from_string("{{x}}")
