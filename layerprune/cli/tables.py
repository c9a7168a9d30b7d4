"""Results as tables for people; the documents hold the same figures for programs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from layerprune.artifacts import HealLog
from layerprune.formatting import in_words
from layerprune.registry import declared_options

if TYPE_CHECKING:
    from layerprune.artifacts import (
        Candidate,
        Certificate,
        Front,
        Interval,
        Plan,
        Prediction,
        Scores,
        Speed,
        Target,
        Units,
    )
    from layerprune.auditor.rerun import RerunResult
    from layerprune.auditor.verification import Verification
    from layerprune.inspection import Inspection
    from layerprune.registry import Entry, Registry
    from layerprune.scoring.aggregation import ScoresComparison


FAR = 100_000  # items: an extrapolation that far says "many", not how many


def table(title: str, *columns: str, numbers: Iterable[str] = (), wrapped: Iterable[str] = ()) -> Table:
    """Return an empty table; columns in ``numbers`` are flush right, those in ``wrapped`` may take several lines."""
    flush, long = set(numbers), set(wrapped)
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in flush else "left", no_wrap=column not in long)
    return made


def ranking(scores: Scores, plan: Plan | None = None) -> Table:
    """Return the first round, least harm first: 0-based layers, score, interval, relevance per task."""
    from layerprune.artifacts import OWN_ANSWER
    from layerprune.search import by_importance
    from layerprune.stats import clipped

    tasks = [data.task for data in scores.data if data.task in scores.base]
    candidates = sorted(scores.rounds[0].candidates, key=by_importance)
    intervals = any(candidate.interval for candidate in candidates)  # cosine and its like have none
    columns = ["layer", scores.metric.unit, *(["95 % interval"] if intervals else []), *tasks]
    raced = any(candidate.stopped for candidate in candidates)
    floors = bool(scores.metric.objective.floors)
    columns += ["items"] * raced + ["below its floor"] * floors
    title = f"{scores.metric.words}: what each removal costs, least first (layers are 0-based"
    own = [data.task for data in scores.data if data.metric == OWN_ANSWER]
    title += "; of each task: its relevance, shown as 1 where accuracy is below chance" if set(tasks) - set(own) else ""
    title += f"; of {', '.join(own)}: the share of agreed tokens that is lost)" if own else ")"
    made = table(title, *columns, *(["removed"] if plan else []), numbers=columns)
    turn = {each: number for number, each in enumerate(plan.order, 1)} if plan else {}
    for candidate in candidates:
        row = [names(candidate.removal), *_cost(scores, candidate)[: 1 + intervals]]
        row += [figure(clipped(candidate.tasks[task].relevance)) if task in candidate.tasks else "" for task in tasks]
        if raced:
            row.append(str(sum(task.items for task in candidate.tasks.values())))
        if floors:
            row.append(", ".join(f"{task} by {figure(missed)}" for task, missed in candidate.below_floor.items()))
        if plan:
            whole = all(each in turn for each in candidate.removal)
            row.append(", ".join(ordinal(turn[each]) for each in candidate.removal) if whole else "")
        made.add_row(*row)
    return made


def planned(scores: Scores, plan: Plan) -> list[Table | str]:
    """Return everything there is to say about a plan: ranking, rounds, warnings, what goes and what it should cost."""
    parts: list[Table | str] = [ranking(scores, plan)]
    if len(scores.rounds) > 1 and plan.search.name != "one-shot":
        parts.append(rounds(scores, plan))
    parts += [f"warning: {warning}" for warning in plan.warnings]
    parts.append(f"to remove, by {plan.search.name}: layers {names(plan.removal)} of {plan.model.layers}")
    if plan.predicted is not None:
        parts += predicted(plan.predicted)
    return parts


def predicted(cost: Prediction) -> Iterator[str]:
    """Yield what a removal is expected to cost: of the model's own answers, and of the accuracy, never averaged."""
    others = [task for task in cost.tasks.values() if task.nats is None]
    for name, task in cost.tasks.items():
        if task.nats is not None and task.agreed is not None:
            nats, agreed = _ci(task.nats_interval), _ci(task.agreed_interval, 100, 1)
            yield (
                f"predicted: {task.nats:.3f} nats per token lost of its own answers to {name}{nats}, "
                f"{100 * task.agreed:.1f} % of their tokens agreed with{agreed}, on {task.items} of {cost.source}"
            )
    if others:
        low, high = cost.interval
        mixed = len(others) < len(cost.tasks)
        items = f"{sum(task.items for task in others)} of {cost.source}" if mixed else cost.source
        yield (
            f"predicted: accuracy {100 * cost.accuracy_difference:+.1f} points "
            f"(95 % CI {100 * low:+.1f} … {100 * high:+.1f}) on {items}"
        )


