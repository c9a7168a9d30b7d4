"""What ``layerprune audit`` and ``run`` show of an audit."""

from __future__ import annotations

from rich.table import Table

from layerprune.cli.tables import table
from layerprune.documents import PRUNED, Audit
from layerprune.documents.audit import Measured
from layerprune.report.words import percent, percent_change, percent_interval, points, points_interval


def audited(audit: Audit) -> list[Table | str]:
    """Return the table of tasks, the verdict, and a line for everything else that was measured."""
    parts: list[Table | str] = [tasks(audit), *_own_answers(audit), audit.verdict]
    for label, overall in audit.overall.items():
        if label != PRUNED:
            change = f"{points(overall.difference)} points ({points_interval(overall.interval)})"
            parts.append(f"{label}, on the same items: accuracy {change}")
    return [*parts, *_layerwise(audit), *_text(audit), *_generation(audit), *_speed(audit)]


def tasks(audit: Audit) -> Table:
    """Return the accuracies of every task and model, and their paired differences in points."""
    columns = ["points", "95 % interval", "base", "accuracy", "chance", "right to wrong", "wrong to right", "items"]
    columns.append("p (Holm)")
    made = table("against the base, on the same items", "task", "model", *columns, numbers=columns)
    for task in audit.tasks:
        for label, own in task.models.items():
            shown = "healed" if label == PRUNED and audit.heal_sha256 else label
            made.add_row(
                task.data.task + ("" if task.informative else " (not informative)"), shown, points(own.difference),
                points_interval(own.interval), f"{task.base_accuracy:.3f}", f"{own.accuracy:.3f}",
                f"{task.data.chance:.3f}", str(own.flips.right_to_wrong), str(own.flips.wrong_to_right),
                str(task.data.items), f"{own.flips.p_adjusted:.2g}",
            )  # fmt: skip
    return made


def _layerwise(audit: Audit) -> list[str]:
    found = audit.layerwise
    return [found.compensation.verdict] if found and found.compensation else []


def _text(audit: Audit) -> list[str]:
    if audit.text is None:
        return []
    text = audit.text
    return [
        f"text: {text.base_nats:.3f} -> {text.nats:.3f} nats per token over {text.tokens} tokens of {text.source}; "
        f"KL {text.kl:.3f}, same likeliest token at {text.top1_agreement:.0%} of positions"
    ]


def _generation(audit: Audit) -> list[str]:
    if audit.generation is None:
        return []
    found = audit.generation
    health = "as healthy as the base's" if found.healthy else "LESS HEALTHY than the base's"
    return [f"generation: {health}, {found.faulty} of {found.prompts} texts faulty (base: {found.base_faulty})"]


def _own_answers(audit: Audit) -> list[Table]:
    """Return the table of the base's own answers, where they were read."""
    if not audit.own_answers:
        return []
    columns = ["agreed", "95 % interval", "nats per token lost", "95 % interval of it", "prompts", "tokens"]
    made = table("the base's own answers, read token by token", "to", "model", *columns, numbers=columns)
    for one in audit.own_answers:
        for label, own in one.models.items():
            shown = "healed" if label == PRUNED and audit.heal_sha256 else label
            agreed, lost = own.agreed_interval, own.interval
            made.add_row(
                one.task, shown, percent(own.agreed), percent_interval(agreed) if agreed else "", f"{own.nats:.3f}",
                f"{lost[0]:.3f} … {lost[1]:.3f}" if lost else "", str(len(one.fingerprints)), str(one.tokens),
            )  # fmt: skip
    return [made]


def _speed(audit: Audit) -> list[str]:
    if audit.speed is None:
        return []
    base, pruned = audit.speed.base, audit.speed.pruned
    changes = (f"{name.replace('_', ' ')} {_change(base[name], pruned[name])}" for name in base if name in pruned)
    return [f"speed on {audit.speed.device}, {audit.speed.dtype}: {', '.join(changes)}"]


def _change(before: Measured, after: Measured) -> str:
    return f"{before.median:.4g} -> {after.median:.4g} ({percent_change(after.median / before.median - 1)})"
