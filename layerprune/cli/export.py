"""``layerprune export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.sizes import in_words, parse_size

if TYPE_CHECKING:
    from layerprune.documents import Plan


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
@click.option("--remove", metavar="LAYERS", help="Remove exactly these layers of MODEL: 21-24 or 3,-1 (0-based).")
@opt.revision
@click.option("--base", metavar="MODEL", help="Where the base model is now. Default: where the plan found it.")
@click.option("--max-shard-size", metavar="SIZE", help="Largest weight file, such as 500MB. Default: 5GB.")
@opt.trust_remote_code
@opt.output("Folder to make; it must not exist yet.")
@pass_console
def export(
    console: Console,
    plan: str,
    output: Path,
    max_shard_size: str | None,
    remove: str | None,
    revision: str | None,
    **options: Any,
) -> None:
    """Write the smaller model that PLAN (a plan.json, or the folder with it) describes, ready to be loaded.

    With --remove it is MODEL (a folder or a Hub id) without these layers: nothing is measured, and no plan is needed.
    """
    from layerprune.checkpoint import try_new_folder
    from layerprune.errors import UsageError
    from layerprune.exporter import export as write
    from layerprune.exporter import removal_plan

    if remove is None:
        if revision is not None:
            raise UsageError("--revision is for a MODEL with --remove; a plan names its own")
        read = _plan_at(Path(plan))
    else:
        if options["base"] is not None:
            raise UsageError("--base is for a PLAN; with --remove the first argument is the model")
        try_new_folder(output, plan)
        chosen = {"revision": revision, "trust_remote_code": options["trust_remote_code"]}
        read = removal_plan(plan, remove, progress=console.progress, **opt.given(chosen))
    limit = None if max_shard_size is None else parse_size(max_shard_size, "--max-shard-size")
    receipt = write(read, output, max_shard_size=limit, progress=console.progress, **opt.given(options))
    console.print(
        f"{receipt.base.layers} layers, {in_words(receipt.bytes_before)} -> "
        f"{receipt.result.layers} layers, {in_words(receipt.bytes_after)}"
    )
    if receipt.proof is not None:
        console.print(f"checked: logits differ from the bypassed base by at most {receipt.proof.max_difference:.2g}")
    console.print(f"written: {output}")
    console.print(f"next: layerprune audit {output} --tasks ...")


def _plan_at(path: Path) -> Plan:
    """Read a plan; raises ``UsageError`` for what looks like a model, which needs ``--remove``."""
    from layerprune.documents import Plan, read_plan
    from layerprune.errors import UsageError

    file = path / Plan.filename if path.is_dir() else path
    if not file.exists() and (path / "config.json").exists():
        raise UsageError(f"{path} is a model and not a plan; name the layers to remove (--remove 21-24), or plan first")
    return read_plan(file)
