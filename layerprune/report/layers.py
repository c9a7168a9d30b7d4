"""The report, layer by layer: rankings as bars and as a table, and the way from the base to the removal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerprune.documents import PRUNED, UNHEALED, Audit, Interval, Plan, Ranked
from layerprune.report import plots, words
from layerprune.stats import displayed


@dataclass(frozen=True)
class Ranks:
    """One metric's scores, layer by layer."""

    name: str
    unit: str
    source: str
    scores: dict[int, Ranked]


def rankings(plan: Plan, audit: Audit) -> list[Ranks]:
    """Return the plan's own ranking and those the audit holds beside it."""
    own = [
        Ranks(one.words, one.unit, _items(plan), _by_unit(plan.ranking, one.unit, one.spec))
        for one in [plan.metric]
        if one is not None
    ]
    others = [
        Ranks(one.metric, one.unit, one.source, _by_unit(one.ranking, one.unit, one.metric)) for one in audit.rankings
    ]
    return [ranks for ranks in (*own, *others) if ranks.scores]


def drawn(ranks: Ranks, plan: Plan) -> str:
    """Return a ranking as bars in the order of the layers."""
    given = [plots.Bar(str(unit), one.score, unit in plan.removal, one.interval) for unit, one in ranks.scores.items()]
    return plots.bars(f"{ranks.name}: cost of removing each layer; removed layers are filled", given, ranks.unit)


def table(plan: Plan, shown: Sequence[Ranks]) -> list[tuple[str, bool, list[str]]]:
    """Return (layer, whether it is removed, a figure of each ranking) for every layer: the bars for who cannot see."""
    units = sorted({unit for ranks in shown for unit in ranks.scores})
    return [(str(unit), unit in plan.removal, [_figure(ranks, unit) for ranks in shown]) for unit in units]


def path(audit: Audit) -> str | None:
    """Return the difference of accuracy along the plan's order, and the other models of the audit beside it."""
    if audit.layerwise is None:
        return None
    steps = [one for one in audit.layerwise.path if one.difference is not None]
    if not steps:
        return None
    points = [plots.Point(0, 0.0, "base: 0 removed")]
    points += [
        _point(f"{len(one.units)} removed", len(one.units), one.difference or 0.0, one.interval) for one in steps
    ]
    beside = [
        _point("healed" if label == PRUNED else label, count, found.difference, found.interval)
        for label, found in audit.overall.items()
        if (count := _count(audit, label)) is not None
    ]
    title = "Difference of accuracy from the base in points against the number of layers removed"
    return plots.curve(title, points, "layers removed", "points", beside)


def _count(audit: Audit, label: str) -> int | None:
    """Return how many units a model beside the path lacks; None for those that lie on it."""
    if label == PRUNED:
        return len(audit.removal) if audit.heal_sha256 else None
    return None if label == UNHEALED else len(audit.compared[label].removal)


def _point(name: str, count: int, difference: float, interval: Interval | None) -> plots.Point:
    said = f"{name}: {words.points(difference)} points" + (f" ({words.points_interval(interval)})" if interval else "")
    scaled = None if interval is None else (100 * interval[0], 100 * interval[1])
    return plots.Point(count, 100 * difference, said, scaled)


def _items(plan: Plan) -> str:
    return f"{sum(data.items for data in plan.data)} selection items" if plan.data else "no items"


def _by_unit(ranking: Sequence[Ranked], unit: str, metric: str) -> dict[int, Ranked]:
    return {one.unit: _displayed(one, unit, metric) for one in sorted(ranking, key=lambda one: one.unit)}


def _displayed(one: Ranked, unit: str, metric: str) -> Ranked:
    score, *limits = (displayed(each, unit, metric) for each in (one.score, *(one.interval or ())))
    return one.model_copy(update={"score": score, "interval": tuple(limits) or None})


def _figure(ranks: Ranks, unit: int) -> str:
    one = ranks.scores.get(unit)
    return "" if one is None else f"{one.score:.3g}".replace("-", words.MINUS)
