"""Slow: what a real model is asked, answers and writes, item by item, against lm-eval's own loop in float32.

Needs ``LAYERPRUNE_EVAL`` (a folder with lm-eval YAMLs in ``tasks/``; ``../shared/eval`` by default). The model is the
one that ``make demo`` fetches, or the folder ``LAYERPRUNE_MODEL``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from checkout import EVAL

ITEMS = 100
SYSTEM = "Answer shortly."

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EVAL.is_dir(), reason=f"no benchmarks at {EVAL}; set LAYERPRUNE_EVAL"),
]


@pytest.fixture(scope="module")
def loaded():
    from demo.model import fetch_model
    from layerprune.models.model import LoadedModel

    folder = Path(os.environ["LAYERPRUNE_MODEL"]) if "LAYERPRUNE_MODEL" in os.environ else fetch_model()
    return LoadedModel.load(str(folder), dtype="float32")


def samples_of(loaded, task, shots, prompting):
    """Return what lm-eval sent, and got back, and the accuracy it gave, per item."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=8),
        tasks=[task],
        task_manager=TaskManager(include_path=str(EVAL / "tasks"), include_defaults=False),
        num_fewshot=shots,
        limit=ITEMS,
        bootstrap_iters=0,
        log_samples=True,
        **prompting,
    )
    samples = found["samples"][task]
    first = samples[0]["filter"]  # an item is logged once for each filter of its task; layerprune applies the first
    return sorted((one for one in samples if one["filter"] == first), key=lambda sample: sample["doc_id"])


PLAIN: dict[str, object] = {}
CHAT = {"apply_chat_template": True}
SETTINGS = {
    "plain": (None, PLAIN),
    "two examples": (2, PLAIN),
    "chat": (None, CHAT),
    "chat, system": (None, {**CHAT, "system_instruction": SYSTEM}),
    "chat, system, two turns": (2, {**CHAT, "system_instruction": SYSTEM, "fewshot_as_multiturn": True}),
    "chat, two examples in one turn": (2, {**CHAT, "fewshot_as_multiturn": False}),
}


@pytest.fixture
def asked(loaded):
    def ask(task, setting):
        from layerprune.config import PromptOptions
        from layerprune.data.tasks import load_eval_set, prompting_of

        shots, options = SETTINGS[setting]
        prompting = prompting_of(PromptOptions(num_fewshot=shots, **options))
        eval_set = load_eval_set(
            [task], loaded.encoder, use="evaluation", include_path=[EVAL / "tasks"], limit=ITEMS, num_fewshot=shots,
            prompting=prompting,
        )  # fmt: skip
        return eval_set.tasks[task], samples_of(loaded, task, shots, options)

    return ask


@pytest.mark.parametrize("setting", SETTINGS)
def test_choices_are_asked_and_judged_as_lm_eval_does(loaded, asked, setting):
    from layerprune.removal import Removal
    from layerprune.scoring.engine import Engine
    from layerprune.scoring.evaluator import answer_items

    task, samples = asked("local_arc_easy", setting)
    assert len(samples) == len(task.items) == ITEMS
    [answers] = answer_items(Engine(loaded), task.items, [Removal(())])
    difference, other = 0.0, 0
    for item, own, sample in zip(task.items, answers, samples, strict=True):
        assert [instance.args for instance in item.key] == [tuple(sent) for sent in sample["arguments"]]
        theirs = [float(resp[0][0]) for resp in sample["resps"]]
        difference = max(difference, *(abs(mine[0] - his) for mine, his in zip(own, theirs, strict=True)))
        other += task.judge(item, own).correct != bool(sample[task.metric])
    print(f"arc_easy, {setting}: {ITEMS} items, largest difference {difference:.2g} nats, other verdicts {other}")
    assert difference < 1e-3  # of sums of float32 log-probabilities in other batch shapes
    assert other == 0


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("local_squad", "plain"),
        ("local_squad", "chat"),
        ("local_squad", "chat, system"),
        ("local_gsm8k", "chat, system, two turns"),
    ],
)
def test_texts_are_written_and_judged_as_lm_eval_does(loaded, asked, name, setting):
    from layerprune.models.generation import generate

    task, samples = asked(name, setting)
    assert len(samples) == len(task.items) == ITEMS
    instances = [item.queries[0].generation for item in task.items]
    written = generate(loaded, instances, memory=2**30)
    for instance, sample in zip(instances, samples, strict=True):
        assert instance.args[0] == sample["arguments"][0][0]
    texts = sum(own.text != sample["resps"][0][0] for own, sample in zip(written, samples, strict=True))
    verdicts = sum(
        task.judge(item, [own.text]).correct != bool(sample[task.metric])
        for item, own, sample in zip(task.items, written, samples, strict=True)
    )
    print(f"{name}, {setting}: {ITEMS} items, other texts {texts}, other verdicts {verdicts}")
    assert (texts, verdicts) == (0, 0)