def _ci(interval: Interval | None, times: int = 1, places: int = 3) -> str:
    """Return an interval in brackets; nothing where there is none, of a single answer."""
    if interval is None:
        return ""
    low, high = (f"{times * end:.{places}f}" for end in interval)
    return f" (95 % CI {low} … {high})"


def rounds(scores: Scores, plan: Plan) -> Table:
    """Return what each round of a search ended with."""
    from layerprune.search import by_importance

    columns = ["round", "judged", "removed so far", scores.metric.unit, "95 % interval"]
    made = table(f"{plan.search.name}, round by round", *columns, numbers=set(columns) - {"removed so far"})
    laid = all(entry.removed for entry in scores.rounds[1:])  # round on round; else whole removals are judged
    for number, entry in enumerate(scores.rounds, 1):
        whole = [candidate for candidate in entry.candidates if len(candidate.removal) == len(plan.order)]
        best = chosen(entry.candidates, plan.order) if laid else min(whole, key=by_importance, default=None)
        if best is not None:
            made.add_row(str(number), str(len(entry.candidates)), names(best.removal), *_cost(scores, best))
    return made


def _cost(scores: Scores, candidate: Candidate) -> tuple[str, str]:
    """Return a candidate's score and its interval for display."""
    from layerprune.stats import displayed

    if candidate.not_finite:
        return "not finite", ""
    limits = (candidate.score, *(candidate.interval or ()))
    score, *interval = (displayed(each, scores.metric.unit, scores.metric.spec) for each in limits)
    return figure(score), span((interval[0], interval[1]) if interval else None)


def chosen(candidates: Iterable[Candidate], order: Units) -> Candidate | None:
    """Return the candidate that is a beginning of ``order``, the longest one where several are."""
    found = [c for c in candidates if sorted(order[: len(c.removal)]) == list(c.removal)]
    return max(found, key=lambda candidate: len(candidate.removal), default=None)


def inspected(found: Inspection) -> Table:
    """Return a model's facts."""
    made = table(found.model, "what", "value", wrapped=["value"])
    architecture = found.architecture
    stays = [layer.index for layer in found.layers if layer.refusal]
    facts = {
        "type": architecture.model_type,
        "decoder layers": f"{architecture.depth} (numbered 0 to {architecture.depth - 1})",
        "stack": architecture.stack,
        "parameters": f"{found.parameters:,}",
        "weights on disk": in_words(found.nbytes),
        "can go on their own": f"{found.removable} of {architecture.depth} layers",
        "cannot go first": names(tuple(stays)) or "none",
        "go together": "; ".join(names(tuple(sorted(group))) for group in architecture.together) or "none",
        "config fields that change": ", ".join(found.changes) or "none",
        "can be exported": "yes" if found.removable else "no",
    }
    for name, value in facts.items():
        made.add_row(name, value)
    return made


def layers(found: Inspection) -> Table:
    """Return one row for each run of layers that are alike."""
    columns = ["layers", "kind", "parameters each", "share each", "can be removed"]
    made = table("layers", *columns, numbers=("parameters each", "share each"))
    start = 0
    alike = [(layer.kind, layer.parameters, layer.goes_with and "together", layer.refusal) for layer in found.layers]
    for index, layer in enumerate(found.layers):
        if index + 1 < len(alike) and alike[index + 1] == alike[index] and not layer.goes_with:
            continue
        which = str(index) if start == index else f"{start} to {index}"
        share = f"{100 * layer.parameters / found.parameters:.1f} %"
        removable = f"with {names(layer.goes_with)}" if layer.goes_with else "yes"
        removable = f"no: {layer.refusal}" if layer.refusal else removable
        made.add_row(which, layer.kind, f"{layer.parameters:,}", share, removable)
        start = index + 1
    return made


def metrics(registry: Registry) -> Table:
    """Return every metric: what it measures, for which removals, from which data, at what cost."""
    columns = ["name", "what", "unit", "scope", "needs", "cost", "source", "from"]
    made = table("metrics", *columns, wrapped=set(columns) - {"name"})
    for name, entry in registry.entries().items():
        cls = entry.load()
        made.add_row(name, summary(cls), cls.unit, cls.scope, cls.needs, cls.cost, cls.source, entry.owner)
    return made


