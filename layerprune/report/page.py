"""report.html: the whole account of a checkpoint in one file that opens without a network."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layerprune import formatting
from layerprune.artifacts import (
    PRUNED,
    UNHEALED,
    Audit,
    Earlier,
    HealLog,
    Interval,
    MetricRef,
    ModelRef,
    Plan,
    PlanLimits,
    Ranked,
    Receipt,
    SearchRef,
    TaskData,
    not_looked_for,
)
from layerprune.artifacts.base import write_atomically
from layerprune.artifacts.plan import plan_name
from layerprune.files import check_plain
from layerprune.report import plots
from layerprune.report.card import FILTERS, OURS, base_name, environment, layers_left, title
from layerprune.stats import displayed

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
    shown, path = rankings(plan, audit), path_to_removal(audit)
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
            rankings=[(ranks, Markup(ranking_bars(ranks, plan))) for ranks in shown],
            layer_table=layer_table(plan, shown),
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


# The report, layer by layer: rankings as bars and as a table, and the way from the base to the removal.


@dataclass(frozen=True)
class RankingTable:
    """One metric's scores, layer by layer."""

    name: str
    unit: str
    source: str
    scores: dict[int, Ranked]


def rankings(plan: Plan, audit: Audit) -> list[RankingTable]:
    """Return the plan's own ranking and those the audit holds beside it."""
    own = [
        RankingTable(one.words, one.unit, _items(plan), _by_unit(plan.ranking, one.unit, one.spec))
        for one in [plan.metric]
        if one is not None
    ]
    others = [
        RankingTable(one.metric, one.unit, one.source, _by_unit(one.ranking, one.unit, one.metric))
        for one in audit.rankings
    ]
    return [ranks for ranks in (*own, *others) if ranks.scores]


def ranking_bars(ranks: RankingTable, plan: Plan) -> str:
    """Return a ranking as bars in the order of the layers."""
    given = [plots.Bar(str(unit), one.score, unit in plan.removal, one.interval) for unit, one in ranks.scores.items()]
    return plots.bars(f"{ranks.name}: cost of removing each layer; removed layers are filled", given, ranks.unit)


def layer_table(plan: Plan, shown: Sequence[RankingTable]) -> list[tuple[str, bool, list[str]]]:
    """Return (layer, whether it is removed, a figure of each ranking) for every layer: the bars for who cannot see."""
    units = sorted({unit for ranks in shown for unit in ranks.scores})
    return [(str(unit), unit in plan.removal, [_figure(ranks, unit) for ranks in shown]) for unit in units]


def path_to_removal(audit: Audit) -> str | None:
    """Return the difference of accuracy along the plan's order, and the other models of the audit beside it."""
    if audit.layerwise is None:
        return None
    steps = [one for one in audit.layerwise.path if one.difference is not None]
    if not steps:
        return None
    points = [plots.PlotPoint(0, 0.0, "base: 0 removed")]
    points += [
        _point(f"{len(one.units)} removed", len(one.units), one.difference or 0.0, one.interval) for one in steps
    ]
    beside = [
        _point("healed" if label == PRUNED else label, count, found.difference, found.interval)
        for label, found in audit.overall.items()
        if (count := _count(audit, label)) is not None
    ]
    title = "Difference of accuracy from the base in points against the number of layers removed"
    return plots.curve(title, points, "layers removed", "points", beside)


def _count(audit: Audit, label: str) -> int | None:
    """Return how many units a model beside the path lacks; None for those that lie on it."""
    if label == PRUNED:
        return len(audit.removal) if audit.heal_sha256 else None
    return None if label == UNHEALED else len(audit.compared[label].removal)


def _point(name: str, count: int, difference: float, interval: Interval | None) -> plots.PlotPoint:
    said = f"{name}: {formatting.points(difference)} points" + (
        f" ({formatting.points_interval(interval)})" if interval else ""
    )
    scaled = None if interval is None else (100 * interval[0], 100 * interval[1])
    return plots.PlotPoint(count, 100 * difference, said, scaled)


def _items(plan: Plan) -> str:
    return f"{sum(data.items for data in plan.data)} selection items" if plan.data else "no items"


def _by_unit(ranking: Sequence[Ranked], unit: str, metric: str) -> dict[int, Ranked]:
    return {one.unit: _displayed(one, unit, metric) for one in sorted(ranking, key=lambda one: one.unit)}


def _displayed(one: Ranked, unit: str, metric: str) -> Ranked:
    score, *limits = (displayed(each, unit, metric) for each in (one.score, *(one.interval or ())))
    return one.model_copy(update={"score": score, "interval": tuple(limits) or None})


def _figure(ranks: RankingTable, unit: int) -> str:
    one = ranks.scores.get(unit)
    return "" if one is None else f"{one.score:.3g}".replace("-", formatting.MINUS)


# How to make a checkpoint and its audit again, as command lines; every figure in them comes from the documents.


CORPUS = "FILE"  # the audit knows a text by its name and hash, not by its place


def commands(plan: Plan, audit: Audit, log: HealLog | None, rounds: Sequence[Earlier] = ()) -> list[str]:
    """Return the commands in order: choose the layers, export, heal, audit, and check what is here.

    ``rounds``: of earlier prunings, whose commands make the base.
    """
    bases = [*(one.plan.model for one in rounds[1:]), plan.model]
    healed = [_heal(step, plan, number, len(log.steps)) for number, step in enumerate(log.steps)] if log else []
    return [
        *(line for one, base in zip(rounds, bases, strict=False) for line in _round(one, base)),
        *_smaller(plan, "smaller/"),
        *healed,
        _audit(audit, "healed/" if log else "smaller/"),
        _line("verify", ".", "--rerun", 20, "--digests"),
    ]


