"""From a model to a plan: score removals by a metric, search, predict what the result costs, write it down."""

from layerprune.planning.asked import GOAL_OPTIONS, PlanRequest, goal_of
from layerprune.planning.goals import HELD_BACK, Drop, Goal
from layerprune.planning.limits import Rules, keeping_period
from layerprune.planning.recorded import replan
from layerprune.planning.request import DEFAULT_LIMIT, ScoreRequest
from layerprune.planning.scoring import score_model
from layerprune.planning.searching import plan_model
from layerprune.planning.versions import tool_versions

__all__ = [
    "DEFAULT_LIMIT",
    "GOAL_OPTIONS",
    "HELD_BACK",
    "Drop",
    "Goal",
    "PlanRequest",
    "Rules",
    "ScoreRequest",
    "goal_of",
    "keeping_period",
    "plan_model",
    "replan",
    "score_model",
    "tool_versions",
]
