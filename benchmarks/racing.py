"""What a race spends and whether it ends with the set that all items give: real outcomes, the items in other orders.

    python benchmarks/racing.py MODEL EVAL -o FOLDER [--items 200] [--seeds 20] [--dtype bfloat16] [--tasks a,b]

MODEL is a local folder, EVAL a folder with lm-eval task YAMLs in ``tasks/``. Every layer's removal answers --items
selection items of each task once, in full (the journal in FOLDER keeps that: killed, the same command goes on). Then
races are run over these outcomes, --seeds orders of the items each: for 1, 4 and 8 layers to go, by accuracy, by the
gold answer's probability and by their blend, and over a half and a quarter of the items. Prints a table: item
evaluations of the exhaustive run over those of the race, and how often the set was the same.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from layerprune.artifacts import MEAN, Outcomes, TaskData
from layerprune.cli.command import quiet_libraries
from layerprune.cli.console import PlainProgress
from layerprune.data.tasks import load_eval_set
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.aggregation import BaseOutcomes, Signal
from layerprune.scoring.cached_evaluator import BLOCK_ITEMS, CachedEvaluator, block_edges
from layerprune.scoring.engine import Engine
from layerprune.scoring.metrics.ablation import importance_of
from layerprune.scoring.racing import Race

INTACT = Removal(())
TASKS = "local_arc_easy,local_hellaswag,local_piqa"
SIGNALS: tuple[Signal, ...] = ("accuracy", "probability", "blend")
Table = dict[Removal, dict[str, Outcomes]]
Order = tuple[list[np.ndarray], list[list[int]]]  # harms (removals, items) of each task, and its blocks' edges


def main() -> None:
    options = parser(__doc__ or "", items=200).parse_args()
    with quiet_libraries(True):
        loaded = LoadedModel.load(options.model, dtype=options.dtype)
        eval_set = load_eval_set(
            options.tasks.split(","), loaded.encoder, use="selection", include_path=[options.eval / "tasks"],
            limit=options.items,
        )  # fmt: skip
        evaluator = CachedEvaluator(Engine(loaded), eval_set, PlainProgress(sys.stderr), options.output)
        table = evaluator.outcomes([INTACT, *(Removal.of(layer) for layer in range(len(loaded.layers)))])
    print("| items a task | signal | to go | times fewer item evaluations | same set |\n|---|---|---|---|---|")
    for items in (options.items, options.items // 2, options.items // 4):
        for signal in SIGNALS:
            orders = [shuffled(table, eval_set.data(), items, signal, seed) for seed in range(options.seeds)]
            for keep in (1, 4, 8):
                spared, same = raced(orders, keep)
                print(f"| {items} | {signal} | {keep} | {spared:.1f} | {same} of {options.seeds} |", flush=True)


def parser(doc: str, *, items: int) -> argparse.ArgumentParser:
    """Return what benchmarks of searches over drawn orders of items are asked."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    made.add_argument("eval", type=Path)
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("--tasks", default=TASKS)
    made.add_argument("--items", type=int, default=items, help="of each task")
    made.add_argument("--seeds", type=int, default=20)
    made.add_argument("--dtype", default="bfloat16")
    return made


def raced(orders: Sequence[Order], keep: int) -> tuple[float, int]:
    """Return (exhaustive over spent item evaluations, how often the set was that of all the items)."""
    spent = every = same = 0
    for harms, cuts in orders:
        items, looks = tuple(own.shape[1] for own in harms), len(cuts[0]) - 1
        race = Race(len(harms[0]), items, keep, looks)
        for look in range(looks):
            spent += len(race.running) * sum(edges[look + 1] - edges[look] for edges in cuts)
            race.settle([own[race.running, : edges[look + 1]] for own, edges in zip(harms, cuts, strict=True)])
            if not race.running:
                break
        means = np.concatenate(harms, axis=1).mean(axis=1)
        rest = sorted(race.running, key=lambda number: means[number])
        won = {*race.accepted, *rest[: keep - len(race.accepted)]}
        every += len(means) * sum(items)
        same += won == set(np.argsort(means, kind="stable")[:keep].tolist())
    return every / spent, same


def shuffled(table: Table, data: Sequence[TaskData], items: int, signal: Signal, seed: int) -> Order:
    """Return, by task, (removals, items) harms in a drawn order, and where blocks begin and end."""
    drawn = random.Random(seed)
    orders = {
        name: drawn.sample(range(len(own.correct)), min(items, len(own.correct))) for name, own in table[INTACT].items()
    }
    mixed = {
        removal: {name: reordered(own, orders[name]) for name, own in outcomes.items()}
        for removal, outcomes in table.items()
    }
    harm = importance_of(BaseOutcomes.of(data, mixed[INTACT], signal, MEAN))
    found = [harm(own) for removal, own in mixed.items() if removal != INTACT]
    blocks = -(-max(map(len, orders.values())) // BLOCK_ITEMS)
    cuts = [block_edges(len(order), blocks) for order in orders.values()]
    return [np.stack([own[name] for own in found]) for name in orders], cuts


def reordered(outcomes: Outcomes, order: Sequence[int]) -> Outcomes:
    known = outcomes.gold_probability
    return Outcomes(
        correct="".join(outcomes.correct[item] for item in order),
        gold_probability=None if known is None else tuple(known[item] for item in order),
    )


if __name__ == "__main__":
    main()
