"""Results as tables for people; the documents hold the same figures for programs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

if TYPE_CHECKING:
    from layerprune.documents import Candidate, Plan, Scores, Units


def table(title: str, *columns: str, numbers: Iterable[str] = ()) -> Table:
    """Return an empty table; the columns named in ``numbers`` are set flush right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in set(numbers) else "left", no_wrap=True)
    return made


def ranking(scores: Scores, plan: Plan | None = None) -> Table:
    """Return the first round, least harm first: 0-based layers, score, interval, relevance per task."""
    from layerprune.planners import by_harm

    tasks = [data.task for data in scores.data if data.task in scores.base]
    unit = scores.metric.unit
    columns = ["layer", unit, "95 % interval", *tasks]
    made = table(
        f"{scores.metric.spec}: what removing one layer costs, least first (layers are 0-based)",
        *columns, *(["removed"] if plan else []), numbers=columns,
    )  # fmt: skip
    turn = {each: number for number, each in enumerate(plan.order, 1)} if plan else {}
    for candidate in sorted(scores.rounds[0].candidates, key=by_harm):
        row = [names(candidate.removal), figure(candidate.score), span(candidate.interval)]
        row += [figure(candidate.tasks[task].relevance) if task in candidate.tasks else "" for task in tasks]
        if plan:
            row.append(", ".join(ordinal(turn[each]) for each in candidate.removal if each in turn))
        made.add_row(*row)
    return made


def rounds(scores: Scores, plan: Plan) -> Table:
    """Return what each round of a search ended with."""
    columns = ["round", "judged", "removed so far", scores.metric.unit, "95 % interval"]
    made = table(f"{plan.search.name}, round by round", *columns, numbers=set(columns) - {"removed so far"})
    for number, entry in enumerate(scores.rounds, 1):
        best = chosen(entry.candidates, plan.order)
        if best is not None:
            made.add_row(
                str(number), str(len(entry.candidates)), names(best.removal), figure(best.score), span(best.interval)
            )
    return made


def chosen(candidates: Iterable[Candidate], order: Units) -> Candidate | None:
    """Return the candidate that is a beginning of ``order``, the longest one where several are."""
    found = [c for c in candidates if sorted(order[: len(c.removal)]) == list(c.removal)]
    return max(found, key=lambda candidate: len(candidate.removal), default=None)


def names(units: Units) -> str:
    """Return units as people write them: ``3, 4``."""
    return ", ".join(str(unit) for unit in units)


def figure(value: float) -> str:
    """Return four significant figures with a true minus sign's width kept: ``0.0312``, ``-0.0048``, ``1.2e-07``."""
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def span(interval: tuple[float, float] | None) -> str:
    """Return an interval as ``low … high``."""
    return "" if interval is None else f"{figure(interval[0])} … {figure(interval[1])}"


def ordinal(number: int) -> str:
    """Return ``1st``, ``2nd``, ``11th``."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
