"""Searches over removals. They see only a judge and constraints, never a model, and repeat exactly under a seed."""

from layerprune.planners.base import (
    Asking,
    Found,
    Judge,
    Others,
    Search,
    Watch,
    asks,
    bound,
    by_harm,
    judged,
    next_to_go,
    require_finite,
    require_floors,
    shortfall,
    table_judge,
)
from layerprune.planners.constraints import Constraints, check_drop, parse_drop, parse_protect
from layerprune.planners.shapes import Anything, Contiguous, Move, NoAdjacent, Shape
from layerprune.planners.stepwise import Greedy, OneShot, greedy, one_shot
from layerprune.registry import Registry

SEARCHES = Registry(
    kind="search",
    group="layerprune.searches",
    builtin={
        "one-shot": "layerprune.planners.stepwise:OneShot",
        "greedy": "layerprune.planners.stepwise:Greedy",
        "blocks": "layerprune.planners.blocks:Blocks",
        "exchange": "layerprune.planners.exchange:Exchange",
    },
)

__all__ = [
    "SEARCHES",
    "Anything",
    "Asking",
    "Constraints",
    "Contiguous",
    "Found",
    "Greedy",
    "Judge",
    "Move",
    "NoAdjacent",
    "OneShot",
    "Others",
    "Search",
    "Shape",
    "Watch",
    "asks",
    "bound",
    "by_harm",
    "check_drop",
    "greedy",
    "judged",
    "next_to_go",
    "one_shot",
    "parse_drop",
    "parse_protect",
    "require_finite",
    "require_floors",
    "shortfall",
    "table_judge",
]
