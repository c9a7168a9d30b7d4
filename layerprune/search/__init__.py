"""Searches over removals. They see only a judge and constraints, never a model, and repeat exactly under a seed."""

from layerprune.registry import Registry
from layerprune.search.base import (
    Judge,
    Others,
    Search,
    SearchResult,
    Watch,
    asks,
    bound,
    by_importance,
    next_to_go,
    require_finite,
    require_floors,
    shortfall,
    table_judge,
)
from layerprune.search.constraints import (
    AnyShape,
    Constraints,
    Contiguous,
    NoAdjacent,
)
from layerprune.search.searches import Greedy, OneShot, greedy, one_shot

SEARCHES = Registry(
    kind="search",
    group="layerprune.searches",
    builtin={
        "one-shot": "layerprune.search.searches:OneShot",
        "greedy": "layerprune.search.searches:Greedy",
        "blocks": "layerprune.search.searches:Blocks",
        "exchange": "layerprune.search.searches:Exchange",
    },
)

__all__ = [
    "SEARCHES",
    "AnyShape",
    "Constraints",
    "Contiguous",
    "Greedy",
    "Judge",
    "NoAdjacent",
    "OneShot",
    "Others",
    "Search",
    "SearchResult",
    "Watch",
    "asks",
    "bound",
    "by_importance",
    "greedy",
    "next_to_go",
    "one_shot",
    "require_finite",
    "require_floors",
    "shortfall",
    "table_judge",
]
