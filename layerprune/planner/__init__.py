"""From a model to a plan: score removals by a metric, search, predict what the result costs, write it down."""

from layerprune.planner.front import front_model
from layerprune.planner.goals import goal_of
from layerprune.planner.plan_documents import plan_from_scores, replan, save_scores
from layerprune.planner.planner import plan_model, score_model

__all__ = [
    "front_model",
    "goal_of",
    "plan_from_scores",
    "plan_model",
    "replan",
    "save_scores",
    "score_model",
]
