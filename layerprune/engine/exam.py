"""From removals and questions to outcomes per task: what was right, and how probable the gold answer was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from layerprune.documents import Outcomes
from layerprune.engine.engine import Engine
from layerprune.errors import ModelError
from layerprune.progress import SILENT, Progress
from layerprune.removal import Removal
from layerprune.tasks.items import Answer, Item, Query, Questions, Request, Verdict

# Decimals kept of a probability: a document's size is mostly these, and the fifth is noise in bfloat16.
DECIMALS = 5
MARGIN_DIGITS = 4  # significant ones kept of a margin, which may be hundredths of a nat or tens


def examine(
    engine: Engine,
    questions: Questions,
    removals: Sequence[Removal],
    progress: Progress = SILENT,
    label: str = "scoring",
    *,
    margins: bool = False,
) -> dict[Removal, dict[str, Outcomes]]:
    """Answer every item under every removal, all at once, and return the outcomes by removal and task."""
    items = [item for task in questions.tasks.values() for item in task.items]
    with progress.task(label, len(items) * len(removals), "items") as advance:
        answers = answer_items(engine, items, removals, advance)
    return {
        removal: judged(questions, own, margins=margins) for removal, own in zip(removals, answers, strict=True)
    }


def judged(
    questions: Questions, answers: Sequence[Sequence[Answer]], *, margins: bool = False
) -> dict[str, Outcomes]:
    """Judge one removal's answers, item after item through the tasks in order."""
    given = iter(answers)
    return {
        name: outcomes([task.judge(item, next(given)) for item in task.items], margins=margins)
        for name, task in questions.tasks.items()
    }


def outcomes(verdicts: Sequence[Verdict], *, margins: bool = False) -> Outcomes:
    """Write verdicts the way documents hold them, the margins where asked for."""
    known = [v.gold_probability for v in verdicts if v.gold_probability is not None]
    leads = [v.margin for v in verdicts if v.margin is not None] if margins else []
    return Outcomes(
        correct="".join("1" if verdict.correct else "0" for verdict in verdicts),
        gold_probability=tuple(round(p, DECIMALS) for p in known) if len(known) == len(verdicts) else None,
        margin=tuple(float(f"{m:.{MARGIN_DIGITS}g}") for m in leads) if leads and len(leads) == len(verdicts) else None,
    )


def joined(pieces: Sequence[Outcomes]) -> Outcomes:
    """Put the outcomes of consecutive items together."""
    probabilities, margins = [piece.gold_probability for piece in pieces], [piece.margin for piece in pieces]
    return Outcomes(
        correct="".join(piece.correct for piece in pieces),
        gold_probability=None if None in probabilities else tuple(p for ps in probabilities if ps for p in ps),
        margin=None if None in margins else tuple(m for ms in margins if ms for m in ms),
    )


def answer_items(
    engine: Engine, items: Sequence[Item], removals: Sequence[Removal], advance: Callable[[float], None] | None = None
) -> list[list[list[Answer]]]:
    """Return answers[removal][item][query]; ``advance`` hears of finished items x removals."""
    requests, groups = as_requests(items)
    heard = advance or (lambda amount: None)
    sums = greedy = np.empty((len(removals), 0))
    if requests:
        share = len(groups) / len(requests)  # a finished request is that much of an item
        sums, greedy = engine.measure(requests, groups, removals, lambda finished: heard(finished * share))
        for removal, own in zip(removals, sums, strict=True):
            if not np.isfinite(own).all():
                raise ModelError(f"log-likelihoods without {removal} are not finite: try --dtype float32")
    generated = _generated(engine, items, removals, heard)
    result: list[list[list[Answer]]] = []
    for number in range(len(removals)):
        cursor = iter(range(len(requests)))
        texts = iter(generated[number])
        answers = [[_answer(query, cursor, texts, sums, greedy, number) for query in item.queries] for item in items]
        result.append(answers)
    return result


def as_requests(items: Sequence[Item]) -> tuple[list[Request], list[list[int]]]:
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
    query: Query, cursor: Iterator[int], texts: Iterator[str], sums: np.ndarray, greedy: np.ndarray, removal: int
) -> Answer:
    """Put one query's answer together from the next measurements in line."""
    if query.generation is not None:
        return next(texts)
    parts = [next(cursor) for _ in query.parts]
    total = float(sum(sums[removal, part] for part in parts))
    return total if query.rolling else (total, bool(greedy[removal, parts[0]]))


def _generated(
    engine: Engine, items: Sequence[Item], removals: Sequence[Removal], heard: Callable[[float], None]
) -> list[list[str]]:
    """Generate text for generate_until queries: one removal after the other, no short cut."""
    instances = [q.generation.instance for item in items for q in item.queries if q.generation is not None]
    if not instances:
        return [[] for _ in removals]
    texts = []
    encoder = engine.subject.encoder
    for removal in removals:
        with engine.subject.without(removal):
            encoder.use_cache = len(removal) == 0
            texts.append(list(encoder.generate_until(instances, disable_tqdm=True)))
        heard(len(instances))
    return texts
