"""report.html: the whole account of a checkpoint in one file that opens without a network."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from layerprune import formatting
from layerprune.artifacts import (
    PRUNED,
    UNHEALED,
    Audit,
    Earlier,
    HealLog,
    Interval,
    LayerRanking,
    ModelRef,
    Plan,
    TaskData,
)
from layerprune.artifacts.base import write_atomically
from layerprune.artifacts.plan import plan_name
from layerprune.files import check_plain
from layerprune.report import plots
from layerprune.report.card import OURS, foreign_context, render_template, template_context
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

    folder = Path(folder)
    check_plain(folder, OURS)
    audit = audit or Audit.load(folder / "layerprune" / Audit.filename)
    given = foreign_context(audit) if audit.foreign else template_context(folder, audit)
    plan, means = given["plan"], names_of_means(audit)
    shown, path = [] if plan is None else rankings(plan, audit), path_to_removal(audit)
    return render_template(
        "report.html.jinja",
        **given,
        means=means,
        differences=Markup(_differences(audit, means)),  # plots are built here and escape what they are given
        rankings=[(ranks, Markup(ranking_bars(ranks, plan))) for ranks in shown],
        layer_table=[] if plan is None else layer_table(plan, shown),
        path=Markup(path) if path else None,
        commands=foreign_commands(audit) if plan is None else commands(plan, audit, given["log"], given["rounds"]),
    )


def names_of_means(audit: Audit) -> dict[str, str]:
    """Return what means over tasks are called, by model: this one first, then what it was before, then the others."""
    special = {PRUNED: ", healed" if audit.heal_sha256 else "", UNHEALED: ", before healing"}
    labels = sorted(audit.overall, key=lambda label: (label != PRUNED, label != UNHEALED))
    return {label: f"mean of tasks{special.get(label, f', {label}')}" for label in labels}


def _differences(audit: Audit, means: Mapping[str, str]) -> str:
    found = {
        task.data.task + ("" if task.informative else " (base at chance)"): task.models[PRUNED] for task in audit.tasks
    }
    rows = [*found.items(), *((name, audit.overall[label]) for label, name in means.items())]
    title = "Difference of accuracy from the base in points, with 95 % intervals"
    return plots.forest(title, [(name, one.difference, one.interval) for name, one in rows])


# The report, layer by layer: rankings as bars and as a table, and the way from the base to the removal.


def rankings(plan: Plan, audit: Audit) -> list[LayerRanking]:
    """Return the plan's own ranking and those the audit holds beside it, as they are displayed."""
    own, given = plan.metric, [(one, one.metric) for one in audit.rankings]
    if own is not None:
        source = f"{sum(data.items for data in plan.data)} selection items" if plan.data else "no items"
        ranking = LayerRanking(metric=own.words, unit=own.unit, source=source, ranking=plan.ranking)
        given.insert(0, (ranking, own.spec))
    return [_displayed(ranking, spec) for ranking, spec in given if ranking.ranking]


def _displayed(given: LayerRanking, spec: str) -> LayerRanking:
    """Return a ranking in the order of the layers, with its scores as they are displayed."""
    layers = []
    for one in sorted(given.ranking, key=lambda one: one.unit):
        score, *limits = (displayed(each, given.unit, spec) for each in (one.score, *(one.interval or ())))
        layers.append(one.model_copy(update={"score": score, "interval": tuple(limits) or None}))
    return given.model_copy(update={"ranking": tuple(layers)})


def ranking_bars(ranks: LayerRanking, plan: Plan) -> str:
    """Return a ranking as bars in the order of the layers."""
    given = [plots.Bar(str(one.unit), one.score, one.unit in plan.removal, one.interval) for one in ranks.ranking]
    return plots.bars(f"{ranks.metric}: cost of removing each layer; removed layers are filled", given, ranks.unit)


