"""``layerprune score``, ``plan`` and ``compare``, and their results as tables for people."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerprune import api
from layerprune.cli import command as opt
from layerprune.cli.command import Verb, pass_console
from layerprune.cli.console import Console, names, table
from layerprune.config import PlanConfig, ScoreConfig
from layerprune.errors import UsageError
from layerprune.files import locked
from layerprune.formatting import in_words

if TYPE_CHECKING:
    from rich.table import Table

    from layerprune.artifacts import Candidate, Certificate, Front, Interval, Plan, Prediction, Scores, Target
    from layerprune.scoring.aggregation import ScoresComparison


CONTINUE = "run the same command again: what was finished is kept"
FAR = 100_000  # items: an extrapolation that far says "many", not how many


def refuse_to_replace(path: Path, force: bool) -> None:
    """Raise ``UsageError`` when a document would be overwritten without ``--force``."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another folder with -o, or --force to replace it")


# ``layerprune score``.


@click.command(
    cls=Verb,
    after_interrupt=CONTINUE,
    examples=[
        "layerprune score MODEL --metric ablation --tasks arc_easy,hellaswag -o run/",
        "layerprune score MODEL --metric cosine:tokens=last --tasks arc_easy -o cosine/",
        "layerprune score MODEL --metric ablation:signal=blend --tasks arc_easy,piqa --stability -o run/",
    ],
)
@click.argument("model")
@opt.options(ScoreConfig)
@click.option("--stability", is_flag=True, help="Say how far other items would repeat the ranking.")
@opt.output("Folder that gets scores.json.")
@click.option("--force", is_flag=True, help="Replace a scores.json that is there, and remove what was planned from it.")
@pass_console
def score(
    console: Console, model: str, output: Path, force: bool, stability: bool, **options: Any
) -> Iterator[Table | str]:
    """Measure what each layer's removal costs MODEL (a folder or a Hub id), and write scores.json."""
    with locked(output, model):
        refuse_to_replace(output / "scores.json", force)
        scores = api.score(model, out=output, stability=stability, progress=console.progress, **options)
    yield ranking(scores)
    if stability:
        yield repeatability(scores)
    yield f"written: {output / 'scores.json'}"


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


def _cost(scores: Scores, candidate: Candidate) -> tuple[str, str]:
    """Return a candidate's score and its interval, ``low … high``, for display."""
    from layerprune.stats import displayed

    if candidate.not_finite:
        return "not finite", ""
    limits = (candidate.score, *(candidate.interval or ()))
    score, *interval = (figure(displayed(each, scores.metric.unit, scores.metric.spec)) for each in limits)
    return score, " … ".join(interval)


