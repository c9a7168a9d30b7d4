"""The whole trade-off at once: one path of removals, a plan for each step of it, a table and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from layerprune.artifacts import Front, FrontPoint, Objective, Plan, Scores
from layerprune.artifacts.base import write_atomically
from layerprune.artifacts.plan import FOLDER, PLOT, TABLE, PointName, plan_name
from layerprune.config import PlanConfig
from layerprune.errors import UsageError
from layerprune.exporter.contents import Weight
from layerprune.files import check_places, locked, refuse_link
from layerprune.formatting import in_words
from layerprune.models.model import LoadedModel
from layerprune.planner.plan_documents import published_with
from layerprune.planner.planner import Planning, counted_by_accuracy
from layerprune.registry import build
from layerprune.scoring.aggregation import combined_losses, rounded
from layerprune.scoring.metrics import METRICS
from layerprune.scoring.metrics.ablation import INTACT
from layerprune.search import SEARCHES, Constraints, SearchResult
from layerprune.util import SILENT, Progress

# The whole trade-off at once: one path of removals, and a plan for each step of it.


def front_model(
    request: PlanConfig, *, run_folder: Path, progress: Progress = SILENT, loaded: LoadedModel | None = None
) -> tuple[Scores, Front]:
    """Search once, judge every step of the path on the held-back items, and write a plan for each.

    Into ``run_folder``: scores.json, and in ``front/`` the plans, front.json, front.csv and front.png. Raises
    ``UsageError`` for a search whose smaller removals do not lie within its larger ones. ``loaded``: the model, where
    it is loaded already.
    """
    _, metric = build(METRICS, request.metric)
    entry, search = build(SEARCHES, request.search or metric.search)
    if not search.nested:
        raise UsageError(f"--front follows one path, and the search {entry.name!r} lays none: use greedy or one-shot")
    if (search.next_to_go(2) or 0) > 1:
        # a race says which layers go, not in what order, and the order is the path
        if request.racing:
            said = f"--racing does not tell the order of {entry.name}'s layers, which --front follows; leave it out"
            raise UsageError(said)
        request = replace(request, racing=False)
    refuse_link(run_folder / FOLDER)
    with locked(run_folder, request.model):
        files = (Scores.filename, *(f"{FOLDER}/{name}" for name in (Front.filename, TABLE, PLOT)))
        check_places(run_folder, files=files, folders=(FOLDER,))
        planning = Planning.open(request, run_folder, progress, loaded)
        session, reached = planning.session, planning.reach()
        path = path_of(reached.found, session.constraints)
        removals = [found.removal for found in path]
        assert session.held_back is not None  # Farthest asks for it; measured in one go, predictions find them there
        session.held_back.outcomes([INTACT, *removals], "every step, on items held back")
        scores = session.scores(reached.rounds)
        plans = [planning.plan(replace(reached, found=found), scores) for found in path]
        front = _front(plans, session.weigh(INTACT, *removals))
        _write(run_folder, scores, plans, front, progress)
    return scores, front


def path_of(found: SearchResult, constraints: Constraints) -> list[SearchResult]:
    """Return what was found after each stroke, smallest removal first; what goes together goes in one stroke."""
    size = {unit: len(move) for move in constraints.moves for unit in move}
    path, place = [], 0
    while place < len(found.order):
        place += size[found.order[place]]
        path.append(replace(found, order=found.order[:place]))
    return path


def _front(plans: list[Plan], weights: list[Weight]) -> Front:
    """Put together what ``plans`` leave of the model; ``weights`` are those of the intact one, and after each."""
    intact, *left = weights
    first = plans[0]
    points = tuple(_point(plan, weight) for plan, weight in zip(plans, left, strict=True))
    base = [task.base_accuracy for task in counted_by_accuracy(points[0].tasks)]
    return Front(
        model=first.model,
        metric=first.metric,
        search=first.search,
        limits=first.limits,
        bytes=intact.nbytes,
        accuracy=round(sum(base) / len(base), 6),
        source=first.predicted.source,
        points=points,
        named=named_points(points, first.metric.objective),
        scores_sha256=first.scores_sha256,
        seed=first.seed,
        versions=first.versions,
    )


def _point(plan: Plan, weight: Weight) -> FrontPoint:
    predicted = plan.predicted
    assert predicted is not None  # Farthest has items held back
    accuracies = [task.accuracy for task in counted_by_accuracy(predicted.tasks)]
    return FrontPoint(
        removal=plan.removal,
        plan=plan_name(len(plan.removal), plan.model.layers),
        plan_sha256=plan.sha256(),
        parameters=weight.parameters,
        bytes=weight.nbytes,
        accuracy=round(sum(accuracies) / len(accuracies), 6),
        accuracy_difference=predicted.accuracy_difference,
        interval=predicted.interval,
        tasks=predicted.tasks,
    )


def named_points(points: Sequence[FrontPoint], objective: Objective) -> dict[PointName, str]:
    """Return the plans of the points worth a name (TALE, arXiv:2510.22767), chosen on the held-back items.

    best             the least loss: of accuracy and, where own answers are read, of nats per token, over the tasks as
                     the objective has it; of equal points the one that removes most
    most-at-no-loss  the farthest with no accuracy lost over the tasks that have one, and no token of the intact model's
                     own answers: there every answer is the same. Left out where there is none

    Chosen on the very items that their figures are from, both look better there than on others: an audit tells.
    """
    kept = {point.plan: (-_loss(point, objective), len(point.removal)) for point in points}
    named: dict[PointName, str] = {"best": max(kept, key=lambda plan: kept[plan])}
    free = [
        point.plan
        for point in points
        if _loss(point, objective, own=False) <= 0
        # every own answer is agreed with as the intact model agrees with it
        and all(task.agreed is None or task.agreed >= (task.base_agreed or 1) for task in point.tasks.values())
    ]
    if free:
        named["most-at-no-loss"] = max(free, key=lambda plan: kept[plan][1])
    return named


def _loss(point: FrontPoint, objective: Objective, *, own: bool = True) -> float:
    """Return what the objective makes of the tasks' losses; ``own``: of those of own answers, too."""
    lost = {
        name: -task.difference if task.nats is None else task.nats
        for name, task in point.tasks.items()
        if own or task.nats is None
    }
    losses = np.array(list(lost.values()))[:, None]  # (tasks, 1)
    return rounded(combined_losses(objective, list(lost), losses).item()) if lost else 0.0