def layer_table(plan: Plan, shown: Sequence[LayerRanking]) -> list[tuple[str, bool, list[str]]]:
    """Return (layer, whether it is removed, a figure of each ranking) for every layer: the bars for who cannot see."""
    figures = [
        {one.unit: f"{one.score:.3g}".replace("-", formatting.MINUS) for one in ranks.ranking} for ranks in shown
    ]
    units = sorted({unit for each in figures for unit in each})
    return [(str(unit), unit in plan.removal, [each.get(unit, "") for each in figures]) for unit in units]


def path_to_removal(audit: Audit) -> str | None:
    """Return the difference of accuracy along the plan's order, and the other models of the audit beside it."""
    steps = [one for one in audit.layerwise.path if one.difference is not None] if audit.layerwise else []
    if not steps:
        return None
    points = [plots.PlotPoint(0, 0.0, "base: 0 removed")]
    points += [_point(f"{len(one.units)} removed", len(one.units), one.difference, one.interval) for one in steps]
    off = {label: (label, len(one.removal)) for label, one in audit.compared.items() if label != UNHEALED}
    if audit.heal_sha256 and audit.removal:  # without healing it is the end of the path
        off[PRUNED] = ("healed", len(audit.removal))
    beside = [_point(*off[label], one.difference, one.interval) for label, one in audit.overall.items() if label in off]
    title = "Difference of accuracy from the base in points against the number of layers removed"
    return plots.curve(title, points, "layers removed", "points", beside)


def _point(name: str, count: int, difference: float, interval: Interval | None) -> plots.PlotPoint:
    said = f"{name}: {formatting.points(difference)} points"
    if interval is None:
        return plots.PlotPoint(count, 100 * difference, said)
    said += f" ({formatting.points_interval(interval)})"
    return plots.PlotPoint(count, 100 * difference, said, (100 * interval[0], 100 * interval[1]))


# How to make a checkpoint and its audit again, as command lines; every figure in them comes from the documents.


CHECKS = ("layerprune verify . --digests", "layerprune audit . --recheck 20")


def commands(plan: Plan, audit: Audit, log: HealLog | None, rounds: Sequence[Earlier] = ()) -> list[str]:
    """Return the commands in order: choose the layers, export, heal, audit, and check what is here.

    ``rounds``: of earlier prunings, whose commands make the base.
    """
    made = [*(one.plan.model for one in rounds[1:]), plan.model]  # by each earlier round, then the last one's base
    lines: list[str] = []
    for one, base in zip(rounds, made, strict=False):
        lines += _round(one.plan, one.heal, _place(base) if base.revision is None else "base/")
    out = "healed/" if log else "smaller/"
    return [*lines, *_round(plan, log, out), _audit(audit, out), *CHECKS]


def foreign_commands(audit: Audit) -> list[str]:
    """Return the commands that repeat the audit of a foreign checkpoint, and check what is here."""
    place, base = _place(audit.pruned), _place(audit.base)
    return [_audit(audit, place), CHECKS[0], _line("audit", place, "--base", base, "-o", ".", "--recheck", 20)]


def _round(plan: Plan, log: HealLog | None, out: str) -> list[str]:
    """What plans, exports and heals until there is ``out``; layers named by hand were never planned."""
    steps = log.steps if log else ()
    places = [*(["smaller/"] if steps else []), *(f"healed-{number}/" for number in range(1, len(steps))), out]
    model = [_place(plan.model), *_options(revision=plan.model.revision)]
    if plan.metric is None or plan.search is None:
        lines = [_line("export", *model, *shlex.split(plan.requested), "-o", places[0])]
    else:
        file = Plan.filename
        if plan.requested.startswith("--front"):  # a front leaves a plan of each step
            file = f"front/{plan_name(len(plan.removal), plan.model.layers)}"
        lines = [_plan(plan, model), _line("export", f"run/{file}", "-o", places[0])]
    return lines + [_heal(step, plan, *ends) for step, *ends in zip(steps, places, places[1:], strict=False)]


