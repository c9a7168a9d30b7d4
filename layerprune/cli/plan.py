"""``layerprune score``, ``plan`` and ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from layerprune.cli import command as opt
from layerprune.cli.command import Verb, pass_console
from layerprune.cli.console import Console
from layerprune.config import PlanConfig, ScoreConfig
from layerprune.errors import UsageError
from layerprune.files import locked

# ``layerprune score`` and ``layerprune plan``.


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
@opt.options(ScoreConfig)
@click.option("--stability", is_flag=True, help="Say how far other items would repeat the ranking.")
@opt.output("Folder that gets scores.json.")
@click.option("--force", is_flag=True, help="Replace a scores.json that is there, and remove what was planned from it.")
@pass_console
def score(console: Console, model: str, output: Path, force: bool, stability: bool, **options: Any) -> None:
    """Measure what each layer's removal costs MODEL (a folder or a Hub id), and write scores.json."""
    from layerprune import api
    from layerprune.cli import tables

    with locked(output, model):
        refuse_to_replace(output / "scores.json", force)
        told = opt.given(options)
        scores = api.score(model, out=output, stability=stability, progress=console.progress, **told)
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
@opt.options(PlanConfig)
@click.option("--scores", type=opt.FILE, metavar="FILE", help="Plan from this scores.json instead of a model.")
@opt.output("Folder that gets scores.json and plan.json.")
@click.option("--force", is_flag=True, help="Replace documents that are already there.")
@pass_console
def plan(console: Console, model: str | None, scores: Path | None, output: Path, force: bool, **options: Any) -> None:
    """Choose which layers of MODEL (a folder or a Hub id) to remove; write scores.json and plan.json.

    One of --drop, --target-params, --target-bytes, --target-speedup, --max-drop and --front says how far to go.
    """
    from layerprune import api
    from layerprune.artifacts import Front
    from layerprune.cli import tables
    from layerprune.cli.tables import front, reached

    told = opt.given(options)
    with locked(output, model):
        refuse_to_replace(output / ("front/front.json" if told.get("front") else "plan.json"), force)
        there = output / "scores.json"
        if there.exists() and not force and not (scores is not None and scores.exists() and there.samefile(scores)):
            way = "plan from it with --scores, " if scores is None else ""
            raise UsageError(f"{there} exists; {way}give another folder with -o, or --force to replace it")
        found, made = api.planned(model, scores=scores, out=output, progress=console.progress, **told)
    if isinstance(made, Front):
        for part in front(made, output):
            console.print(part)
        return
    for part in (*tables.planned(found, made), *reached(made)):
        console.print(part)
    console.print(f"written: {output / 'scores.json'}, {output / 'plan.json'}")
    console.print(f"next: layerprune export {output / 'plan.json'} -o smaller/")


def refuse_to_replace(path: Path, force: bool) -> None:
    """Raise ``UsageError`` when a document would be overwritten without ``--force``."""
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another folder with -o, or --force to replace it")


# ``layerprune compare``.


@click.command(
    cls=Verb,
    after_interrupt="nothing is ever written",
    examples=["layerprune compare ablation/scores.json cosine/scores.json"],
)
@click.argument("first", type=opt.FILE)
@click.argument("second", type=opt.FILE)
@pass_console
def compare(console: Console, first: Path, second: Path) -> None:
    """Show how far two scores.json, FIRST and SECOND, agree about which layers to remove."""
    from layerprune.artifacts import read_scores
    from layerprune.cli import tables
    from layerprune.scoring.aggregation import compare_scores

    ours, theirs = read_scores(first), read_scores(second)
    found = compare_scores(ours, theirs)
    console.print(tables.sources(found, ours, theirs))
    console.print(tables.compared_layers(found, ("metric 1", "metric 2")))
    console.print(tables.compared_agreement(found))
