"""Searches over removals. They see only a judge and constraints, never a model, and repeat exactly under a seed."""

from layerprune.registry import Registry
from layerprune.search.base import (
    Judge,
    Others,
    Search,
    SearchResult,
    Watch,
    by_importance,
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
from layerprune.search.searches import Greedy, OneShot

SEARCHES = Registry(
    kind="search",
    group="layerprune.searches",
    base="layerprune.search.base:Search",
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
    "by_importance",
    "require_finite",
    "require_floors",
    "shortfall",
    "table_judge",
]
