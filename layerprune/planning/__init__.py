"""From a model to a plan: score removals by a metric, search, predict what the result costs, write it down."""

from layerprune.planning.limits import keeping_period
from layerprune.planning.recorded import replan
from layerprune.planning.request import DEFAULT_LIMIT, PlanRequest, ScoreRequest
from layerprune.planning.scoring import score_model
from layerprune.planning.searching import HELD_BACK, plan_model
from layerprune.planning.versions import tool_versions

__all__ = [
    "DEFAULT_LIMIT",
    "HELD_BACK",
    "PlanRequest",
    "ScoreRequest",
    "keeping_period",
    "plan_model",
    "replan",
    "score_model",
    "tool_versions",
]
