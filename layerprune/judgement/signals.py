"""Signals: what each answered item is worth, and what a loss of it is a share of.

accuracy     1 right, 0 wrong; a loss is a share of the intact model's accuracy above chance (relevance)
probability  the gold answer's probability among the choices; a share of the intact model's mean
margin       log-likelihood of the gold answer minus that of the best wrong one, positive where the answer is right;
             normalised as the task's accuracy is: nats per character of the answer where that is acc_norm, else nats.
             A loss is counted in standard deviations of the intact model's margins, for a mean margin may be 0
blend        the mean of accuracy and probability; a share of the intact model's accuracy above chance
answers      of tasks that have the model write: log-likelihood of the intact model's own answer, nats per token, in
             which a loss is counted. Of tasks that offer choices: accuracy
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from layerprune.documents import MetricRef, Outcomes
from layerprune.errors import TaskError
from layerprune.stats import as_bits

Signal = Literal["accuracy", "probability", "margin", "blend", "answers"]
Floats = NDArray[np.float64]


def signal_of(metric: MetricRef) -> Signal:
    """Return the signal a recorded metric went by; accuracy where it has no such option."""
    named = metric.options.get("signal")
    return next((signal for signal in get_args(Signal) if signal == named), "accuracy")


def unit_of(metric: Any) -> str:
    """Return the unit of a metric's scores with the options it has: answers are lost in nats per token."""
    return "nats per token" if getattr(metric, "signal", None) == "answers" else str(metric.unit)


def values(signal: Signal, task: str, outcomes: Outcomes) -> Floats:
    """Return what each item is worth, (items,); raises ``TaskError`` where the items do not have the signal."""
    if signal == "margin":
        if outcomes.margin is None:
            raise TaskError(
                f"task {task!r} offers no choices, or its margins were not recorded: no gold answer has a margin; "
                "use signal=accuracy"
            )
        return np.array(outcomes.margin)
    if signal == "answers" and outcomes.answer is not None:
        return np.array(outcomes.answer)
    correct = as_bits(outcomes.correct).astype(float)
    if signal in ("accuracy", "answers"):
        return correct
    if outcomes.gold_probability is None:
        raise TaskError(f"task {task!r} offers no choices: no gold answer has a probability; use signal=accuracy")
    probability = np.array(outcomes.gold_probability)
    return probability if signal == "probability" else (correct + probability) / 2


def scale(signal: Signal, task: str, base: Outcomes, chance: float) -> float:
    """Return what a loss is a share of, from the intact model's outcomes; ``TaskError`` where that is nothing."""
    if signal == "answers" and base.answer is not None:
        return 1.0
    if signal in ("accuracy", "blend", "answers"):
        level = base.accuracy - chance
    else:
        own = values(signal, task, base)
        level = float(own.mean() if signal == "probability" else own.std())
    if not level > 0:
        raise TaskError(f"task {task!r}: the intact model has no {signal} to lose ({level:.3g}); leave it out")
    return level
