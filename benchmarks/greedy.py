"""What greedy removal of several layers costs, plain, lazy and raced, against the naive loop, and what each removes.

    python benchmarks/greedy.py MODEL EVAL -o FOLDER [--items 160] [--seeds 20] [--drop 8] [--judge 500]

MODEL is a local folder, EVAL a folder with lm-eval task YAMLs in ``tasks/``. The items are of the tasks' evaluation
splits, for lm-eval to be timed on the same ones. In this order:

1. Lazy greedy under a race is run and timed, and lm-eval on two physically pruned models, the first and the last of the
   naive loop's path there, its batch size the fastest of three, model and task loading not counted: once before and
   once after. The naive loop is one such evaluation per candidate of each round; that is scaled.
2. Plain greedy is run on all items (the journal in FOLDER keeps what was answered: killed, the same command goes on).
3. --seeds orders of the items are drawn, and every search is run on each, from the answers known; what a race did not
   ask is not counted.
4. What the searches removed is compared on --judge items a task of the selection splits, which no search has seen.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ablation import Harness
from layerprune.artifacts import Outcomes
from layerprune.cli.command import quiet_libraries
from layerprune.cli.console import PlainProgress
from layerprune.data.items import EvalSet
from layerprune.data.tasks import load_eval_set
from layerprune.exporter import export
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.engine import Engine
from layerprune.scoring.metrics.ablation import Ablation
from layerprune.scoring.metrics.base import Data
from layerprune.search import Constraints, Greedy, SearchResult
from layerprune.stats import paired_interval
from racing import parser

SEARCHES = {
    "plain, all items": (Greedy(), None), "plain, raced": (Greedy(), 1),
    "lazy, all items": (Greedy(lazy=True), None), "lazy, raced": (Greedy(lazy=True), 1),
}  # fmt: skip
RACED = "lazy, raced"


def main() -> None:
    options = arguments()
    with quiet_libraries(True):
        loaded = LoadedModel.load(options.model, dtype=options.dtype)
        eval_set = load(loaded, options, "evaluation", options.items)
        timed(loaded, eval_set, options)
        table = Table(CachedEvaluator(Engine(loaded), eval_set, PlainProgress(sys.stderr), options.output))
        plain = searched(loaded, Replayed.of(table, eval_set, None), *SEARCHES["plain, all items"], options.drop)
        print(f"\nplain greedy on all {len(eval_set)} items: {plain.removal}, in the order {plain.order}", flush=True)
        sets = replayed(loaded, table, eval_set, plain, options)
        judged(loaded, options, plain, sets)


def arguments() -> argparse.Namespace:
    made = parser(__doc__ or "", items=160)
    made.add_argument("--drop", type=int, default=8)
    made.add_argument("--judge", type=int, default=500, help="items of each task that compare what was removed")
    return made.parse_args()


def load(loaded: LoadedModel, options: argparse.Namespace, use: Any, items: int) -> EvalSet:
    names = options.tasks.split(",")
    return load_eval_set(names, loaded.encoder, use=use, include_path=[options.eval / "tasks"], limit=items)


def timed(loaded: LoadedModel, eval_set: EvalSet, options: argparse.Namespace) -> None:
    """Time one raced lazy search and lm-eval on two pruned models, and print what the naive loop would take."""
    asked = (Path(options.model).name, options.tasks, options.items, options.drop, options.dtype)
    done = options.output / f"timed-{'-'.join(map(str, asked))}.txt"
    if not done.is_file():
        before = pruned_seconds(loaded, eval_set, options, (0,))
        start = time.perf_counter()
        evaluator = CachedEvaluator(Engine(loaded), eval_set, PlainProgress(sys.stderr))
        found = searched(loaded, evaluator, *SEARCHES[RACED], options.drop)
        seconds = time.perf_counter() - start
        after = pruned_seconds(loaded, eval_set, options, found.removal.layers)
        depth = len(loaded.layers)
        candidates = sum(depth - gone for gone in range(options.drop))
        naive = (before + after) / 2 * candidates
        judged = sum(len(entry.candidates) for entry in found.rounds)
        done.parent.mkdir(parents=True, exist_ok=True)
        account = evaluator.account
        done.write_text(
            f"{RACED}: {found.removal} in {seconds:.0f} s with its self-test, {judged} candidates of {candidates}, "
            f"{account.naive / account.computed:.2f} times fewer tokens x layers than these would take one by one; "
            f"lm-eval {before:.1f} s without layer 0 and {after:.1f} s without {found.removal}, so the naive loop "
            f"{naive:.0f} s: {naive / seconds:.1f} times as long\n"
        )
    print(done.read_text(), flush=True)


def pruned_seconds(
    loaded: LoadedModel, eval_set: EvalSet, options: argparse.Namespace, units: Sequence[int | float]
) -> float:
    """Return what lm-eval takes for all the items on a model that was exported without the layers."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
    from families import make_plan

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "pruned"
        export(make_plan(Path(options.model), Removal.from_layers(tuple(units))), out)
        model = AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, options.dtype)).eval()
        seconds = 0.0
        for name, task in eval_set.tasks.items():
            harness = Harness(loaded, options, name, 0, [item.key[0].doc for item in task.items])
            harness.tune(model)
            seconds += harness.run(model)[0]
        shutil.rmtree(out)
    return seconds


