"""What the demonstration prints of each result."""

from __future__ import annotations

from collections.abc import Iterator
from functools import singledispatch
from typing import Any

from demo.sequence import ABLATION, COSINE, Chosen, Finished, Ranked, Spoken
from layerprune.artifacts import PRUNED, Audit, Receipt
from layerprune.cli.console import duration, names, table
from layerprune.cli.plan import compared_layers, ranking
from layerprune.formatting import in_words


@singledispatch
def shown(result: object) -> Iterator[Any]:
    """Yield what to print of one result, in order."""
    raise TypeError(f"nobody knows how to show a {type(result).__name__}")


@shown.register
def _(result: Ranked) -> Iterator[Any]:
    yield ranking(result.scores)
    yield "(by cosine, which asks the model nothing; what each layer is really worth is being measured)"


@shown.register
def _(result: Chosen) -> Iterator[Any]:
    scores, agreed = result.scores, result.comparison.agreement
    items = ", ".join(f"{data.items} of {data.task}" for data in scores[ABLATION].data)
    yield compared_layers(result.comparison, (scores[COSINE].metric.spec, scores[ABLATION].metric.spec))
    if agreed.spearman is None:
        yield "rank agreement: none can be told, one of the metrics calls all layers alike"
    else:
        yield (
            f"rank agreement: Spearman {agreed.spearman:+.2f} (unrelated rankings: 0 ± {agreed.spearman_spread:.2f}); "
            f"{agreed.misplaced_share:.0%} of rank positions differ (by chance {agreed.misplaced_by_chance:.0%})"
        )
    for metric, plan in result.plans.items():
        yield f"{metric} would remove layers {names(plan.removal)}"
    yield f"(both judged by {items}; the audit below uses others)"
    yield "(on so few items ablation goes by the gold answers' probability: accuracy alone leaves most layers tied)"


@shown.register
def _(result: Receipt) -> Iterator[Any]:
    yield (
        f"exported: {result.base.layers} layers, {in_words(result.bytes_before)} -> "
        f"{result.result.layers} layers, {in_words(result.bytes_after)}"
    )
    if result.proof is not None:
        difference, scale = result.proof.max_difference, result.proof.scale
        yield f"checked: logits differ from the bypassed base by at most {difference:.2g} (largest logit {scale:.3g})"


@shown.register
def _(result: Audit) -> Iterator[Any]:
    yield audited(result)
    yield f"{ABLATION}: {result.verdict}"
    other = result.overall.get(COSINE)
    if other is not None:
        yield f"{COSINE}, on the same items: accuracy {points(other.difference)} points ({span(other.interval)})"


@shown.register
def _(result: Spoken) -> Iterator[Any]:
    yield f"base:   {result.prompt}{_one_line(result.base)}"
    yield f"pruned: {result.prompt}{_one_line(result.pruned)}"


@shown.register
def _(result: Finished) -> Iterator[Any]:
    yield f"done in {duration(result.seconds)}; written:"
    for path in result.paths:
        yield f"  {path}"


def audited(audit: Audit) -> Any:
    """Return each task's accuracies: the base, and what either plan's removal leaves of it."""
    labels = {PRUNED: ABLATION, COSINE: COSINE}
    columns = ["items", "base", *(f"{name} {what}" for name in labels.values() for what in ("plan", "points"))]
    made = table("accuracy on items no plan has seen", "task", *columns, numbers=columns)
    for task in audit.tasks:
        row = [task.data.task, str(task.data.items), f"{task.base_accuracy:.3f}"]
        for label in labels:
            row += [f"{task.models[label].accuracy:.3f}", points(task.models[label].difference)]
        made.add_row(*row)
    if audit.overall:
        first = audit.overall[PRUNED]
        row = ["mean", str(first.items), f"{first.base_accuracy:.3f}"]
        for label in labels:
            row += [f"{audit.overall[label].accuracy:.3f}", points(audit.overall[label].difference)]
        made.add_row(*row)
    return made


def points(difference: float) -> str:
    """Return a difference of accuracies in points, signed."""
    return f"{100 * difference:+.1f}"


def span(interval: tuple[float, float]) -> str:
    """Return an interval of differences in points."""
    return f"95 % CI {points(interval[0])} … {points(interval[1])}"


def _one_line(text: str) -> str:
    return text.replace("\n", " ⏎ ")