def metric(entry: Entry) -> Table:
    """Return one metric's facts."""
    cls = entry.load()
    made = table(entry.name, "what", "value", wrapped=["value"])
    for name, value in (
        ("measures", summary(cls)), ("unit", cls.unit), ("scope", cls.scope), ("needs", cls.needs),
        ("cost", cls.cost), ("source", cls.source), ("from", entry.owner),
    ):  # fmt: skip
        made.add_row(name, value)
    return made


def healers(registry: Registry) -> Table:
    """Return every healing method: what it does, whether it trains, what it needs, at what cost."""
    columns = ["name", "what", "trains", "needs", "cost", "source", "from"]
    made = table("healing methods", *columns, wrapped=set(columns) - {"name"})
    for name, entry in registry.entries().items():
        cls = entry.load()
        made.add_row(name, summary(cls), _yes(cls.gradients), _healing_needs(cls), cls.cost, cls.source, entry.owner)
    return made


def healer(entry: Entry) -> Table:
    """Return one healing method's facts."""
    cls = entry.load()
    made = table(entry.name, "what", "value", wrapped=["value"])
    for name, value in (
        ("does", summary(cls)), ("trains", _yes(cls.gradients)), ("needs", _healing_needs(cls)), ("cost", cls.cost),
        ("source", cls.source), ("from", entry.owner),
    ):  # fmt: skip
        made.add_row(name, value)
    return made


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _healing_needs(cls: Any) -> str:
    return ", ".join([cls.needs, *(["the base"] if cls.needs_base else [])])


def options(entry: Entry) -> Table:
    """Return the options of a registered thing, as its spec takes them."""
    title = f"options of {entry.name}, written {entry.name}:option=value"
    made = table(title, "option", "values", "default", "what", wrapped=["what"])
    for option in declared_options(entry):
        made.add_row(option.name, option.type, option.default, option.help)
    return made


def stability(scores: Scores) -> Table:
    """Return how far the ranking would repeat on other items: by all tasks together, and by each alone."""
    from layerprune.scoring.aggregation import reliability_of
    from layerprune.stats import TARGET

    columns = ["ranking by", "items", "two halves agree", "reliability", f"items for {TARGET}"]
    title = "stability: Spearman r between random halves of the items; reliability of all of them, 2r/(1+r)"
    made = table(title, *columns, numbers=columns[1:])
    alone = [data.task for data in scores.data] if len(scores.data) > 1 else []
    for name, task in [(scores.metric.words, None), *((task, task) for task in alone)]:
        found = reliability_of(scores, task)
        known = ["all layers alike"] * 2 if found.halves is None or found.whole is None else [
            f"{found.halves:.2f}", f"{found.whole:.2f}"
        ]  # fmt: skip
        needed = "cannot be told" if found.items_needed is None else f"{found.items_needed:,}"
        if (found.items_needed or 0) > FAR:
            needed = f"over {FAR:,}"
        made.add_row(name, f"{found.items:,}", *known, needed)
    return made


def summary(thing: object) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


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


# Two rankings side by side, as tables for people.


def sources(found: ScoresComparison, first: Scores, second: Scores) -> Table:
    """Return what the two rankings were made from: what differs here may be why they differ."""
    made = table("what is compared", "", "1", "2", "alike", wrapped=["1", "2"])
    for what, one, other in (
        ("model", first.model.id, second.model.id),
        ("weights", first.model.fingerprint[:12], second.model.fingerprint[:12]),
        ("judged by", first.metric.words, second.metric.words),
        ("items", _items(first), _items(second)),
        ("seed", str(first.seed), str(second.seed)),
        ("layerprune", *(scores.versions.get("layerprune", "not recorded") for scores in (first, second))),
    ):
        made.add_row(what, one, other, "yes" if one == other else "no")
    made.add_row("items in both", str(found.shared_items), "", "")
    return made


def _items(scores: Scores) -> str:
    """Return how many items of which tasks were looked at, and whether a race saw fewer for some layers."""
    told = [f"{data.items} of {data.task} ({data.split})" for data in scores.data]
    raced = any(candidate.stopped for entry in scores.rounds for candidate in entry.candidates)
    return ", ".join(told + ["fewer for layers that left a race"] * raced) or "none"


def compared_layers(found: ScoresComparison, specs: tuple[str, str]) -> Table:
    """Return every layer with its score and rank in two documents."""
    left, right = specs if specs[0] != specs[1] else (f"{specs[0]} (1)", f"{specs[1]} (2)")
    columns = ["layer", left, f"rank by {left}", right, f"rank by {right}"]
    made = table("layers in both rankings (rank 1 is removed first)", *columns, numbers=columns)
    for pair in found.pairs:
        scores, ranks = pair.scores, pair.ranks
        made.add_row(str(pair.unit), figure(scores[0]), str(ranks[0]), figure(scores[1]), str(ranks[1]))
    return made