def _plan(plan: Plan, model: Sequence[str]) -> str:
    metric, search, limits = plan.metric, plan.search, plan.limits
    objective = metric.objective
    searched = ",".join(f"{name}={value}" for name, value in search.options.items() if value is not None)
    return _line(
        "plan",
        *model,
        *_options(
            metric=metric.spec,
            objective=None if objective.name == "mean" else objective.name,  # defaults are left out
            weights=_pairs(objective.weights),
            floor=_pairs(objective.floors),
        ),
        *(_item_options(plan) if plan.data else []),
        *(shlex.split(plan.requested) if plan.requested.startswith("--") else ["--drop", plan.requested]),
        *_options(
            search=f"{search.name}:{searched}" if searched else search.name,
            protect=",".join(map(str, limits.protect)) or None,
            keep_period=limits.keep_period,
            no_adjacent=limits.no_adjacent,
            contiguous=limits.contiguous,
            seed=plan.seed,
        ),
        "-o",
        "run/",
    )


def _item_options(plan: Plan) -> list[str]:
    """Which tasks, and how many items of each were asked for; those that certify came on top."""
    certificate = plan.certificate
    if certificate is not None and certificate.selection_limit is not None:
        limits = {"limit": certificate.selection_limit, "certify_limit": certificate.certify_limit}
    else:
        apart = certificate.fingerprints if certificate else {}
        limits = {"limit": max(data.items - len(apart.get(data.task, ())) for data in plan.data)}
    return _options(tasks=",".join(data.task for data in plan.data), **limits) + _prompt_options(plan.data)


def _heal(step: HealLog, plan: Plan, before: str, after: str) -> str:
    corpus = step.corpus
    looked_for = set(corpus.overlap) if corpus else set()
    unasked = looked_for == {data.task for data in plan.data}  # the plan's are looked for unasked
    return _line(
        "heal",
        before,
        "-o",
        after,
        *_options(
            method=step.method.spec,
            corpus=corpus.source if corpus else None,
            window=corpus.window if corpus else None,
            tasks=None if unasked else ",".join(sorted(looked_for)) or None,
            seed=step.seed,
        ),
    )


def _audit(audit: Audit, folder: str) -> str:
    return _line(
        "audit",
        folder,
        *(["--base", _place(audit.base), "-o", "audit/"] if audit.foreign else []),
        *_options(tasks=",".join(task.data.task for task in audit.tasks), limit=audit.limit),
        *_prompt_options([task.data for task in audit.tasks]),
        *_options(
            dtype=audit.dtype,
            seed=audit.seed,
            compare=[f"{label}={label}/plan.json" for label in audit.compared if label != UNHEALED],
            text=audit.text.source.split(" (")[0] if audit.text else None,
            no_generation=audit.generation is None,
            no_layerwise=audit.layerwise is None and not audit.rankings and not audit.foreign,
            speed=audit.speed is not None,
            speed_engine="vllm" if audit.speed and (audit.speed.engine or "").startswith("vllm") else None,
        ),
    )


def _prompt_options(data: Sequence[TaskData]) -> list[str]:
    """How items became prompts: examples where all tasks have the same number (else each as its task says), chat."""
    counts, prompting = {one.num_fewshot for one in data}, data[0].prompting
    chat = prompting.apply_chat_template
    return _options(
        num_fewshot=counts.pop() if len(counts) == 1 else None,
        apply_chat_template=str(chat).replace("True", "true") if chat else None,
        fewshot_as_multiturn="false" if chat and not prompting.fewshot_as_multiturn else None,
        system_instruction=prompting.system_instruction,
    )


def _place(model: ModelRef) -> str:
    """A local folder is named alone: where it lies is nobody else's."""
    return f"{model.id}/" if model.revision is None else model.id


def _pairs(given: Mapping[str, float]) -> str | None:
    return ",".join(f"{task}={value:g}" for task, value in given.items()) or None


def _options(**given: object) -> list[str]:
    """Return options as words: None and False are left out, True is a flag, a list is one option for each entry."""
    words: list[str] = []
    for name, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one is not False:
                words.append(f"--{name.replace('_', '-')}")
                words += [] if one is True else [str(one)]
    return words


def _line(*words: object) -> str:
    return shlex.join(["layerprune", *map(str, words)])
