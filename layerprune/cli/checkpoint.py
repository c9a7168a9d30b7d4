"""``layerprune export``, ``heal``, ``audit``, ``verify``, ``card`` and ``push``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerprune import api
from layerprune.artifacts import PRUNED, Audit, HealLog, Speed
from layerprune.cli import command as opt
from layerprune.cli.command import Verb, pass_console
from layerprune.cli.console import Console, table
from layerprune.config import AuditConfig, CardConfig, ExportConfig, HealConfig, PushConfig, VerifyConfig
from layerprune.formatting import in_words, percent, percent_change, percent_interval, points, points_interval

if TYPE_CHECKING:
    from rich.table import Table

    from layerprune.auditor.recheck import RecheckResult
    from layerprune.auditor.verification import Verification


# ``layerprune export``.


@click.command(
    cls=Verb,
    after_interrupt="nothing was left behind; run the same command again",
    examples=[
        "layerprune export run/plan.json -o smaller/",
        "layerprune export HuggingFaceTB/SmolLM2-135M --remove 21-24 -o smaller/",
        "layerprune export run/plan.json --base /models/base -o smaller/ --max-shard-size 5GB",
        "layerprune export run/plan.json --as mergekit",
        "layerprune export HuggingFaceTB/SmolLM2-135M --remove passthrough.yaml -o smaller/",
    ],
)
@click.argument("plan", metavar="PLAN|MODEL")
@opt.options(ExportConfig)
@opt.output("Folder to make; it must not exist yet. Not with --as.", required=False)
@pass_console
def export(console: Console, plan: str, output: Path | None = None, **options: Any) -> Iterator[Table | str]:
    """Write the smaller model that PLAN (a plan.json, or the folder with it) describes, ready to be loaded.

    With --remove it is MODEL (a folder or a Hub id) without these layers: nothing is measured, and no plan is needed.
    With --as only the removal is printed, for another tool to carry out.
    """
    receipt = api.export(plan, output, progress=console.progress, **options)
    if isinstance(receipt, str):
        yield receipt
        return
    yield (
        f"{receipt.base.layers} layers, {in_words(receipt.bytes_before)} -> "
        f"{receipt.result.layers} layers, {in_words(receipt.bytes_after)}"
    )
    if receipt.proof is not None:
        yield f"checked: logits differ from the bypassed base by at most {receipt.proof.max_difference:.2g}"
    yield f"written: {output}"
    yield f"next: layerprune audit {output} --tasks ..."


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
def heal(console: Console, checkpoint: Path, output: Path, **options: Any) -> Iterator[Table | str]:
    """Win back what removal took from the exported model in CHECKPOINT; the result has the same tensors and shapes.

    Methods that train run in several processes, too: accelerate launch -m layerprune heal ...
    """
    log = api.heal(checkpoint, output, progress=console.progress, **options)
    if log is None:
        return  # one of several processes, and not the one that speaks
    yield from healed(log)
    yield f"written: {output}"
    yield f"next: layerprune audit {output} --tasks ..."


def healed(log: HealLog) -> Iterator[str]:
    """Yield a line on the work, one on the corpus, one on what was won back, and the method's own remarks."""
    read = f", {log.tokens:,} tokens read" if log.tokens else ""
    yield f"{log.method.spec}: {len(log.changed)} tensors changed in {log.seconds:.1f} s{read}"
    if log.found:
        values = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in log.found.items()}
        yield "settled on: " + ", ".join(f"{name} {value}" for name, value in values.items())
    for task, overlap in (log.corpus.overlap if log.corpus else {}).items():
        yield f"in the corpus: {len(overlap.found)} of {overlap.items} items of {task}"
    loss = log.heldout
    if loss is not None and log.corpus is not None:
        said = f"perplexity {math.exp(loss.before):.2f} -> {math.exp(loss.after):.2f}"
        if loss.base is not None:
            said += f", base {math.exp(loss.base):.2f}"
        if loss.recovered is not None:
            said += f": {100 * loss.recovered:.0f} % of the lost nats won back"
        yield f"{said} (held out: {log.corpus.heldout_windows} windows of {log.corpus.window} tokens)"
    for note in log.notes:
        yield f"note: {note}"


# ``layerprune audit``.


WRONG = 1  # exit code when a folder is not what it says it is; 2 is kept for commands that could not be carried out


