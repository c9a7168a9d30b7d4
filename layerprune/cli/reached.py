"""What a plan reached, in words: its target, and what is certified."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from layerprune.cli.tables import names, table
from layerprune.sizes import in_words

if TYPE_CHECKING:
    from pathlib import Path

    from layerprune.documents import Certificate, Front, Plan, Speed, Target


def reached(plan: Plan) -> Iterator[Table | str]:
    """Yield what there is to say beside the removal itself; nothing for a plan that only had to drop layers."""
    if plan.target is not None:
        yield target(plan.target)
    if plan.certificate is not None:
        yield steps(plan.certificate)
        yield f"certified: {plan.certificate.statement}"


def front(found: Front, output: Path) -> Iterator[Table | str]:
    """Yield every step of a path, and what to do with it."""
    columns = ["removed", "last to go", "accuracy", "difference", "95 % CI", "weights", "plan", "point"]
    made = table(f"{found.search.name} by {found.metric.words}, on {found.source}", *columns, numbers=columns[:-2])
    made.add_row("0", "", f"{found.accuracy:.3f}", "", "", in_words(found.bytes), "", "")
    gone: set[float] = set()
    for point in found.points:
        last = names(tuple(unit for unit in point.removal if unit not in gone))
        gone.update(point.removal)
        low, high = (f"{100 * end:+.1f}" for end in point.interval)
        difference = f"{100 * point.accuracy_difference:+.1f}"
        row = [str(len(point.removal)), last, f"{point.accuracy:.3f}", difference, f"{low} … {high}"]
        made.add_row(*row, in_words(point.bytes), point.plan, ", ".join(found.names_of(point)))
    folder = output / "front"
    yield made
    if found.most_at_no_loss is None:
        yield "most at no loss: none, each removal is worse than the intact model on these items"
    if own := [name for name, task in found.points[0].tasks.items() if task.nats is not None]:
        yield f"accuracy of {', '.join(own)}: the share of prompts answered token for token as the intact model does"
    yield "each interval is for its row alone; to pick a row by them is to use these items, and the audit uses others"
    plans = f"{len(found.points)} plans"
    yield f"written: {output / 'scores.json'}, {folder / 'front.json'}, front.csv, front.png and {plans}"
    yield f"next: layerprune export {folder / (found.most_at_no_loss or found.best).plan} -o smaller/"


def target(found: Target) -> str:
    """Return one sentence."""
    if found.speed is not None:
        return f"target: {found.reached:.2f} times as fast, wanted {found.wanted:g}; {timed(found.speed)}"
    if found.what == "bytes":
        figures = [in_words(size) for size in (found.reached, found.base, found.wanted)]
    else:
        figures = [f"{size:,.0f} parameters" for size in (found.reached, found.base, found.wanted)]
    return f"target: {figures[0]} of {figures[1]} are left, wanted at most {figures[2]}"


def timed(speed: Speed) -> str:
    """Return what was measured, and on what."""
    ratios = {
        name: speed.pruned[key].median / speed.base[key].median
        for name, key in (("prefill", "prefill_tokens_per_s"), ("decoding", "decode_tokens_per_s"))
    }
    said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    return (
        f"measured on {speed.device} in {speed.dtype}: {said} (medians of {speed.repeats} runs of "
        f"{speed.prompt_tokens} prompt and {speed.new_tokens} new tokens, alternating with the intact model)"
    )


def steps(found: Certificate) -> Table:
    """Return the path as far as it was walked."""
    columns = ["removed", "right to wrong", "wrong to right", "p", "certified"]
    items = sum(map(len, found.fingerprints.values()))
    made = table(f"on {items:,} certification items, loss below {100 * found.limit:g} points", *columns)
    for step in found.steps:
        row = [names(step.removal), str(step.right_to_wrong), str(step.wrong_to_right), f"{step.p_value:.2g}"]
        made.add_row(*row, "yes" if step.certified else "no: the path ends before")
    return made
