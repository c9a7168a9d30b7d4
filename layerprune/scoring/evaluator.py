"""From removals and items to outcomes per task: what was right, and how probable the gold answer was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from layerprune.artifacts import Outcomes
from layerprune.data.items import Answer, EvalItem, EvalSet, Judge, Query, Request, Verdict
from layerprune.errors import ModelError
from layerprune.models.generation import Written, generate
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.aggregation import PER_ITEM
from layerprune.scoring.engine import Engine
from layerprune.util import SILENT, Progress

# Decimals kept of a probability: a document's size is mostly these, and the fifth is noise in bfloat16.
DECIMALS = 5
MARGIN_DIGITS = 4  # significant ones kept of a margin, which may be hundredths of a nat or tens


def evaluate(
    engine: Engine,
    eval_set: EvalSet,
    removals: Sequence[Removal],
    progress: Progress = SILENT,
    label: str = "scoring",
    *,
    margins: bool = False,
) -> dict[Removal, dict[str, Outcomes]]:
    """Answer every item under every removal, all at once, and return the outcomes by removal and task."""
    items = [item for task in eval_set.tasks.values() for item in task.items]
    with progress.task(label, len(items) * len(removals), "items") as advance:
        answers = answer_items(engine, items, removals, advance)
    found = {removal: judged(eval_set, own, margins=margins) for removal, own in zip(removals, answers, strict=True)}
    for removal, own in found.items():
        if wrong := sum(task.not_finite for task in own.values()):
            progress.note(f"without {removal} the log-likelihoods of {wrong} items are not finite: counted wrong")
    return found


def judged(eval_set: EvalSet, answers: Sequence[Sequence[Answer]], *, margins: bool = False) -> dict[str, Outcomes]:
    """Judge one removal's answers, item after item through the tasks in order."""
    given = iter(answers)
    return {
        name: outcomes([_verdict(task.judge, item, next(given)) for item in task.items], margins=margins)
        for name, task in eval_set.tasks.items()
    }


def _verdict(judge: Judge, item: EvalItem, answers: Sequence[Answer]) -> Verdict:
    """Judge one item; where a log-likelihood is no finite number the item is wrong and its gold answer improbable."""
    if all(_finite(answer) for answer in answers):
        return judge(item, answers)
    known = judge(item, [_blank(answer) for answer in answers])  # whether it has a gold probability and a margin at all
    nothing = {name: None if getattr(known, name) is None else 0.0 for name in PER_ITEM}
    return Verdict(correct=False, finite=False, **nothing)


def _blank(answer: Answer) -> Answer:
    return (0.0, False) if isinstance(answer, tuple) else 0.0 if isinstance(answer, float) else answer


def _finite(answer: Answer) -> bool:
    return isinstance(answer, str) or math.isfinite(answer[0] if isinstance(answer, tuple) else answer)


def outcomes(verdicts: Sequence[Verdict], *, margins: bool = False) -> Outcomes:
    """Write verdicts the way documents hold them, the margins where asked for."""

    def figures(name: str, rounded: Callable[[float], float]) -> tuple[float, ...] | None:
        known = [getattr(verdict, name) for verdict in verdicts]
        return None if None in known else tuple(map(rounded, known))

    def significant(value: float) -> float:
        return float(f"{value:.{MARGIN_DIGITS}g}")

    return Outcomes(
        correct="".join("1" if verdict.correct else "0" for verdict in verdicts),
        gold_probability=figures("gold_probability", lambda share: round(share, DECIMALS)),
        margin=figures("margin", significant) if margins else None,
        answer=figures("answer", significant),
        agreed=figures("agreed", lambda share: round(share, DECIMALS)),
        not_finite=sum(not verdict.finite for verdict in verdicts),
    )


def answer_items(
    engine: Engine,
    items: Sequence[EvalItem],
    removals: Sequence[Removal],
    advance: Callable[[float], None] | None = None,
) -> list[list[list[Answer]]]:
    """Return answers[removal][item][query]; ``advance`` hears of finished items x removals.

    Raises ``ModelError`` where the intact model's log-likelihoods are not finite; those of a removal are its own fault.
    """
    requests, groups = as_requests(items)
    heard = advance or (lambda amount: None)
    sums = agreed = np.empty((len(removals), 0))
    if requests:
        share = len(groups) / len(requests)  # a finished request is that much of an item
        sums, agreed = engine.measure(requests, groups, removals, lambda finished: heard(finished * share))
        for removal, own in zip(removals, sums, strict=True):
            if not len(removal) and not np.isfinite(own).all():
                raise not_finite(engine.loaded, "log-likelihoods")
    instances = [q.generation for item in items for q in item.queries if q.generation is not None]
    options: dict[str, Any] = {"memory": engine.memory, "rows": engine.rows, "done": heard}
    result: list[list[list[Answer]]] = []
    for removal, own, matching in zip(removals, sums, agreed, strict=True):
        # each removal writes its own texts: nothing is shared
        texts = iter(generate(engine.loaded, instances, removal, **options) if instances else [])
        parts = zip(own, matching, strict=True)
        result.append([[_answer(query, parts, texts) for query in item.queries] for item in items])
    return result


def not_finite(loaded: LoadedModel, figures: str) -> ModelError:
    """Return the error of a model whose figures are not finite with all its layers in place."""
    exact = loaded.dtype in (torch.float32, torch.float64)
    advice = "look for weights that are not finite" if exact else "try --dtype float32"
    return ModelError(f"{figures} of {loaded.ref.id} itself are not finite: {advice}")


def as_requests(items: Sequence[EvalItem]) -> tuple[list[Request], list[list[int]]]:
    """Return all log-likelihood requests of the items, in order, and the indices that belong to one item."""
    requests: list[Request] = []
    groups: list[list[int]] = []
    for item in items:
        own = [part for query in item.queries for part in query.parts]
        if own:
            groups.append(list(range(len(requests), len(requests) + len(own))))
            requests.extend(own)
    return requests, groups


def _answer(query: Query, measured: Iterator[tuple[float, int]], texts: Iterator[Written]) -> Answer:
    """Put one query's answer together from the next measurements in line."""
    if query.generation is not None:
        return next(texts).text
    parts = [next(measured) for _ in query.parts]
    total = float(sum(nats for nats, _ in parts))
    if query.rolling:
        return total
    agreed = int(parts[0][1])
    return total, agreed if query.counted else agreed == query.parts[0].scored
