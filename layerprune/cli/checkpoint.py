"""``layerprune export``, ``heal``, ``audit``, ``verify`` and ``push``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from layerprune.artifacts import PRUNED, Audit
from layerprune.artifacts.audit import MeasuredSpeed
from layerprune.cli import command as opt
from layerprune.cli.command import Verb, pass_console
from layerprune.cli.console import Console
from layerprune.cli.tables import table
from layerprune.config import AuditConfig, ExportConfig, HealConfig, PushConfig, VerifyConfig
from layerprune.formatting import in_words, percent, percent_change, percent_interval, points, points_interval

# ``layerprune export``.


@click.command(
    cls=Verb,
    after_interrupt="nothing was left behind; run the same command again",
    examples=[
        "layerprune export run/plan.json -o smaller/",
        "layerprune export HuggingFaceTB/SmolLM2-135M --remove 21-24 -o smaller/",
        "layerprune export run/plan.json --base /models/base -o smaller/ --max-shard-size 5GB",
    ],
)
@click.argument("plan", metavar="PLAN|MODEL")
@opt.options(ExportConfig)
@opt.output("Folder to make; it must not exist yet.")
@pass_console
def export(console: Console, plan: str, output: Path, **options: Any) -> None:
    """Write the smaller model that PLAN (a plan.json, or the folder with it) describes, ready to be loaded.

    With --remove it is MODEL (a folder or a Hub id) without these layers: nothing is measured, and no plan is needed.
    """
    from layerprune import api

    receipt = api.export(plan, output, progress=console.progress, **opt.given(options))
    console.print(
        f"{receipt.base.layers} layers, {in_words(receipt.bytes_before)} -> "
        f"{receipt.result.layers} layers, {in_words(receipt.bytes_after)}"
    )
    if receipt.proof is not None:
        console.print(f"checked: logits differ from the bypassed base by at most {receipt.proof.max_difference:.2g}")
    console.print(f"written: {output}")
    console.print(f"next: layerprune audit {output} --tasks ...")


# ``layerprune heal``.


@click.command(
    cls=Verb,
    after_interrupt="no folder was written; the same command goes on where the method can, else begins again",
    examples=[
        "layerprune heal smaller/ -o healed/ --method linear --corpus text.jsonl",
        "layerprune heal smaller/ -o healed/ --method linear:ridge=0.01 --corpus builtin",
        "layerprune heal healed/ -o distilled/ --method distill:steps=200 --corpus text.jsonl",
    ],
)
@click.argument("checkpoint", type=opt.FOLDER)
@opt.output("Folder to make; it must not exist yet.")
@opt.options(HealConfig)
@pass_console
def heal(console: Console, checkpoint: Path, output: Path, **options: Any) -> None:
    """Win back what removal took from the exported model in CHECKPOINT; the result has the same tensors and shapes.

    Methods that train run in several processes, too: accelerate launch -m layerprune heal ...
    """
    from layerprune import api
    from layerprune.cli.tables import healed

    log = api.heal(checkpoint, output, progress=console.progress, **opt.given(options))
    if log is None:
        return  # one of several processes, and not the one that speaks
    for part in healed(log):
        console.print(part)
    console.print(f"written: {output}")
    console.print(f"next: layerprune audit {output} --tasks ...")


# ``layerprune audit``.


@click.command(
    cls=Verb,
    after_interrupt="the folder is as it was; run the same command again",
    examples=[
        "layerprune audit smaller/ --tasks arc_easy,hellaswag",
        "layerprune audit smaller/ --tasks arc_easy --compare cosine=cosine/plan.json",
    ],
)
@click.argument("folder", type=opt.FOLDER)
@opt.options(AuditConfig)
@pass_console
def audit(console: Console, folder: Path, **options: Any) -> None:
    """Compare the exported model in FOLDER with its base on items that no earlier step has seen."""
    from layerprune import api

    found = api.audit(folder, progress=console.progress, **opt.given(options))
    for part in audited(found):
        console.print(part)
    console.print(f"written: {folder / 'layerprune' / 'audit.json'}, {folder / 'README.md'}, {folder / 'report.html'}")


# What ``layerprune audit`` and ``run`` show of an audit.


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


def _change(before: MeasuredSpeed, after: MeasuredSpeed) -> str:
    return f"{before.median:.4g} -> {after.median:.4g} ({percent_change(after.median / before.median - 1)})"


# ``layerprune verify``.


WRONG = 1  # exit code when the folder is not what it says it is; 2 is kept for commands that could not be carried out


@click.command(
    cls=Verb,
    after_interrupt="nothing is ever written",
    examples=[
        "layerprune verify smaller/",
        "layerprune verify smaller/ --base /models/base --digests",
        "layerprune verify smaller/ --rerun 20 --include-path tasks/",
    ],
)
@click.argument("folder", type=opt.FOLDER)
@opt.options(VerifyConfig)
@click.option("--digests", is_flag=True, help="Print the sha256 of each document, to compare with the publisher's.")
@pass_console
def verify(console: Console, folder: Path, digests: bool, **options: Any) -> None:
    """Check that FOLDER is what export and audit left: every hash and figure; exit code 1 when something is wrong."""
    from layerprune import api
    from layerprune.cli.tables import verified

    told = opt.given(options)
    found = api.verify(folder, progress=console.progress, **told)
    for line in verified(folder, found, "rerun" in told, digests):
        console.print(line)
    if not found.ok:
        click.get_current_context().exit(WRONG)


# ``layerprune push``.


@click.command(
    cls=Verb,
    after_interrupt="run the same command again: files that have arrived are not sent twice",
    examples=[
        "layerprune push smaller/ me/smaller-model --dry-run",
        "layerprune push smaller/ me/smaller-model --private",
        "layerprune push smaller/ me/smaller-model --create-pr --base-model org/base",
    ],
)
@click.argument("folder", type=opt.FOLDER)
@click.argument("repo")
@opt.options(PushConfig)
@pass_console
def push(console: Console, folder: Path, repo: str, **options: Any) -> None:
    """Verify FOLDER and send weights, card, audit and report to REPO (owner/name) on the Hub.

    The token is the one that huggingface_hub finds (hf auth login, or HF_TOKEN).
    """
    from layerprune import api
    from layerprune.hub import REPLACED

    sent = api.push(folder, repo, progress=console.progress, **opt.given(options))
    if sent.url is None:
        for name, size in sent.files.items():
            console.print(f"{in_words(size):>9}  {name}")
        console.print(f"deleted from the repo, where it has others: {', '.join(REPLACED)}")
    where = f"pushed to {sent.repo}: {sent.url}" if sent.url else f"would go to {sent.repo}"
    console.print(f"{len(sent.files)} files, {in_words(sent.bytes)} {where}")