@click.command(
    cls=Verb,
    after_interrupt="the folder is as it was; run the same command again",
    examples=[
        "layerprune audit smaller/ --tasks arc_easy,hellaswag",
        "layerprune audit smaller/ --tasks arc_easy --compare cosine=cosine/plan.json",
        "layerprune audit tuned/ --base org/base -o audit/ --tasks arc_easy,hellaswag",
        "layerprune audit smaller/ --recheck 20 --include-path tasks/",
    ],
)
@click.argument("model", type=opt.FOLDER, metavar="FOLDER|MODEL")
@opt.output("Folder for the audit of a model that layerprune did not export.", required=False)
@opt.options(AuditConfig)
@pass_console
def audit(console: Console, model: Path, output: Path | None = None, **options: Any) -> Iterator[Table | str]:
    """Compare the exported model in FOLDER with its base on items that no earlier step has seen.

    With --base and -o it is any other MODEL (a folder, a Hub id, or the folder of a peft adapter): its own folder
    stays as it is.

    With --recheck the audit that is there is asked again in part, by a stranger as well: exit code 1 when an item does
    not repeat. FOLDER is the exported model, or the DIR of another model's audit.
    """
    found = api.audit(model, output, progress=console.progress, **options)
    if not isinstance(found, Audit):
        yield from rechecked(output or model, found)
        if found.problems:
            click.get_current_context().exit(WRONG)
        return
    yield from audited(found)
    places = [model / "layerprune" / "audit.json", model / "README.md", model / "report.html"]
    if output is not None:
        places = [output / name for name in ("audit.json", "card.md", "report.html")]
    yield f"written: {', '.join(map(str, places))}"


def audited(audit: Audit) -> Iterator[Table | str]:
    """Yield the table of tasks, the verdict, and a line for everything else that was measured."""
    yield tasks(audit)
    if audit.own_answers:
        yield own_answers(audit)
    yield audit.verdict
    for label, overall in audit.overall.items():
        if label != PRUNED:
            change = f"{points(overall.difference)} points ({points_interval(overall.interval)})"
            yield f"{label}, on the same items: accuracy {change}"
    if audit.layerwise and audit.layerwise.compensation:
        yield audit.layerwise.compensation.verdict
    if (text := audit.text) is not None:
        yield (
            f"text: {text.base_nats:.3f} -> {text.nats:.3f} nats per token over {text.tokens} tokens of {text.source}; "
            f"KL {text.kl:.3f}, same likeliest token at {text.top1_agreement:.0%} of positions"
        )
    if (found := audit.generation) is not None:
        health = "as healthy as the base's" if found.healthy else "LESS HEALTHY than the base's"
        yield f"generation: {health}, {found.faulty} of {found.prompts} texts faulty (base: {found.base_faulty})"
    if (speed := audit.speed) is not None:
        changes = []
        for name, before in speed.base.items():
            if (after := speed.pruned.get(name)) is not None:
                change = percent_change(after.median / before.median - 1)
                changes.append(f"{name.replace('_', ' ')} {before.median:.4g} -> {after.median:.4g} ({change})")
        by = f" by {speed.engine}" if speed.engine else ""
        yield f"speed{by} on {speed.device}, {speed.dtype}: {', '.join(changes)}"
        yield from _batches(speed)


def _batches(speed: Speed) -> Iterator[str]:
    for batch in speed.batches or ():
        if batch.base is None or batch.pruned is None:
            yield f"batch size {batch.batch_size}: left out, {batch.left_out}"
            continue
        changes = [
            f"{name} {batch.base[key].median:.4g} -> {batch.pruned[key].median:.4g} "
            f"({percent_change(batch.pruned[key].median / batch.base[key].median - 1)})"
            for name, key in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s"))
        ]
        yield f"batch size {batch.batch_size}: tokens per s {', '.join(changes)}"


def rechecked(place: Path, found: RecheckResult) -> Iterator[str]:
    """Yield every item that does not repeat on its own line, and one line on all of them."""
    for problem in found.problems:
        yield f"problem: {problem}"
    said = f"{found.items} items asked again, {found.same_decisions} of {found.decisions} decisions the same"
    if found.largest_change is not None:
        said += f", largest change of a gold answer's probability {found.largest_change:.2g}"
    if found.unexplained:
        said += f", {found.unexplained} items left out that only the compared plans can explain (--compare)"
    repeats = f"does NOT repeat: {len(found.problems)} problem{'s' * (len(found.problems) > 1)}"
    yield f"the audit in {place} {repeats if found.problems else 'repeats'}; {said}"


