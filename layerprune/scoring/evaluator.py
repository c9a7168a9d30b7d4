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
from layerprune.models.generation import generate
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
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
    return Verdict(
        correct=False,
        gold_probability=None if known.gold_probability is None else 0.0,
        margin=None if known.margin is None else 0.0,
        answer=None if known.answer is None else 0.0,
        agreed=None if known.agreed is None else 0.0,
        finite=False,
    )


def _blank(answer: Answer) -> Answer:
    return (0.0, False) if isinstance(answer, tuple) else 0.0 if isinstance(answer, float) else answer


def _finite(answer: Answer) -> bool:
    return isinstance(answer, str) or math.isfinite(answer[0] if isinstance(answer, tuple) else answer)


def outcomes(verdicts: Sequence[Verdict], *, margins: bool = False) -> Outcomes:
    """Write verdicts the way documents hold them, the margins where asked for."""
    known = [v.gold_probability for v in verdicts if v.gold_probability is not None]
    leads = [v.margin for v in verdicts if v.margin is not None] if margins else []
    read = [v.answer for v in verdicts if v.answer is not None]
    agreed = [v.agreed for v in verdicts if v.agreed is not None]
    return Outcomes(
        correct="".join("1" if verdict.correct else "0" for verdict in verdicts),
        gold_probability=tuple(round(p, DECIMALS) for p in known) if len(known) == len(verdicts) else None,
        margin=tuple(float(f"{m:.{MARGIN_DIGITS}g}") for m in leads) if leads and len(leads) == len(verdicts) else None,
        answer=tuple(float(f"{nats:.{MARGIN_DIGITS}g}") for nats in read) if len(read) == len(verdicts) else None,
        agreed=tuple(round(share, DECIMALS) for share in agreed) if len(agreed) == len(verdicts) else None,
        not_finite=sum(not verdict.finite for verdict in verdicts),
    )


def joined(pieces: Sequence[Outcomes]) -> Outcomes:
    """Put the outcomes of consecutive items together."""
    return Outcomes(
        correct="".join(piece.correct for piece in pieces),
        gold_probability=_chained([piece.gold_probability for piece in pieces]),
        margin=_chained([piece.margin for piece in pieces]),
        answer=_chained([piece.answer for piece in pieces]),
        agreed=_chained([piece.agreed for piece in pieces]),
        not_finite=sum(piece.not_finite for piece in pieces),
    )


def _chained(parts: Sequence[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    known = [part for part in parts if part is not None]
    return tuple(value for part in known for value in part) if len(known) == len(parts) else None


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
    generated = _generated(engine, items, removals, heard)
    result: list[list[list[Answer]]] = []
    for number in range(len(removals)):
        cursor = iter(range(len(requests)))
        texts = iter(generated[number])
        answers = [[_answer(query, cursor, texts, sums, agreed, number) for query in item.queries] for item in items]
        result.append(answers)
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


def _answer(
    query: Query, cursor: Iterator[int], texts: Iterator[str], sums: np.ndarray, agreed: np.ndarray, removal: int
) -> Answer:
    """Put one query's answer together from the next measurements in line."""
    if query.generation is not None:
        return next(texts)
    parts = [next(cursor) for _ in query.parts]
    total = float(sum(sums[removal, part] for part in parts))
    if query.rolling:
        return total
    if query.counted:
        return total, int(agreed[removal, parts[0]])
    return total, bool(agreed[removal, parts[0]] == query.parts[0].scored)


def _generated(
    engine: Engine, items: Sequence[EvalItem], removals: Sequence[Removal], heard: Callable[[float], None]
) -> list[list[str]]:
    """Return the texts of generate_until queries, by removal: each removal writes its own, so nothing is shared."""
    instances = [q.generation for item in items for q in item.queries if q.generation is not None]
    if not instances:
        return [[] for _ in removals]
    options: dict[str, Any] = {"memory": engine.memory, "rows": engine.rows, "done": heard}
    return [[own.text for own in generate(engine.loaded, instances, removal, **options)] for removal in removals]
