"""How to make a checkpoint and its audit again, as command lines; every figure in them comes from the documents."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from layerprune.documents import UNHEALED, Audit, Earlier, HealLog, Limits, MetricRef, ModelRef, Plan, Search, TaskData
from layerprune.documents.front import plan_name

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


def _plan(plan: Plan, metric: MetricRef, search: Search, model: Sequence[object]) -> str:
    words: list[object] = ["plan", *model, "--metric", metric.spec, *_judged(metric)]
    if plan.data:
        words += ["--tasks", ",".join(data.task for data in plan.data)]
        words += [*_items(plan), *_shown(plan.data)]
    words += shlex.split(plan.requested) if plan.requested.startswith("--") else ["--drop", plan.requested]
    words += ["--search", _spec(search), *_limits(plan.limits)]
    return _line(*words, "--seed", plan.seed, "-o", "run/")


def _items(plan: Plan) -> list[object]:
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


def _spec(search: Search) -> str:
    options = ",".join(f"{name}={value}" for name, value in search.options.items() if value is not None)
    return f"{search.name}:{options}" if options else search.name


def _limits(limits: Limits) -> list[object]:
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
