"""Which metric and which search choose layers well: accuracy that is left on items no choice has seen, in one table.

    python benchmarks/selection.py MODEL EVAL -o FOLDER [--dtype bfloat16] [--items 300] [--audit 1000]
        [--entries ablation/greedy cosine/one-shot ...] [--equal ablation/exchange ...] [--draws 5]
        [--reference ablation/greedy] [--skip 1000]

MODEL is a local folder, EVAL a folder with lm-eval task YAMLs in ``tasks/``. An entry is METRIC/SEARCH, both as the
command line takes them, with @N behind where it is to see N items of each task instead of --items. Every entry chooses
3, 6, 8 and 15 layers (--counts) on selection items (the training split); all of its choices answer the same --audit
items a task of the evaluation split, with the layers bypassed in memory; --skip passes over the first of them, which
a choice between these entries has been made on. --equal entries spend what greedy by the same
metric spends on --items: a search that asks about three times as many removals gets a third of the items. Tasks on
which the intact model is not above chance, on either split, are left out and named.

Everything goes through journals in FOLDER: killed, the same command goes on; with more entries it measures those alone.
Prints, and writes to FOLDER/table.md: what each search spent; accuracy left, its difference from the intact model, and
how far each --reference lies above the entry, all with 95 % paired intervals (not corrected for their number). Item
evaluations are removals times items that were answered; a metric that proposes reads the same items once more.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from layerprune.analysis.measurements import answers_of, difference, mean_accuracy
from layerprune.artifacts import Candidate
from layerprune.cli.command import quiet_libraries
from layerprune.cli.console import PlainProgress, duration
from layerprune.data.items import EvalSet
from layerprune.data.tasks import load_eval_set
from layerprune.formatting import accuracy, points, points_interval
from layerprune.models.model import LoadedModel
from layerprune.planner.search_runner import SearchRunner
from layerprune.registry import build
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.engine import Engine
from layerprune.scoring.metrics.base import Data
from layerprune.search import SEARCHES, Constraints, OneShot, Others, SearchResult
from layerprune.stats import above_chance

INTACT = Removal(())
TASKS = "local_arc_easy,local_hellaswag,local_piqa,local_openbookqa,local_arc_challenge,local_winogrande"
ENTRIES = (
    "ablation/greedy", "ablation:signal=blend/greedy", "ablation:signal=probability/greedy", "ablation/one-shot",
    "ablation:signal=blend/one-shot", "ablation:signal=probability/one-shot", "ablation:signal=margin/one-shot",
    "cosine/one-shot", "perplexity/one-shot", "perplexity/greedy", "output/one-shot", "angular/blocks",
    "taylor/one-shot", "magnitude/one-shot", "relative/one-shot", "reverse-order/one-shot", "random/one-shot",
)  # fmt: skip
EQUAL = ("ablation/exchange",)
SIGNIFICANT = 0.05


def main() -> None:
    options = arguments()
    with quiet_libraries(True):
        text = report(Bench(options, PlainProgress(sys.stderr)))
    print(text)
    (options.output / "table.md").write_text(text + "\n")


def report(bench: Bench) -> str:
    """Choose, audit, and return the tables."""
    options = bench.options
    choices, spent = {}, []
    for entry in dict.fromkeys([*options.entries, *options.equal]):
        choices[entry], lines = chosen(bench, entry, equal=entry in options.equal)
        spent += lines
    answers = bench.audited({r for found in choices.values() for drawn in found.values() for r in drawn})
    return "\n\n".join([heading(bench), budget_table(spent), accuracy_table(bench, choices, answers)])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("eval", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--entries", nargs="*", default=list(ENTRIES), metavar="METRIC/SEARCH[@N]")
    parser.add_argument("--equal", nargs="*", default=list(EQUAL), metavar="METRIC/SEARCH")
    parser.add_argument("--reference", nargs="+", default=["ablation/greedy"], metavar="METRIC/SEARCH")
    parser.add_argument("--counts", type=lambda text: [int(part) for part in text.split(",")], default=[3, 6, 8, 15])
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=TASKS.split(","))
    parser.add_argument("--items", type=int, default=300, help="selection items of each task")
    parser.add_argument("--audit", type=int, default=1000, help="evaluation items of each task")
    parser.add_argument("--skip", type=int, default=0, help="evaluation items of each task passed over: seen before")
    parser.add_argument("--draws", type=int, default=5, help="of the random baseline: one draw says little")
    parser.add_argument("--no-racing", dest="racing", action="store_false")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for reference in options.reference:
        if reference not in (*options.entries, *options.equal):
            parser.error(f"--reference {reference} is not among the entries")
    return options


@dataclass
class Bench:
    """The model, the items of both sides, and what has been asked of them."""

    options: argparse.Namespace
    progress: PlainProgress
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loaded = LoadedModel.load(self.options.model, dtype=self.options.dtype, device=self.options.device)
        self.engine = Engine(self.loaded)
        self.scorers: dict[int, SearchRunner] = {}

    def load(self, tasks: Sequence[str], use: Any, limit: int | None, seen: frozenset[str] = frozenset()) -> EvalSet:
        return load_eval_set(
            tasks, self.loaded.encoder, use=use, include_path=[self.options.eval / "tasks"], limit=limit,
            seed=self.options.seed, exclude=seen,
        )  # fmt: skip

    @cached_property
    def pool(self) -> EvalSet:
        """Every item that a choice could look at; the audit looks at none of them."""
        return self.load(self.options.tasks, "selection", None)

    @cached_property
    def audits(self) -> dict[str, CachedEvaluator]:
        """One examiner a task that counts: the intact model is above chance on its items of either side."""
        seen = frozenset(item.fingerprint for task in self.pool.tasks.values() for item in task.items)
        kept = {}
        for name in self.pool.tasks:
            skip = self.options.skip
            asked = self.load([name], "evaluation", skip + self.options.audit, seen).tasks[name]
            fresh = EvalSet({name: replace(asked, items=asked.items[skip:])})
            audit = self._examiner("audit", fresh)
            selection = self._examiner("selection", self.load([name], "selection", self.options.items))
            if self._is_above_chance(audit, "audit") and self._is_above_chance(selection, "selection"):
                kept[name] = audit
        if not kept:
            sys.exit(f"the intact model is at chance on every task: {'; '.join(self.left_out)}")
        return kept

    def _examiner(self, side: str, eval_set: EvalSet) -> CachedEvaluator:
        return CachedEvaluator(
            self.engine, eval_set, self.progress, self.options.output / side / "_".join(eval_set.tasks)
        )

    def _is_above_chance(self, evaluator: CachedEvaluator, side: str) -> bool:
        [(name, task)] = evaluator.eval_set.tasks.items()
        own = evaluator.outcomes([INTACT], f"intact on {name}, {side}")[INTACT][name]
        chances = [item.chance for item in task.items]
        p_value = above_chance(own.correct, chances)
        if p_value > SIGNIFICANT:
            seen = f"{own.accuracy:.3f} on {len(chances)} {side} items, chance {sum(chances) / len(chances):.3f}"
            self.left_out.append(f"{name} ({seen}, p = {p_value:.2g})")
        return p_value <= SIGNIFICANT

    @cached_property
    def constraints(self) -> Constraints:
        architecture = self.loaded.architecture
        return Constraints(
            architecture.depth, must_keep=architecture.must_keep, together=architecture.together,
            check=architecture.check,
        )  # fmt: skip

    def scorer(self, items: int) -> SearchRunner:
        """Return what chooses on so many items of each task."""
        if items not in self.scorers:
            folder = self.options.output / "selection" / str(items)
            eval_set = self.load(list(self.audits), "selection", items)
            evaluator = CachedEvaluator(self.engine, eval_set, self.progress, folder)
            data = Data(eval_set=eval_set, evaluator=evaluator, seed=self.options.seed, progress=self.progress)
            self.scorers[items] = SearchRunner(self.loaded, data, folder)
        return self.scorers[items]

    def audited(self, removals: set[Removal]) -> dict[Removal, dict[str, Any]]:
        """Answer the audit items under every removal, all of a task in one go: what is shared is computed once."""
        ordered = [INTACT, *sorted(removals, key=lambda removal: removal.layers)]
        found: dict[Removal, dict[str, Any]] = {removal: {} for removal in ordered}
        for name, evaluator in self.audits.items():
            for removal, outcomes in evaluator.outcomes(ordered, f"audit of {len(ordered)} removals, {name}").items():
                found[removal] |= outcomes
        return found


@dataclass(frozen=True)
class Spent:
    """What one choice cost."""

    entry: str
    count: int
    items: int  # selection items of each task
    removals: int
    evaluations: int  # removals x items that were really answered
    seconds: float  # of this run: what a journal knew costs none
    removal: Removal


def chosen(bench: Bench, entry: str, equal: bool) -> tuple[dict[int, list[Removal]], list[Spent]]:
    """Let an entry choose every count of layers; return the removals (several for the random baseline)."""
    metric, search, own = parts(entry)
    racing, first = bench.options.racing, bench.options.seed
    found: dict[int, list[Removal]] = {}
    spent = []
    for count in bench.options.counts:
        items = equal_items(bench, search, count) if equal else own or bench.options.items
        scorer = bench.scorer(items)
        start = time.perf_counter()
        draws = [
            scorer.find(metric, search, bench.constraints, count, seed=seed, racing=racing)
            for seed in range(first, first + (bench.options.draws if metric == "random" else 1))
        ]
        found[count] = [one.removal for one in draws]
        removals, evaluations = asked(draws[0], len(scorer.data.eval_set or ()))
        spent.append(Spent(entry, count, items, removals, evaluations, time.perf_counter() - start, found[count][0]))
        bench.progress.note(f"{entry}, {count} layers on {items} items a task: {', '.join(map(str, found[count]))}")
    return found, spent


def parts(entry: str) -> tuple[str, str, int | None]:
    """Return metric, search and, where the entry says so, the items of each task that it sees."""
    metric, _, rest = entry.partition("/")
    search, _, items = rest.partition("@")
    return metric, search, int(items) if items else None


def asked(found: SearchResult, items: int) -> tuple[int, int]:
    """Return how many removals a search looked at, and how many item evaluations that took (racing stops some)."""
    seen: dict[tuple[int, ...], int] = {}  # one that ran in several races has answered what the longest asked
    for candidate in (one for entry in found.rounds for one in entry.candidates):
        answered = sum(task.items for task in candidate.tasks.values())
        seen[candidate.removal] = max(seen.get(candidate.removal, 0), answered)
    return len(seen), sum(seen.values()) if any(seen.values()) else len(seen) * items


def equal_items(bench: Bench, search: str, count: int) -> int:
    """Return the items of each task on which ``search`` spends what greedy spends on --items of them."""
    share = calls("greedy", bench.constraints, count) / calls(search, bench.constraints, count)
    most = max(len(task.items) for name, task in bench.pool.tasks.items() if name in bench.audits)
    return max(10, min(most, round(bench.options.items * share)))


def calls(search: str, constraints: Constraints, count: int) -> int:
    """Return how many removals a search asks about, found by letting it search among random scores."""
    _, look = build(SEARCHES, search)

    def judge(removals: Sequence[Removal]) -> list[Candidate]:
        return [Candidate(removal=r.layers, score=random.Random(str(r)).random()) for r in removals]

    others = Others(lambda _, within, drop: OneShot().find(judge, within, drop), lambda _: judge)
    return asked(look.find(judge, constraints, count, others=others), 1)[0]


def heading(bench: Bench) -> str:
    options, data = bench.options, [one for e in bench.audits.values() for one in e.eval_set.data()]
    tasks = "; ".join(f"{one.task} {one.items} items of {one.split}" for one in data)
    lines = [
        f"{Path(options.model).name}, {options.dtype}, seed {options.seed}; chosen on {options.items} selection items "
        f"a task unless said otherwise, audited on {tasks}.",
        f"Left out, the intact model is not above chance: {'; '.join(bench.left_out) or 'none'}.",
    ]
    return "\n".join(lines)


def budget_table(spent: Sequence[Spent]) -> str:
    rows = ["| entry | layers | items a task | removals asked | item evaluations | seconds this run | removal |",
            "|---|---|---|---|---|---|---|"]  # fmt: skip
    rows += [
        f"| {s.entry} | {s.count} | {s.items} | {s.removals} | {s.evaluations:,} | {duration(s.seconds)} "
        f"| {s.removal} |"
        for s in spent
    ]
    return "\n".join(rows)


def accuracy_table(bench: Bench, choices: dict[str, dict[int, list[Removal]]], outcomes: dict[Removal, Any]) -> str:
    """Return one row an entry; for each count accuracy, difference from intact, and every reference minus the entry."""
    counts, references = bench.options.counts, bench.options.reference
    intact = answers_of([outcomes[INTACT]])
    answers = {e: {c: answers_of([outcomes[r] for r in found[c]]) for c in counts} for e, found in choices.items()}
    names = ["entry"]
    for count in counts:
        names += [f"{count} gone: accuracy", "against intact", *(f"{one} above it by" for one in references)]
    rows = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    rows.append(f"| intact | {' | '.join([accuracy(mean_accuracy(intact)), *[''] * (len(names) - 2)])} |")
    for entry in choices:
        cells = [entry]
        for count in counts:
            own = answers[entry][count]
            cells += [accuracy(mean_accuracy(own)), _said(difference(intact, own))]
            for ref in references:
                same = choices[ref][count] == choices[entry][count]
                found = "the same layers" if same else _said(difference(own, answers[ref][count]))
                cells.append("" if ref == entry else found)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _said(found: tuple[float, tuple[float, float]]) -> str:
    return f"{points(found[0])} ({points_interval(found[1])})"


if __name__ == "__main__":
    main()