def tasks(audit: Audit) -> Table:
    """Return the accuracies of every task and model, and their paired differences in points."""
    columns = ["points", "95 % interval", "base", "accuracy", "chance", "right to wrong", "wrong to right", "items"]
    columns.append("p (Holm)")
    made = table("against the base, on the same items", "task", "model", *columns, numbers=columns)
    for task in audit.tasks:
        for label, own in task.models.items():
            made.add_row(
                task.data.task + ("" if task.informative else " (not informative)"), _model(audit, label),
                points(own.difference), points_interval(own.interval), f"{task.base_accuracy:.3f}",
                f"{own.accuracy:.3f}", f"{task.data.chance:.3f}", str(own.flips.right_to_wrong),
                str(own.flips.wrong_to_right), str(task.data.items), f"{own.flips.p_adjusted:.2g}",
            )  # fmt: skip
    return made


def own_answers(audit: Audit) -> Table:
    """Return the table of the base's own answers."""
    columns = ["agreed", "95 % interval", "nats per token lost", "95 % interval of it", "prompts", "tokens"]
    made = table("the base's own answers, read token by token", "to", "model", *columns, numbers=columns)
    for one in audit.own_answers:
        for label, own in one.models.items():
            agreed, lost = own.agreed_interval, own.interval
            made.add_row(
                one.task, _model(audit, label), percent(own.agreed), percent_interval(agreed) if agreed else "",
                f"{own.nats:.3f}", f"{lost[0]:.3f} … {lost[1]:.3f}" if lost else "", str(len(one.fingerprints)),
                str(one.tokens),
            )  # fmt: skip
    return made


def _model(audit: Audit, label: str) -> str:
    if label != PRUNED:
        return label
    return "healed" if audit.heal_sha256 else "candidate" if audit.foreign else label


# ``layerprune verify``.


@click.command(
    cls=Verb,
    after_interrupt="nothing is ever written",
    examples=[
        "layerprune verify smaller/",
        "layerprune verify smaller/ --base /models/base --digests",
    ],
)
@click.argument("folder", type=opt.FOLDER)
@opt.options(VerifyConfig)
@click.option("--digests", is_flag=True, help="Print the sha256 of each document, to compare with the publisher's.")
@pass_console
def verify(console: Console, folder: Path, digests: bool, **options: Any) -> Iterator[Table | str]:
    """Check that FOLDER is what export and audit left: every hash and figure; exit code 1 when something is wrong."""
    found = api.verify(folder, progress=console.progress, **options)
    yield from verified(folder, found, digests)
    if not found.ok:
        click.get_current_context().exit(WRONG)


def verified(folder: Path, found: Verification, digests: bool) -> Iterator[str]:
    """Yield every problem on its own line, or one line that all is in order; digests last where asked for."""
    for problem in found.problems:
        yield f"problem: {problem}"
    if found.ok:
        audited = "audited" if found.audited else "not audited yet"
        yield f"{folder} is as it was left: {found.files} files, {in_words(found.bytes)}, {audited}"
    else:
        count = len(found.problems)
        yield f"{folder} is NOT what its documents say: {count} problem{'s' * (count > 1)}"
    if digests:
        for name, digest in found.digests.items():
            yield f"{name} sha256 {digest}"


# ``layerprune card``.


@click.command(
    cls=Verb,
    after_interrupt="the card is as it was; run the same command again",
    examples=["layerprune card smaller/", "layerprune card audit/"],
)
@click.argument("folder", type=opt.FOLDER)
@opt.options(CardConfig)
@pass_console
def card(console: Console, folder: Path, **options: Any) -> Iterator[Table | str]:
    """Renew the card in FOLDER, README.md of an exported model or card.md of another model's audit.

    What people wrote outside the generated part stays as it is; a card without that part gets it on top.
    """
    yield f"written: {api.card(folder, **options)}"


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
def push(console: Console, folder: Path, repo: str, **options: Any) -> Iterator[Table | str]:
    """Verify FOLDER and send weights, card, audit and report to REPO (owner/name) on the Hub.

    A README.md that is there keeps its words and metadata and gets FOLDER's part. Files that others put there stay;
    one in the way stops the push before anything is sent.

    The token is the one that huggingface_hub finds (hf auth login, or HF_TOKEN).
    """
    from layerprune.hub import REPLACED

    sent = api.push(folder, repo, progress=console.progress, **options)
    if sent.url is None:
        for name, size in sent.files.items():
            yield f"{in_words(size):>9}  {name}"
        yield f"deleted from the repo, where an earlier push left others: {', '.join(REPLACED)}"
    where = f"pushed to {sent.repo}: {sent.url}" if sent.url else f"would go to {sent.repo}"
    yield f"{len(sent.files)} files, {in_words(sent.bytes)} {where}"
