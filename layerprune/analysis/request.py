"""What ``layerprune study`` is asked: plain values, with their one default each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerprune.planning import ScoreRequest

METRICS = (
    "ablation", "ablation:signal=probability", "cosine", "perplexity", "angular", "taylor", "relative", "magnitude",
)  # fmt: skip
BASELINES = ("reverse-order", "random")  # always shown: no metric is worth its price that does not beat them
AUDIT_LIMIT = 1000  # one accuracy on 1,000 items has a standard error of 1.5 points
# Shares of the stack at which accuracy is measured: close together where models still work, up to the paper's 75 %.
SHARES = (0.03, 0.07, 0.1, 0.15, 0.2, 0.25, 0.375, 0.5, 0.625, 0.75)
CALIBRATED_SHARES = (0.1, 0.25, 0.5)  # where calibrations are compared


@dataclass(frozen=True)
class StudyRequest:
    """A model, its tasks, and what is compared. ``score`` says how items that choose are had; its metric is ablation.

    ``counts``: layers removed at which accuracy is measured, by default ten up to 75 % of the stack. ``greedy``: also
    follow ablation's greedy path so far (a count or a share); it takes about as many rounds of scoring.
    """

    score: ScoreRequest
    metrics: tuple[str, ...] = METRICS
    audit_limit: int = AUDIT_LIMIT
    text: Path | None = None
    counts: tuple[int, ...] = ()
    greedy: str | None = None
