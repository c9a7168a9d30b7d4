"""report.html: the whole account of a checkpoint in one file that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerprune.documents import PRUNED, UNHEALED, Audit, Plan, Receipt, Scores
from layerprune.documents.base import write_atomically
from layerprune.report import plots, words
from layerprune.report.card import FILTERS, base_name, title
from layerprune.report.templating import environment

REPORT = "report.html"


def write_report(folder: Path, scores: Sequence[Scores] = (), to: Path | None = None) -> Path:
    """Write ``folder/report.html`` from the folder's documents and return its path; raises ``DocumentError``.

    ``scores`` are rankings to show layer by layer (the plan's own, cosine beside ablation); without any, the plan's
    ranking is shown. A report with scores belongs beside the run, so ``to`` says where; the one in the folder follows
    from the folder alone, and ``verify`` holds it to that.
    """
    path = to or Path(folder) / REPORT
    write_atomically(path, render_report(folder, scores).encode())
    return path


def render_report(folder: Path, scores: Sequence[Scores] = ()) -> str:
    """Return the page. It holds everything it shows: styles and plots inside, no script, no external request."""
    from markupsafe import Markup

    folder = Path(folder)
    inside = folder / "layerprune"
    plan, receipt = Plan.load(inside / Plan.filename), Receipt.load(inside / Receipt.filename)
    audit = Audit.load(inside / Audit.filename)
    made = environment(FILTERS, autoescape=True)
    return made.get_template("report.html.jinja").render(
        title=title(receipt),
        base=base_name(receipt.base.id),
        plan=plan,
        receipt=receipt,
        audit=audit,
        pruned=PRUNED,
        unhealed=UNHEALED,
        healed=UNHEALED in audit.compared,
        these=audit.pruned.fingerprint,
        plan_sha256=plan.sha256(),
        receipt_sha256=receipt.sha256(),
        differences=Markup(_differences(audit)),  # plots are built here and escape what they are given
        layers=[(name, Markup(plot)) for name, plot in _layers(plan, scores)],
        path=Markup(path) if (path := _path(plan, scores)) else None,
    )


def _differences(audit: Audit) -> str:
    rows = [
        (task.data.task + ("" if task.informative else " (base at chance)"), it.difference, it.interval)
        for task in audit.tasks
        for it in [task.models[PRUNED]]
    ]
    rows += [
        ("mean of tasks" if label == PRUNED else f"mean, {label}", found.difference, found.interval)
        for label, found in audit.overall.items()
    ]
    return plots.forest("Difference of accuracy from the base in points, with 95 % intervals", rows)


def _layers(plan: Plan, scores: Sequence[Scores]) -> list[tuple[str, str]]:
    """Return a plot of each ranking's first round: what removing each single unit costs."""
    if not scores:
        ranked = sorted(plan.ranking, key=lambda one: one.unit)
        given = [plots.Bar(str(one.unit), one.score, one.unit in plan.removal, one.interval) for one in ranked]
        return [(plan.metric.words, _bars(plan.metric.words, plan.metric.unit, given))] if given else []
    drawn = []
    for one in scores:
        singles = sorted((c for c in one.rounds[0].candidates if len(c.removal) == 1), key=lambda c: c.removal)
        given = [plots.Bar(str(c.removal[0]), c.score, c.removal[0] in plan.removal, c.interval) for c in singles]
        if given:
            drawn.append((one.metric.words, _bars(one.metric.words, one.metric.unit, given)))
    return drawn


def _bars(spec: str, unit: str, given: Sequence[plots.Bar]) -> str:
    return plots.bars(f"{spec}: cost of removing each layer; removed layers are filled", given, unit)


def _path(plan: Plan, scores: Sequence[Scores]) -> str | None:
    """Return the curve of layers removed against accuracy on the selection items; None where it was not scored."""
    for one in scores:
        found = {frozenset(c.removal): c for r in one.rounds for c in r.candidates if c.tasks}
        if not one.base or not found:
            continue
        base = sum(task.accuracy for task in one.base.values()) / len(one.base)
        points = [plots.Point(0, 100 * base, f"base: {words.accuracy(base)}")]
        for count in range(1, len(plan.order) + 1):
            candidate = found.get(frozenset(plan.order[:count]))
            if candidate is None:
                break
            value = sum(task.accuracy for task in candidate.tasks.values()) / len(candidate.tasks)
            points.append(plots.Point(count, 100 * value, f"{count} removed: {words.accuracy(value)}"))
        if len(points) > 1:
            return plots.curve("Accuracy on the selection items against layers removed", points, "removed", "accuracy")
    return None
