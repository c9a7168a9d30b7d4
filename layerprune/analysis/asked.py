"""What a study always compares, and how its options are those of scoring."""

from __future__ import annotations

from dataclasses import fields

from layerprune.config import ScoreConfig, StudyConfig

BASELINES = ("reverse-order", "random")  # always shown: no metric is worth its price that does not beat them
# Shares of the stack at which accuracy is measured: close together where models still work, up to the paper's 75 %.
SHARES = (0.03, 0.07, 0.1, 0.15, 0.2, 0.25, 0.375, 0.5, 0.625, 0.75)
DRAWS = 3  # of the random baseline: one draw says little
CALIBRATED_SHARES = (0.1, 0.25, 0.5)  # where calibrations are compared


def scoring_of(config: StudyConfig) -> ScoreConfig:
    """Return how the items that choose are had, and ablation on them."""
    names = {one.name for one in fields(ScoreConfig)} & {one.name for one in fields(StudyConfig)}
    return ScoreConfig(**{name: getattr(config, name) for name in names})
