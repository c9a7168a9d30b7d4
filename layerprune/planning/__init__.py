"""From a model to a plan: score removals by a metric, search, predict what the result costs, write it down."""

from layerprune.planning.asked import goal_of
from layerprune.planning.farthest import Farthest
from layerprune.planning.front import FOLDER as FRONT_FOLDER
from layerprune.planning.front import front_model
from layerprune.planning.goals import HELD_BACK, Drop, Goal
from layerprune.planning.laying import laid, lay
from layerprune.planning.limits import Rules, keeping_period
from layerprune.planning.recorded import plan_from_scores, replan
from layerprune.planning.scoring import score_model
from layerprune.planning.searching import plan_model

__all__ = [
    "FRONT_FOLDER",
    "HELD_BACK",
    "Drop",
    "Farthest",
    "Goal",
    "Rules",
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
