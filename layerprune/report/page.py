"""report.html: the whole account of a checkpoint in one file that opens without a network."""

from __future__ import annotations

from pathlib import Path

from layerprune.documents import PRUNED, UNHEALED, Audit, HealLog, Plan, Receipt, not_looked_for
from layerprune.documents.base import write_atomically
from layerprune.paths import check_plain
from layerprune.report import layers, plots
from layerprune.report.card import FILTERS, OURS, base_name, layers_left, title
from layerprune.report.commands import commands
from layerprune.report.templating import environment

REPORT = "report.html"


def write_report(folder: Path, audit: Audit | None = None, *, into: Path | None = None) -> Path:
    """Write ``folder/report.html`` from the folder's documents and return its path; raises ``DocumentError``.

    ``audit``: one that is about to be saved, in place of the folder's; ``into``: another folder for the page.
    """
    path = (into or Path(folder)) / REPORT
    write_atomically(path, render_report(folder, audit).encode())
    return path


def render_report(folder: Path, audit: Audit | None = None) -> str:
    """Return the page. It holds everything it shows: styles and plots inside, no script, no external request.

    It follows from the documents in the folder alone, so ``verify`` can hold it against them.
    """
    from markupsafe import Markup

    check_plain(Path(folder), OURS)
    inside = Path(folder) / "layerprune"
    plan, receipt = Plan.load(inside / Plan.filename), Receipt.load(inside / Receipt.filename)
    audit = audit or Audit.load(inside / Audit.filename)
    log = HealLog.load(inside / HealLog.filename) if (inside / HealLog.filename).exists() else None
    shown, path = layers.rankings(plan, audit), layers.path(audit)
    return (
        environment(FILTERS, autoescape=True)
        .get_template("report.html.jinja")
        .render(
            title=title(receipt),
            base=base_name(receipt.base.id),
            plan=plan,
            receipt=receipt,
            audit=audit,
            log=log,
            unlooked=not_looked_for(receipt, log, (task.data.task for task in audit.tasks)),
            rounds=[(base_name(one.receipt.base.id), one) for one in receipt.rounds],
            left=layers_left(receipt) if receipt.rounds else "",
            pruned=PRUNED,
            unhealed=UNHEALED,
            healed=UNHEALED in audit.compared,
            these=audit.pruned.fingerprint,
            plan_sha256=plan.sha256(),
            receipt_sha256=receipt.sha256(),
            means=[(label, _mean_of(audit, label)) for label in _labels(audit)],
            differences=Markup(_differences(audit)),  # plots are built here and escape what they are given
            rankings=[(ranks, Markup(layers.drawn(ranks, plan))) for ranks in shown],
            layer_table=layers.table(plan, shown),
            path=Markup(path) if path else None,
            commands=commands(plan, audit, log, receipt.rounds),
        )
    )


def _differences(audit: Audit) -> str:
    rows = [
        (task.data.task + ("" if task.informative else " (base at chance)"), it.difference, it.interval)
        for task in audit.tasks
        for it in [task.models[PRUNED]]
    ]
    means = [(audit.overall[label], _mean_of(audit, label)) for label in _labels(audit)]
    rows += [(name, found.difference, found.interval) for found, name in means]
    return plots.forest("Difference of accuracy from the base in points, with 95 % intervals", rows)


def _labels(audit: Audit) -> list[str]:
    """Return the models with figures over all tasks: this one first, then what it was before, then the others."""
    return sorted(audit.overall, key=lambda label: (label != PRUNED, label != UNHEALED))


def _mean_of(audit: Audit, label: str) -> str:
    if label == UNHEALED:
        return "mean of tasks, before healing"
    if label == PRUNED:
        return "mean of tasks, healed" if audit.heal_sha256 else "mean of tasks"
    return f"mean of tasks, {label}"