def _write(run_folder: Path, scores: Scores, plans: list[Plan], front: Front, progress: Progress) -> None:
    """Write all documents, or none of them."""
    folder = run_folder / FOLDER
    with published_with(scores, run_folder, progress, before=Front) as new:
        for plan, point in zip(plans, front.points, strict=True):
            plan.save(new / FOLDER / point.plan)
        write_csv(front, new / FOLDER / TABLE)
        write_plot(front, new / FOLDER / PLOT)
        front.save(new / FOLDER / Front.filename)
        for stale in {*folder.glob("plan-*.json")} - {folder / point.plan for point in front.points}:
            (folder / Front.filename).unlink(missing_ok=True)  # it names them
            stale.unlink()  # of a longer path that this one replaces


# A front for people: a table that spreadsheets read, and a plot of accuracy against layers removed.


COLUMNS = ("removed", "layers", "accuracy", "difference", "low", "high", "parameters", "bytes", "plan", "point")
COLUMNS += ("nats", "agreed")  # of the intact model's own answers
INK, SHADE, WRITTEN = "#1f4e79", "#9db8d2", "#a34a00"


def by_accuracy(front: Front) -> bool:
    """Whether some task has an accuracy: not where only own answers are read."""
    return any(task.nats is None for task in front.points[0].tasks.values())


def nats(point: FrontPoint) -> float | None:
    """Return what the intact model's own answers lose, nats per token, mean over their tasks; None: none are read."""
    return _mean([task.nats for task in point.tasks.values() if task.nats is not None])


def agreed(point: FrontPoint) -> float | None:
    """Return the share of their tokens that is still agreed with, mean over their tasks; None: none are read."""
    return _mean([task.agreed for task in point.tasks.values() if task.agreed is not None])


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 6) if values else None


def write_csv(front: Front, path: Path) -> None:
    """Write one row per point, the intact model's first; accuracies as shares.

    Where only own answers are read, accuracy is the share of prompts answered token for token as before.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerow([0, "", front.accuracy, 0.0, 0.0, 0.0, front.model.parameters, front.bytes, *[""] * 4])
    for point in front.points:
        layers = " ".join(map(str, point.removal))
        figures = (point.accuracy, point.accuracy_difference, *point.interval, point.parameters, point.bytes)
        own = (nats(point), agreed(point))
        writer.writerow([len(point.removal), layers, *figures, point.plan, front.names_of(point), *own])
    write_atomically(path, text.getvalue().encode())


def write_plot(front: Front, path: Path) -> None:
    """Draw what is left after each step as PNG: mean accuracy with the interval of its difference, agreed tokens."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(8, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    removed = [len(point.removal) for point in front.points]
    tokens = [agreed(point) for point in front.points]
    heights = [point.accuracy for point in front.points] if by_accuracy(front) else tokens
    if by_accuracy(front):
        reach = [[abs(point.interval[side] - point.accuracy_difference) for point in front.points] for side in (0, 1)]
        label = "95 % interval of the difference"
        axes.errorbar(removed, heights, reach, fmt="none", ecolor=SHADE, elinewidth=2, capsize=3, label=label)
        line = [front.accuracy, *heights]
        axes.plot([0, *removed], line, color=INK, marker="o", markersize=4, label=front.metric.words)
        axes.axhline(front.accuracy, color="0.35", linewidth=1, linestyle="--", label="intact model")
    if None not in tokens:
        label = "agreed tokens of own answers"
        axes.plot(removed, tokens, color=WRITTEN, marker="s", markersize=4, label=label)
    for point, height in zip(front.points, heights, strict=True):
        place = (len(point.removal), height)
        axes.annotate(front.names_of(point), place, (0, 8), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xlabel(f"layers removed, of {front.model.layers}")
    counted = sum(task.nats is None for task in front.points[0].tasks.values())
    accuracy = f"accuracy, mean of {counted} task{'s' * (counted > 1)}"
    axes.set_ylabel(accuracy if counted else "agreed tokens of own answers")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    axes.set_title(f"{Path(front.model.id).name}: {front.search.name}, on {front.source}", fontsize=10, loc="left")
    size = axes.secondary_xaxis("top")
    size.set_xticks(removed[:: max(1, len(removed) // 6)])
    size.set_xticklabels([in_words(point.bytes) for point in front.points][:: max(1, len(removed) // 6)], fontsize=8)
    size.spines["top"].set_visible(False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})  # the same bytes for the same front
    write_atomically(path, drawn.getvalue())