@dataclass
class Table:
    """Answers every removal on all the items, once."""

    evaluator: CachedEvaluator

    def __call__(self, removals: Sequence[Removal]) -> dict[Removal, dict[str, Outcomes]]:
        return self.evaluator.outcomes(removals, f"{len(removals)} candidates")


@dataclass
class Replayed(CachedEvaluator):
    """The examiner on the items in an order of its own, its answers looked up; counts item evaluations."""

    table: Table = None  # type: ignore[assignment]
    places: dict[str, list[int]] = field(default_factory=dict)  # of each task's items in the table
    spent: int = 0

    @classmethod
    def of(cls, table: Table, eval_set: EvalSet, seed: int | None) -> Replayed:
        """Return it with the items shuffled, or as they are."""
        places = {name: list(range(len(task.items))) for name, task in eval_set.tasks.items()}
        if seed is not None:
            drawn = random.Random(seed)
            for own in places.values():
                drawn.shuffle(own)
        mixed = {
            name: replace(task, items=tuple(task.items[place] for place in places[name]))
            for name, task in eval_set.tasks.items()
        }
        return cls(table.evaluator.engine, EvalSet(mixed), table=table, places=places)

    def measure(self, block: int, removals: Sequence[Removal], advance: Any = None) -> None:
        self.spent += len(removals) * len(self.blocks[block])
        whole = self.table(removals)
        pieces = [
            {name: chosen(whole[removal][name], self._places(name, block)) for name in self.blocks[block].tasks}
            for removal in removals
        ]
        self._take({
            "block": block, "removals": [list(removal.layers) for removal in removals], "path": "table",
            "pieces": [{name: own.model_dump(mode="json") for name, own in piece.items()} for piece in pieces],
            "computed": 0, "naive": 0,
        })  # fmt: skip

    def _places(self, name: str, block: int) -> list[int]:
        start = sum(len(earlier.tasks[name].items) for earlier in self.blocks[:block] if name in earlier.tasks)
        return self.places[name][start : start + len(self.blocks[block].tasks[name].items)]


def chosen(outcomes: Outcomes, places: Sequence[int]) -> Outcomes:
    def some(values: Any) -> Any:
        return None if values is None else tuple(values[place] for place in places)

    return Outcomes(
        correct="".join(outcomes.correct[place] for place in places),
        gold_probability=some(outcomes.gold_probability), margin=some(outcomes.margin),
    )  # fmt: skip


def searched(
    loaded: LoadedModel, evaluator: CachedEvaluator, search: Greedy, keep: int | None, drop: int
) -> SearchResult:
    data = Data(evaluator.eval_set, evaluator, keep=keep)
    metric = Ablation()
    return search.find(lambda removals: metric.score(loaded, removals, data), Constraints(len(loaded.layers)), drop)


def replayed(
    loaded: LoadedModel, table: Table, eval_set: EvalSet, plain: SearchResult, options: argparse.Namespace
) -> dict[Removal, str]:
    """Print what every search spent over the drawn orders; return the sets that some search ended with, and which."""
    depth, drop = len(loaded.layers), options.drop
    naive = len(eval_set) * sum(depth - gone for gone in range(drop))
    print(f"\nthe naive loop: {naive} item evaluations\n")
    print("| search | item evaluations, mean | times fewer than naive | plain greedy's set |\n|---|---|---|---|")
    sets: dict[Removal, str] = {}
    for name, (search, keep) in SEARCHES.items():
        spent, same = list[int](), 0
        for seed in range(options.seeds if keep else 1):  # on all the items the order changes nothing
            evaluator = Replayed.of(table, eval_set, seed)
            found = searched(loaded, evaluator, search, keep, drop)
            spent.append(evaluator.spent - len(eval_set))  # the intact model is not the naive loop's, either
            print(f"{name}, order {seed}: {spent[-1]} evaluations, {found.removal}", file=sys.stderr, flush=True)
            same += found.removal == plain.removal
            sets.setdefault(found.removal, f"{name}, order {seed}")
        mean = sum(spent) / len(spent)
        print(f"| {name} | {mean:.0f} | {naive / mean:.1f} | {same} of {len(spent)} |", flush=True)
    return sets


def judged(loaded: LoadedModel, options: argparse.Namespace, plain: SearchResult, sets: dict[Removal, str]) -> None:
    """Compare every set with plain greedy's on items that no search has seen."""
    eval_set = load(loaded, options, "selection", options.judge)
    evaluator = CachedEvaluator(Engine(loaded), eval_set, PlainProgress(sys.stderr), options.output / "judged")
    removals = [plain.removal, *(removal for removal in sets if removal != plain.removal)]
    outcomes = evaluator.outcomes([Removal(()), *removals], "unseen items")
    correct = {removal: "".join(own[name].correct for name in eval_set.tasks) for removal, own in outcomes.items()}
    print(f"\n{len(eval_set)} unseen items\n\n| removed | first found by | right | against plain greedy's |")
    print("|---|---|---|---|")
    for removal, right in correct.items():
        low, high = paired_interval(correct[plain.removal], right)
        lead = (right.count("1") - correct[plain.removal].count("1")) / len(right)
        against = f"{lead:+.1%} ({low:+.1%} to {high:+.1%})" if removal != plain.removal else ""
        print(f"| {removal} | {sets.get(removal, 'nothing')} | {right.count('1') / len(right):.1%} | {against} |")


if __name__ == "__main__":
    main()
