"""How often a race ends with other layers than all the items would choose: made answers, judged and raced as real ones.

    python benchmarks/race_worlds.py [--races 200] [--worlds NAME ...]

No model: the answers of the intact model and of every candidate are drawn (a lead of the gold answer for each item,
from which accuracy, probability and margin follow), put where a ``CachedEvaluator`` keeps what it has measured, and
scored by ``ablation`` twice, raced and on all items; one-shot search chooses by either. Prints for each world in how
many races the two choices differ, and the share of the item evaluations that the races took. The aim is 5 % of races
at most.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from layerprune.artifacts import MEAN, Candidate, Objective, Outcomes
from layerprune.data.items import EvalItem, EvalSet, EvalTask
from layerprune.removal import Removal
from layerprune.scoring.aggregation import Signal, additive
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.metrics.ablation import Ablation
from layerprune.scoring.metrics.base import Data
from layerprune.search import Constraints, OneShot

LAYERS = 28
Floats = np.ndarray
Noise = Callable[[np.random.Generator, tuple[int, ...]], Floats]


def normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    return rng.normal(size=shape)


def student(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Student's t with 3 degrees of freedom: finite variance, no fourth moment."""
    return rng.standard_t(3, size=shape) / math.sqrt(3)


def student_2(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Student's t with 2 degrees of freedom: no variance at all."""
    return rng.standard_t(2, size=shape) / 2


def rare_losses(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Three items in a thousand lose 150 times as much as the others vary, or more."""
    lost = np.where(rng.random(shape) < 0.003, 50.0 * rng.exponential(size=shape), 0.0)
    return 0.3 * rng.normal(size=shape) - lost


def contaminated(rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """One item in a hundred is 15 times as wide as the others."""
    return rng.normal(size=shape) * np.where(rng.random(shape) < 0.01, 15.0, 1.0)


@dataclass(frozen=True)
class Task:
    """What the intact model does on a task, and the range of what it does without a layer."""

    items: int
    base: float  # accuracy
    chance: float
    least: float  # the lowest accuracy that a removal leaves; the highest is the base's, and a little more


@dataclass(frozen=True)
class World:
    """Tasks, a way to judge, and how far the answers without a layer are from the intact model's."""

    tasks: tuple[Task, ...]
    keep: int = 6
    signal: Signal = "accuracy"
    objective: Objective = MEAN
    spread: float = 0.5  # of a removal's own noise, against 1 of the items' difficulty
    difficulty: Noise = normal
    own: Noise = normal
    pair: bool = False  # only two candidates matter: one falls far below chance on one task and is good on the other


TWO = (Task(1000, 0.33, 0.25, 0.10), Task(1000, 0.60, 0.25, 0.30))
THREE = (Task(1000, 0.45, 0.25, 0.20), Task(400, 0.70, 0.50, 0.40), Task(60, 0.60, 0.25, 0.20))
SHORT = (Task(400, 0.50, 0.25, 0.20), Task(30, 0.70, 0.25, 0.20))
ALIKE = (Task(1000, 0.33, 0.25, 0.29), Task(1000, 0.60, 0.25, 0.54))
TINY = (Task(100, 0.60, 0.25, 0.20), Task(100, 0.80, 0.50, 0.40))

WORLDS: dict[str, World] = {
    "two tasks": World(TWO),
    "two tasks, one to go": World(TWO, keep=1),
    "made pair": World(TWO, keep=1, pair=True),
    "two tasks, nearly alike": World(ALIKE, spread=0.3),
    "three tasks of unequal size": World(THREE),
    "a task of 30 items": World(SHORT),
    "small tasks": World(TINY),
    "worst task": World(TWO, objective=Objective(name="worst")),
    "weights 5 and 1": World(TWO, objective=Objective(name="weighted", weights={"a": 5.0})),
    "probability": World(TWO, signal="probability"),
    "blend": World(THREE, signal="blend"),
    "margin": World(TWO, signal="margin"),
    "margin, t3 difficulty and noise": World(TWO, signal="margin", difficulty=student, own=student),
    "margin, t3, nearly alike": World(ALIKE, signal="margin", spread=1.0, difficulty=student, own=student),
    "margin, t3, three tasks": World(THREE, signal="margin", spread=1.0, difficulty=student, own=student),
    "margin, contaminated": World(TWO, signal="margin", spread=1.0, own=contaminated),
    "margin, contaminated, nearly alike": World(ALIKE, signal="margin", spread=1.0, own=contaminated),
    "margin, contaminated, three tasks": World(THREE, signal="margin", spread=1.0, own=contaminated),
    "margin, contaminated, small tasks": World(TINY, signal="margin", spread=1.0, own=contaminated),
    "margin, t2, one to go": World(TWO, keep=1, signal="margin", own=student_2),
    "margin, t2, three tasks": World(THREE, signal="margin", own=student_2),
    "margin, rare losses, one to go": World(TWO, keep=1, signal="margin", spread=0.3, own=rare_losses),
    "margin, rare losses, three tasks": World(THREE, signal="margin", own=rare_losses),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--races", type=int, default=200, help="of each world")
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), metavar="NAME", choices=list(WORLDS))
    options = parser.parse_args()
    print("| world | wrong ends | item evaluations |\n|---|---|---|")
    for name in options.worlds:
        wrong, spent = races(WORLDS[name], range(options.races))
        print(f"| {name} | {wrong} of {options.races} | {100 * spent:.0f} % |", flush=True)


def races(world: World, seeds: Sequence[int]) -> tuple[int, float]:
    """Return how many races end with other layers than all the items choose, and the share of the items they took."""
    wrong, spent = 0, 0.0
    for seed in seeds:
        data = made(world, np.random.default_rng(seed))
        raced, whole = (chosen(world, data, keep) for keep in (world.keep, None))
        wrong += raced.removal != whole.removal
        seen = [task.items for one in raced.rounds[0].candidates for task in one.tasks.values()]
        spent += sum(seen) / (LAYERS * sum(task.items for task in world.tasks))
    return wrong, spent / len(seeds)


def chosen(world: World, data: Data, keep: int | None) -> Any:
    """Return what one-shot search finds: ``keep`` for a race, as planning has it, None for all items."""
    asked = Data(data.eval_set, data.evaluator, world.objective, keep if additive(world.objective) else None)
    metric = Ablation(world.signal)

    def judge(removals: Sequence[Removal]) -> list[Candidate]:
        return metric.score(None, removals, asked)  # type: ignore[arg-type]  # no model: all is measured already

    return OneShot().find(judge, Constraints(LAYERS), world.keep)


def made(world: World, rng: np.random.Generator) -> Data:
    """Draw a world's answers and put them where an examiner keeps what it has measured."""
    names = [chr(ord("a") + number) for number in range(len(world.tasks))]
    leads = {name: _leads(world, number, rng) for number, name in enumerate(names)}  # (1 + layers, items)
    eval_set = EvalSet({name: _questions(name, task) for name, task in zip(names, world.tasks, strict=True)})
    evaluator = CachedEvaluator(SimpleNamespace(), eval_set)  # type: ignore[arg-type]
    removals = [Removal(()), *(Removal.of(layer) for layer in range(LAYERS))]
    place = dict.fromkeys(names, 0)
    for block, part in enumerate(evaluator.blocks):
        slices = {name: slice(place[name], place[name] + len(task.items)) for name, task in part.tasks.items()}
        place |= {name: taken.stop for name, taken in slices.items()}
        for number, removal in enumerate(removals):
            evaluator.known[block, removal] = {
                name: _outcomes(leads[name][number, taken], world.signal) for name, taken in slices.items()
            }
    return Data(eval_set, evaluator)


def _questions(name: str, task: Task) -> EvalTask:
    items = tuple(EvalItem(str(number), task.chance, ()) for number in range(task.items))
    return EvalTask(name, "made", "acc", 0, items, judge=None)  # type: ignore[arg-type]


def _outcomes(lead: Floats, signal: Signal) -> Outcomes:
    return Outcomes(
        correct="".join("1" if value > 0 else "0" for value in lead),
        gold_probability=tuple((1 / (1 + np.exp(-np.clip(lead, -30, 30)))).round(5).tolist())
        if signal in ("probability", "blend")
        else None,
        margin=tuple(lead.round(4).tolist()) if signal == "margin" else None,
    )


def _leads(world: World, number: int, rng: np.random.Generator) -> Floats:
    """Return the gold answers' leads, (1 + layers, items): the intact model's first, then without each layer."""
    task = world.tasks[number]
    wanted = rng.uniform(task.least, task.base + 0.01, LAYERS)
    if world.pair:  # the first loses all of one task and little of the other, the second something of both
        wanted[:] = (0.02, 0.30)[number]
        wanted[:2] = ((0.12, 0.24), (0.60, 0.54))[number]
    difficulty = world.difficulty(rng, (task.items,))
    own = world.spread * world.own(rng, (LAYERS, task.items))
    lead = np.concatenate([difficulty[None], difficulty + own])
    drawn = world.difficulty(rng, (20_000,))  # for the shifts that give the accuracies wanted
    with_noise = np.sort(drawn + world.spread * world.own(rng, (20_000,)))
    shifts = [np.quantile(drawn, 1 - task.base), *(np.quantile(with_noise, 1 - share) for share in wanted)]
    return lead - np.array(shifts)[:, None]


if __name__ == "__main__":
    main()
