"""The items whose answers changed, in words: what a reader looks at to see what kind of knowledge went."""

from __future__ import annotations

from layerprune.documents import FlippedItem, Outcomes
from layerprune.tasks import Item, TaskQuestions
from layerprune.tasks.judging import choices_of, gold_of

SHOWN = 20  # items each way and task: enough to read, and an audit stays a few hundred kilobytes
LONGEST = 500  # characters of a question; few-shot examples stand before it and are cut off


def flipped_items(task: TaskQuestions, base: Outcomes, pruned: Outcomes) -> tuple[FlippedItem, ...]:
    """Return the flipped items of one task, right to wrong first, each way by how far the gold probability moved."""
    places = [place for place, pair in enumerate(zip(base.correct, pruned.correct, strict=True)) if pair[0] != pair[1]]

    def moved(place: int) -> float:
        if base.gold_probability is None or pruned.gold_probability is None:
            return 0.0
        return -abs(pruned.gold_probability[place] - base.gold_probability[place])

    lost = sorted((place for place in places if base.correct[place] == "1"), key=moved)[:SHOWN]
    won = sorted((place for place in places if base.correct[place] == "0"), key=moved)[:SHOWN]
    return tuple(_flipped(task, task.items[place], place, base, pruned) for place in (*lost, *won))


def _flipped(task: TaskQuestions, item: Item, place: int, base: Outcomes, pruned: Outcomes) -> FlippedItem:
    lm_task = getattr(task.judge, "task", None)
    offered = lm_task is not None and lm_task.OUTPUT_TYPE == "multiple_choice"
    doc = item.key[0].doc
    return FlippedItem(
        fingerprint=item.fingerprint,
        fixed=pruned.correct[place] == "1",
        question=str(item.key[0].args[0])[-LONGEST:],
        answers=tuple(str(answer) for answer in choices_of(lm_task, doc)) if offered else (),
        gold=tuple(gold_of(lm_task, doc)) if offered else (),
        base_gold_probability=None if base.gold_probability is None else base.gold_probability[place],
        gold_probability=None if pruned.gold_probability is None else pruned.gold_probability[place],
    )
