"""How far smaller models go along with what the base wrote: its own answers, read again token by token.

Free generation parts at the first other token, and nothing behind that can be compared; read with teacher forcing every
token counts, and a pass over prompt and answer is all it costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from layerprune.auditor.continuing import Text
from layerprune.documents import OWN_ANSWER, Followed, Interval, Outcomes, OwnAnswers
from layerprune.engine import Engine
from layerprune.engine.answering import own_answers
from layerprune.progress import Progress
from layerprune.stats import bootstrap_interval
from layerprune.tasks import Questions, TaskQuestions
from layerprune.tasks.answers import AgreementJudge, OwnAnswer, is_written, own_answer_items
from layerprune.tasks.items import fingerprint

SAMPLES = "sample prompts"


def own_answers_of(
    engine: Engine, questions: Questions, prompts: Sequence[str], texts: Sequence[Text], progress: Progress
) -> Questions:
    """Return the base's answers as items to be read: to the tasks that have it write, and to the sample prompts.

    ``texts`` are what the base wrote to the sample ``prompts``; an empty one is nothing to read.
    """
    written = {name: task for name, task in questions.tasks.items() if is_written(task)}
    tasks = dict(own_answers(engine, Questions(written), progress=progress).tasks) if written else {}
    own = {
        fingerprint(prompt): OwnAnswer(text.prompt_ids, text.ids, None)
        for prompt, text in zip(prompts, texts, strict=True)
        if text.ids
    }
    if own:
        items = own_answer_items(own)
        tasks[SAMPLES] = TaskQuestions(SAMPLES, "the same for all models", OWN_ANSWER, 0, items, AgreementJudge())
    return Questions(tasks)


def agreement(
    questions: Questions, base: Mapping[str, Outcomes], models: Mapping[str, Mapping[str, Outcomes]], seed: int
) -> tuple[OwnAnswers, ...]:
    """Return each model beside the base on the answers to each task's prompts."""
    return tuple(
        OwnAnswers(
            task=name,
            fingerprints=tuple(item.fingerprint for item in task.items),
            tokens=sum(part.scored for item in task.items for query in item.queries for part in query.parts),
            base_outcomes=base[name],
            models={label: followed(base[name], found[name], seed) for label, found in models.items()},
        )
        for name, task in questions.tasks.items()
    )


def followed(base: Outcomes, other: Outcomes, seed: int) -> Followed:
    """Return what a model loses of the base's answers, from both models' outcomes item by item."""
    lost = np.subtract(base.answer or (), other.answer or ())
    agreed = np.array(other.agreed or ())
    return Followed(
        nats=float(lost.mean()),
        interval=_interval(lost, seed),
        agreed=float(agreed.mean()),
        agreed_interval=_interval(agreed, seed),
        outcomes=other,
    )


def again(one: OwnAnswers, seed: int) -> OwnAnswers:
    """Work the figures out again from the outcomes, for ``verify``."""
    models = {label: followed(one.base_outcomes, found.outcomes, seed) for label, found in one.models.items()}
    return one.model_copy(update={"models": models})


def _interval(values: NDArray[np.float64], seed: int) -> Interval | None:
    return bootstrap_interval([values], seed=seed) if len(values) > 1 else None
