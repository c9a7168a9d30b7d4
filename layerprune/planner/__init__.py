"""From a model to a plan: score removals by a metric, search, predict what the result costs, write it down."""

from layerprune.artifacts.plan import FOLDER as FRONT_FOLDER
from layerprune.planner.front import front_model
from layerprune.planner.goals import HELD_BACK, Drop, Farthest, Goal, goal_of
from layerprune.planner.plan_documents import laid, lay, plan_from_scores, replan
from layerprune.planner.planner import plan_model, score_model
from layerprune.planner.session import SearchRules, keeping_period

__all__ = [
    "FRONT_FOLDER",
    "HELD_BACK",
    "Drop",
    "Farthest",
    "Goal",
    "SearchRules",
    "front_model",
    "goal_of",
    "keeping_period",
    "laid",
    "lay",
    "plan_from_scores",
    "plan_model",
    "replan",
    "score_model",
]