def compared_agreement(found: ScoresComparison) -> Table:
    """Return how far two rankings agree, beside what two unrelated rankings would show."""
    made = table("agreement", "measure", "seen", "by chance", numbers=("seen", "by chance"))
    seen = found.agreement
    for name, value in (("Spearman", seen.spearman), ("Kendall", seen.kendall), ("Pearson", seen.pearson)):
        chance = f"0 ± {seen.spearman_spread:.2f}" if name == "Spearman" else "0"
        made.add_row(name, "one is constant" if value is None else f"{value:.2f}", chance)
    made.add_row("rank positions misplaced", f"{seen.misplaced_share:.0%}", f"{seen.misplaced_by_chance:.0%}")
    for overlap in found.overlaps:
        name = f"of the first {overlap.count} to remove, in both"
        made.add_row(name, f"{overlap.shared:g}", f"{overlap.by_chance:.1f}")
    if found.only_in_one:
        made.add_row("judged in one of the two only", names(found.only_in_one), "")
    return made


# What a plan reached, in words: its target, and what is certified.


def reached(plan: Plan) -> Iterator[Table | str]:
    """Yield what there is to say beside the removal itself; nothing for a plan that only had to drop layers."""
    if plan.target is not None:
        yield target(plan.target)
    if plan.certificate is not None:
        yield steps(plan.certificate)
        yield f"certified: {plan.certificate.statement}"


def front(found: Front, output: Path) -> Iterator[Table | str]:
    """Yield every step of a path, and what to do with it."""
    from layerprune.artifacts.plan import POINTS
    from layerprune.planner.front import agreed, by_accuracy, nats

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


# What ``layerprune heal`` and ``run`` show of a healing.


def healed(log: HealLog) -> list[str]:
    """Return a line on the work, one on the corpus, one on what was won back, and the method's own remarks."""
    read = f", {log.tokens:,} tokens read" if log.tokens else ""
    parts = [f"{log.method.spec}: {len(log.changed)} tensors changed in {log.seconds:.1f} s{read}"]
    if log.found:
        parts.append("settled on: " + ", ".join(f"{name} {_short(value)}" for name, value in log.found.items()))
    for task, overlap in (log.corpus.overlap if log.corpus else {}).items():
        parts.append(f"in the corpus: {len(overlap.found)} of {overlap.items} items of {task}")
    return [*parts, *_heldout(log), *(f"note: {note}" for note in log.notes)]


def _heldout(log: HealLog) -> list[str]:
    loss = log.heldout
    if loss is None or log.corpus is None:
        return []
    said = f"perplexity {math.exp(loss.before):.2f} -> {math.exp(loss.after):.2f}"
    if loss.base is not None:
        said += f", base {math.exp(loss.base):.2f}"
    if loss.recovered is not None:
        said += f": {100 * loss.recovered:.0f} % of the lost nats won back"
    return [f"{said} (held out: {log.corpus.heldout_windows} windows of {log.corpus.window} tokens)"]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# What ``layerprune verify`` shows.


def verified(folder: Path, found: Verification, rerun: bool, digests: bool) -> list[str]:
    """Return every problem on its own line, or one line that all is in order; digests last where asked for."""
    repeated = found.repeated
    problems = [*found.problems, *(repeated.problems if repeated else ())]
    lines = [f"problem: {problem}" for problem in problems]
    if rerun and repeated is None:
        lines.append("no item was asked again: what the documents say does not hold together as it is")
    if problems:
        lines.append(f"{folder} is NOT what its documents say: {len(problems)} problem{'s' * (len(problems) > 1)}")
    else:
        audited = "audited" if found.audited else "not audited yet"
        again = f"; {_again(repeated)}" if repeated else ""
        lines.append(f"{folder} is as it was left: {found.files} files, {in_words(found.bytes)}, {audited}{again}")
    return lines + [f"{name} sha256 {digest}" for name, digest in found.digests.items() if digests]


def _again(repeated: RerunResult) -> str:
    asked = 2 * repeated.items
    change = repeated.largest_change
    moved = "" if change is None else f", largest change of a gold answer's probability {change:.2g}"
    left = f", {repeated.unexplained} items left out that only the compared plans can explain"
    said = f"{repeated.items} items asked again, {repeated.same_decisions} of {asked} decisions the same{moved}"
    return said + left * bool(repeated.unexplained)
