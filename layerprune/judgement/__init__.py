"""From what happened item by item to how much a removal harms: signals, objective over tasks, reliability. No torch."""

from layerprune.judgement.candidates import Intact, as_recorded, failures_last, judge, outcomes_of, rounded
from layerprune.judgement.objective import (
    additive,
    asked_objective,
    broken_floors,
    check_tasks,
    combined,
    combined_losses,
    shares,
)
from layerprune.judgement.rejudging import rejudged
from layerprune.judgement.signals import Signal, scale, signal_of, unit_of, values
from layerprune.judgement.stability import NOISY, can_be_split, reliability_of

__all__ = [
    "NOISY",
    "Intact",
    "Signal",
    "additive",
    "as_recorded",
    "asked_objective",
    "broken_floors",
    "can_be_split",
    "check_tasks",
    "combined",
    "combined_losses",
    "failures_last",
    "judge",
    "outcomes_of",
    "rejudged",
    "reliability_of",
    "rounded",
    "scale",
    "shares",
    "signal_of",
    "unit_of",
    "values",
]