def figure(value: float) -> str:
    """Return four significant figures with a true minus sign's width kept: ``0.0312``, ``-0.0048``, ``1.2e-07``."""
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def ordinal(number: int) -> str:
    """Return ``1st``, ``2nd``, ``11th``."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def repeatability(scores: Scores) -> Table:
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


# ``layerprune plan``.


@click.command(
    cls=Verb,
    after_interrupt=CONTINUE,
    examples=[
        "layerprune plan MODEL --metric ablation --tasks arc_easy,hellaswag --drop 6 -o run/",
        "layerprune plan MODEL --metric cosine --tasks arc_easy --drop 25% --protect 0-1,-1 -o run/",
        "layerprune plan MODEL --tasks arc_easy --target-params 110M --no-adjacent -o run/",
        "layerprune plan MODEL --tasks arc_easy,piqa --max-drop 2% --confidence 95% -o run/",
        "layerprune plan MODEL --tasks arc_easy,piqa --front --up-to 50% -o run/",
        "layerprune plan MODEL --tasks arc_easy,piqa --objective worst --floor piqa=0.9 --drop 4 -o run/",
        "layerprune plan --scores run/scores.json --drop 4 -o run2/",
    ],
)
@click.argument("model", required=False)
@opt.options(PlanConfig)
@click.option("--scores", type=opt.FILE, metavar="FILE", help="Plan from this scores.json instead of a model.")
@opt.output("Folder that gets scores.json and plan.json.")
@click.option("--force", is_flag=True, help="Replace documents that are already there.")
@pass_console
def plan(
    console: Console, output: Path, force: bool, model: str | None = None, scores: Path | None = None, **options: Any
) -> Iterator[Table | str]:
    """Choose which layers of MODEL (a folder or a Hub id) to remove; write scores.json and plan.json.

    One of --drop, --target-params, --target-bytes, --target-speedup, --max-drop and --front says how far to go.
    """
    from layerprune.artifacts import Front

    with locked(output, model):
        refuse_to_replace(output / ("front/front.json" if options.get("front") else "plan.json"), force)
        there = output / "scores.json"
        if there.exists() and not force and not (scores is not None and scores.exists() and there.samefile(scores)):
            way = "plan from it with --scores, " if scores is None else ""
            raise UsageError(f"{there} exists; {way}give another folder with -o, or --force to replace it")
        found, made = api.planned(model, scores=scores, out=output, progress=console.progress, **options)
    if isinstance(made, Front):
        yield from front(made, output)
        return
    yield from planned(found, made)
    if made.target is not None:
        yield target(made.target)
    if made.certificate is not None:
        yield certified(made.certificate)
        yield f"certified: {made.certificate.statement}"
    yield f"written: {output / 'scores.json'}, {output / 'plan.json'}"
    yield f"next: layerprune export {output / 'plan.json'} -o smaller/"


def planned(scores: Scores, plan: Plan) -> Iterator[Table | str]:
    """Yield everything there is to say about a plan: ranking, rounds, warnings, what goes and what it should cost."""
    yield ranking(scores, plan)
    if len(scores.rounds) > 1 and plan.search.name != "one-shot":
        yield rounds(scores, plan)
    for warning in plan.warnings:
        yield f"warning: {warning}"
    yield f"to remove, by {plan.search.name}: layers {names(plan.removal)} of {plan.model.layers}"
    if plan.predicted is not None:
        yield from predicted(plan.predicted)


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
        if laid:  # the longest beginning of the order among the candidates
            begun = [each for each in entry.candidates if list(each.removal) == sorted(plan.order[: len(each.removal)])]
            best = max(begun, key=lambda candidate: len(candidate.removal), default=None)
        else:
            whole = [each for each in entry.candidates if len(each.removal) == len(plan.order)]
            best = min(whole, key=by_importance, default=None)
        if best is not None:
            made.add_row(str(number), str(len(entry.candidates)), names(best.removal), *_cost(scores, best))
    return made


def target(found: Target) -> str:
    """Return one sentence: what was reached, and where it was measured, on what."""
    if (speed := found.speed) is not None:
        phases = ("prefill_tokens_per_s", "decode_tokens_per_s")
        prefill, decoding = (speed.pruned[phase].median / speed.base[phase].median for phase in phases)
        by = f"by {speed.engine} " if speed.engine else ""
        return (
            f"target: {found.reached:.2f} times as fast, wanted {found.wanted:g}; "
            f"measured {by}on {speed.device} in {speed.dtype}: prefill {prefill:.2f}, decoding {decoding:.2f} "
            f"(medians of {speed.repeats} runs of {speed.prompt_tokens} prompt and {speed.new_tokens} new tokens, "
            "alternating with the intact model)"
        )
    if found.what == "bytes":
        figures = [in_words(size) for size in (found.reached, found.base, found.wanted)]
    else:
        figures = [f"{size:,.0f} parameters" for size in (found.reached, found.base, found.wanted)]
    return f"target: {figures[0]} of {figures[1]} are left, wanted at most {figures[2]}"


def certified(found: Certificate) -> Table:
    """Return the path as far as it was walked."""
    columns = ["removed", "right to wrong", "wrong to right", "p", "certified"]
    items = sum(map(len, found.fingerprints.values()))
    made = table(f"on {items:,} certification items, loss below {100 * found.limit:g} points", *columns)
    for step in found.steps:
        row = [names(step.removal), str(step.right_to_wrong), str(step.wrong_to_right), f"{step.p_value:.2g}"]
        made.add_row(*row, "yes" if step.certified else "no: the path ends before")
    return made


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


# ``layerprune compare``: two rankings side by side.


@click.command(
    cls=Verb,
    after_interrupt="nothing is ever written",
    examples=["layerprune compare ablation/scores.json cosine/scores.json"],
)
@click.argument("first", type=opt.FILE)
@click.argument("second", type=opt.FILE)
def compare(first: Path, second: Path) -> Iterator[Table]:
    """Show how far two scores.json, FIRST and SECOND, agree about which layers to remove."""
    from layerprune.artifacts import read_scores
    from layerprune.scoring.aggregation import compare_scores

    ours, theirs = read_scores(first), read_scores(second)
    found = compare_scores(ours, theirs)
    yield sources(found, ours, theirs)
    yield compared_layers(found, ("metric 1", "metric 2"))
    yield compared_agreement(found)


def sources(found: ScoresComparison, first: Scores, second: Scores) -> Table:
    """Return what the two rankings were made from: what differs here may be why they differ."""
    facts = (
        ("model", first.model.id, second.model.id),
        ("weights", first.model.fingerprint[:12], second.model.fingerprint[:12]),
        ("judged by", first.metric.words, second.metric.words),
        ("items", _items(first), _items(second)),
        ("seed", str(first.seed), str(second.seed)),
        ("layerprune", *(scores.versions.get("layerprune", "not recorded") for scores in (first, second))),
    )
    rows = [(what, one, other, "yes" if one == other else "no") for what, one, other in facts]
    rows.append(("items in both", str(found.shared_items), "", ""))
    return table("what is compared", "", "1", "2", "alike", wrapped=["1", "2"], rows=rows)


def _items(scores: Scores) -> str:
    """Return how many items of which tasks were looked at, and whether a race saw fewer for some layers."""
    told = [f"{data.items} of {data.task} ({data.split})" for data in scores.data]
    raced = any(candidate.stopped for entry in scores.rounds for candidate in entry.candidates)
    return ", ".join(told + ["fewer for layers that left a race"] * raced) or "none"


def compared_layers(found: ScoresComparison, specs: tuple[str, str]) -> Table:
    """Return every layer with its score and rank in two documents."""
    left, right = specs if specs[0] != specs[1] else (f"{specs[0]} (1)", f"{specs[1]} (2)")
    columns = ["layer", left, f"rank by {left}", right, f"rank by {right}"]
    rows = (
        [str(pair.unit), figure(pair.scores[0]), str(pair.ranks[0]), figure(pair.scores[1]), str(pair.ranks[1])]
        for pair in found.pairs
    )
    return table("layers in both rankings (rank 1 is removed first)", *columns, numbers=columns, rows=rows)


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
