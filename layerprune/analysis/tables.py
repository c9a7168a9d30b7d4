"""Every figure of a study as CSV; study.html shows the main ones (``condensed``)."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from layerprune.documents import Study
from layerprune.documents.study import Estimate

Cell = str | int | float | bool | None


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    name: str  # of the file
    header: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def as_csv(self) -> str:
        """Return RFC 4180 text; what has no value is an empty field."""
        out = io.StringIO()
        writer = csv.writer(out)
        writer.writerow(self.header)
        writer.writerows(["" if cell is None else cell for cell in row] for row in self.rows)
        return out.getvalue()


def tables(study: Study) -> Iterator[Table]:
    """Yield all of a study's tables."""
    yield _layers(study)
    yield _agreement(study)
    yield _confusion(study)
    yield _overlap(study)
    yield _spread(study)
    yield _reliability(study)
    yield _paths(study)
    yield _contrasts(study)
    yield _calibration(study)


def label(units: Sequence[int]) -> str:
    """Return what is removed: ``3``, or ``3 and 4`` where layers go together."""
    return " and ".join(map(str, units))


def _layers(study: Study) -> Table:
    """What removing each layer alone costs, as a share of what is there to lose, and what each metric says."""
    header = ["layer"]
    columns: list[Sequence[Cell]] = [[label(unit) for unit in study.units]]
    for lost in study.lost:
        header.append(f"accuracy lost on {lost.task}")
        columns.append(lost.accuracy)
        if lost.probability is not None:
            header.append(f"gold probability lost on {lost.task}")
            columns.append(lost.probability)
    for ranking in study.rankings:
        header.append(f"{ranking.metric} by {ranking.calibration}")
        columns.append(ranking.scores)
    return Table("layers", tuple(header), tuple(zip(*columns, strict=True)))


def _agreement(study: Study) -> Table:
    """Agreement of each ranking with the accuracy lost on unseen items."""
    header = ("metric", "calibration", "task", "end layers", "layers", *_limits("spearman"), *_limits("kendall"),
              *_limits("pearson"), "spearman by chance", "misplaced", "misplaced by chance")  # fmt: skip
    rows = tuple(
        (one.metric, one.calibration, one.task, one.ends, one.units, *_parts(one.spearman), *_parts(one.kendall),
         *_parts(one.pearson), one.spearman_by_chance, one.misplaced, one.misplaced_by_chance)
        for one in study.agreement
    )  # fmt: skip
    return Table("agreement", header, rows)


def _confusion(study: Study) -> Table:
    """Rank confusion: where layers stand by accuracy lost and by a metric, share of tasks (zeros left out)."""
    rows = tuple(
        (one.metric, place, by_metric, share)
        for one in study.confusion
        for place, row in enumerate(one.matrix, 1)
        for by_metric, share in enumerate(row, 1)
        if share
    )
    return Table("confusion", ("metric", "rank by accuracy lost", "rank by metric", "share"), rows)


def _overlap(study: Study) -> Table:
    """How many of the k layers that cost least each metric finds."""
    rows = tuple((one.metric, one.count, one.shared, one.by_chance, *one.chance_interval) for one in study.shared)
    header = ("metric", "k", "shared", "by chance", "chance low", "chance high")
    return Table("overlap", header, rows)


def _spread(study: Study) -> Table:
    """Variance over tasks of z-scored relevance, on average and by layer."""
    header = ("metric", "mean variance", "from the draw of items", "Wilcoxon p", *(label(u) for u in study.units))
    rows = tuple((one.metric, one.mean, one.noise, one.wilcoxon_p, *one.variances) for one in study.spread)
    return Table("spread", header, rows)


def _reliability(study: Study) -> Table:
    """Split-half reliability of the ranking by what is lost."""
    header = ("task", "signal", "items", "between halves", "reliability", "items for 0.9")
    rows = tuple(
        (one.task, one.signal, one.items, one.halves, one.whole, one.items_needed) for one in study.reliability
    )
    return Table("reliability", header, rows)


def _paths(study: Study) -> Table:
    """Accuracy on unseen items along each choice, paired differences from intact."""
    tasks = tuple(data.task for data in study.audit)
    header = ("metric", "search", "removed", "layers", "accuracy", "difference", "low", "high", *tasks)
    rows = tuple(
        (path.metric, path.search, point.count, " / ".join(" ".join(map(str, r)) for r in point.removals),
         point.accuracy, point.difference, *point.interval, *(point.tasks[task] for task in tasks))
        for path in study.paths
        for point in path.points
    )  # fmt: skip
    return Table("paths", header, rows)


def _contrasts(study: Study) -> Table:
    """One-shot ablation against every other choice, on the same items."""
    header = ("metric", "search", "removed", "ablation is above by", "low", "high", "same layers")
    rows = tuple(
        (one.metric, one.search, one.count, one.difference, *one.interval, one.same) for one in study.contrasts
    )
    return Table("contrasts", header, rows)


def _calibration(study: Study) -> Table:
    """What each metric chooses after reading other data."""
    header = ("metric", "calibration", "removed", "accuracy", "from all tasks", "low", "high", "same layers")
    rows = tuple(
        (one.metric, one.calibration, one.count, one.accuracy, one.difference, *one.interval, one.same)
        for one in study.calibration
    )
    return Table("calibration", header, rows)


def _limits(name: str) -> tuple[str, str, str]:
    return name, f"{name} low", f"{name} high"


def _parts(estimate: Estimate) -> tuple[Cell, Cell, Cell]:
    low, high = estimate.interval or (None, None)
    return estimate.value, low, high
