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
    from layerprune.documents.front import POINTS
    from layerprune.report.front import agreed, by_accuracy, nats

    choices, own = by_accuracy(found), nats(found.points[0]) is not None
    counted = ["accuracy", "difference", "95 % CI"] if choices else []
    counted += ["nats lost", "tokens agreed"] if own else []
    columns = ["removed", "last to go", *counted, "weights", "plan", "point"]
    made = table(f"{found.search.name} by {found.metric.words}, on {found.source}", *columns, numbers=columns[:-2])
    intact = [f"{found.accuracy:.3f}" if name == "accuracy" else "" for name in counted]
    made.add_row("0", "", *intact, in_words(found.bytes), "", "")
    gone: set[float] = set()
    for point in found.points:
        last = names(tuple(unit for unit in point.removal if unit not in gone))
        gone.update(point.removal)
        low, high = (f"{100 * end:+.1f}" for end in point.interval)
        difference = f"{100 * point.accuracy_difference:+.1f}"
        row = [f"{point.accuracy:.3f}", difference, f"{low} … {high}"] if choices else []
        row += [f"{nats(point):.3f}", f"{agreed(point):.3f}"] if own else []
        made.add_row(str(len(point.removal)), last, *row, in_words(point.bytes), point.plan, found.names_of(point))
    folder = output / "front"
    yield made
    for name in POINTS:
        plan = found.named.get(name)
        yield f"{name}: {folder / plan}" if plan else f"{name}: none, each step loses something on these items"
    yield "each interval is for its row alone; to pick a row by them is to use these items, and the audit uses others"
    plans = f"{len(found.points)} plans"
    yield f"written: {output / 'scores.json'}, {folder / 'front.json'}, front.csv, front.png and {plans}"
    yield f"next: layerprune export {folder / found.named.get('most-at-no-loss', found.named['best'])} -o smaller/"


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
