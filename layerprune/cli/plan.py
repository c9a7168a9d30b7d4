"""``layerprune score`` and ``layerprune plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import options as opt
from layerprune.cli.console import Console
from layerprune.cli.verb import Verb, pass_console
from layerprune.errors import UsageError
from layerprune.lock import locked
from layerprune.output import check_places

SEARCHES = "one-shot, greedy[:lazy=true], blocks or exchange[:by=cosine+angular]"
CONTINUE = "run the same command again: what was finished is kept"


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
@opt.scoring
@click.option("--stability", is_flag=True, help="Say how far other items would repeat the ranking.")
@opt.output("Folder that gets scores.json.")
@click.option("--force", is_flag=True, help="Replace a scores.json that is there, and remove what was planned from it.")
@pass_console
def score(console: Console, model: str, output: Path, force: bool, stability: bool, **options: Any) -> None:
    """Measure what each layer's removal costs MODEL (a folder or a Hub id), and write scores.json."""
    from layerprune.cli import tables
    from layerprune.planning import ScoreRequest, lay, score_model

    with locked(output, model):
        refuse_to_replace(output / "scores.json", force)
        check_places(output, files=("scores.json",))
        request = ScoreRequest(model=model, **opt.given(options))
        scores = score_model(request, run_folder=output, progress=console.progress, stability=stability)
        lay(scores, output, console.progress)
    console.print(tables.ranking(scores))
    if stability:
        console.print(tables.stability(scores))
    console.print(f"written: {output / 'scores.json'}")


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
@opt.goal
@click.option(
    "--search",
    metavar="SPEC",
    help=f"{SEARCHES}. Default: the metric's own, greedy for ablation. Others come as plug-ins.",
)
@click.option(
    "--racing/--no-racing",
    default=None,
    help="Stop layers early that are clearly not next. "
    "Default: yes, but for --objective worst and --floor.",
)
@opt.rules
@click.option("--scores", type=opt.FILE, metavar="FILE", help="Plan from this scores.json instead of a model.")
@opt.scoring
@opt.output("Folder that gets scores.json and plan.json.")
@click.option("--force", is_flag=True, help="Replace documents that are already there.")
@pass_console
def plan(console: Console, output: Path, force: bool, **options: Any) -> None:
    """Choose which layers of MODEL (a folder or a Hub id) to remove; write scores.json and plan.json.

    One of --drop, --target-params, --target-bytes, --target-speedup, --max-drop and --front says how far to go.
    """
    from layerprune.cli import planned as ways
    from layerprune.cli import tables
    from layerprune.cli.reached import front, reached

    if options["front"]:
        with locked(output, options["model"]):
            refuse_to_replace(output / "front" / "front.json", force)
            found = ways.front_anew(output=output, force=force, progress=console.progress, **options)
        for part in front(found, output):
            console.print(part)
        return
    make = ways.plan_anew if options["scores"] is None else ways.plan_from_scores
    with locked(output, options["model"]):
        refuse_to_replace(output / "plan.json", force)
        scores, planned = make(output=output, force=force, progress=console.progress, **options)
    for part in (*tables.planned(scores, planned), *reached(planned)):
        console.print(part)
    console.print(f"written: {output / 'scores.json'}, {output / 'plan.json'}")
    console.print(f"next: layerprune export {output / 'plan.json'} -o smaller/")


def refuse_to_replace(path: Path, force: bool) -> None:
    """Raise ``UsageError`` when a document would be overwritten without ``--force``."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another folder with -o, or --force to replace it")