def _round(one: Earlier, made: ModelRef) -> list[str]:
    """Return what made the base of the next round, which its plan calls ``made``."""
    steps = one.heal.steps if one.heal else ()
    last = _base(made) if made.revision is None else "base/"
    healed = [_heal(step, one.plan, number, len(steps), last) for number, step in enumerate(steps)]
    return [*_smaller(one.plan, "smaller/" if steps else last), *healed]


def _smaller(plan: Plan, out: str) -> list[str]:
    """What plans and exports; layers named by hand were never planned."""
    model = [_base(plan.model), *_option("--revision", plan.model.revision)]
    if plan.metric is None or plan.search is None:
        return [_line("export", *model, *shlex.split(plan.requested), "-o", out)]
    return [_plan(plan, plan.metric, plan.search, model), _line("export", _made(plan), "-o", out)]


def _plan(plan: Plan, metric: MetricRef, search: SearchRef, model: Sequence[object]) -> str:
    words: list[object] = ["plan", *model, "--metric", metric.spec, *_judged(metric)]
    if plan.data:
        words += ["--tasks", ",".join(data.task for data in plan.data)]
        words += [*_item_options(plan), *_shown(plan.data)]
    words += shlex.split(plan.requested) if plan.requested.startswith("--") else ["--drop", plan.requested]
    words += ["--search", _spec(search), *_limits(plan.limits)]
    return _line(*words, "--seed", plan.seed, "-o", "run/")


def _item_options(plan: Plan) -> list[object]:
    """How many items of each task were asked for; those that certify came on top."""
    certificate = plan.certificate
    if certificate is None:
        return ["--limit", max(data.items for data in plan.data)]
    if certificate.selection_limit is not None:
        return ["--limit", certificate.selection_limit, *_option("--certify-limit", certificate.certify_limit)]
    return ["--limit", max(data.items - len(certificate.fingerprints.get(data.task, ())) for data in plan.data)]


def _made(plan: Plan) -> str:
    """Where the command that plans leaves this plan: a front leaves one of each step."""
    if not plan.requested.startswith("--front"):
        return f"run/{Plan.filename}"
    return f"run/front/{plan_name(len(plan.removal), plan.model.layers)}"


def _judged(metric: MetricRef) -> list[object]:
    """What a metric's judgement was turned into; defaults are left out."""
    objective = metric.objective
    words: list[object] = [] if objective.name == "mean" else ["--objective", objective.name]
    for option, given in (("--weights", objective.weights), ("--floor", objective.floors)):
        words += [option, ",".join(f"{task}={value:g}" for task, value in given.items())] if given else []
    return words


def _spec(search: SearchRef) -> str:
    options = ",".join(f"{name}={value}" for name, value in search.options.items() if value is not None)
    return f"{search.name}:{options}" if options else search.name


def _limits(limits: PlanLimits) -> list[object]:
    flags = {
        "--keep-period": limits.keep_period, "--no-adjacent": limits.no_adjacent, "--contiguous": limits.contiguous
    }  # fmt: skip
    protect: list[object] = ["--protect", ",".join(map(str, limits.protect))] if limits.protect else []
    return [*protect, *(flag for flag, given in flags.items() if given)]


def _heal(step: HealLog, plan: Plan, number: int, of: int, last: str = "healed/") -> str:
    before = "smaller/" if number == 0 else f"healed-{number}/"
    after = last if number + 1 == of else f"healed-{number + 1}/"
    words: list[object] = ["heal", before, "-o", after, "--method", step.method.spec]
    if step.corpus:
        words += ["--corpus", step.corpus.source, "--window", step.corpus.window]
        looked_for = set(step.corpus.overlap)
        if looked_for and looked_for != {data.task for data in plan.data}:  # the plan's are looked for unasked
            words += ["--tasks", ",".join(sorted(looked_for))]
    return _line(*words, "--seed", step.seed)


def _audit(audit: Audit, folder: str) -> str:
    words: list[object] = ["audit", folder, "--tasks", ",".join(task.data.task for task in audit.tasks)]
    words += _option("--limit", audit.limit)
    words += _shown([task.data for task in audit.tasks])
    words += ["--dtype", audit.dtype, "--seed", audit.seed]
    for label in audit.compared:
        if label != UNHEALED:
            words += ["--compare", f"{label}={label}/plan.json"]
    words += ["--text", audit.text.source.split(" (")[0]] if audit.text else []
    words += [] if audit.generation else ["--no-generation"]
    words += [] if audit.layerwise or audit.rankings else ["--no-layerwise"]
    words += ["--speed"] if audit.speed else []
    return _line(*words)


def _shown(data: Sequence[TaskData]) -> list[object]:
    """How items became prompts: examples where all tasks have the same number (else each as its task says), chat."""
    counts = {one.num_fewshot for one in data}
    prompting = data[0].prompting
    words: list[object] = ["--num-fewshot", *counts] if len(counts) == 1 else []
    if prompting.apply_chat_template:
        words += _option("--apply-chat-template", str(prompting.apply_chat_template).replace("True", "true"))
        words += [] if prompting.fewshot_as_multiturn else ["--fewshot-as-multiturn", "false"]
    return [*words, *_option("--system-instruction", prompting.system_instruction)]


def _base(model: ModelRef) -> str:
    """A local folder is named alone: where it lies is nobody else's."""
    return f"{model.id}/" if model.revision is None else model.id


def _option(name: str, value: object) -> list[object]:
    return [] if value is None else [name, value]


def _line(*words: object) -> str:
    return shlex.join(["layerprune", *map(str, words)])
