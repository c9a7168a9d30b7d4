"""What each way of healing wins back: accuracy, perplexity, seconds and tokens, method by plan, in one table.

    python benchmarks/healing.py MODEL EVAL -o FOLDER --plans cosine-6=run/plan.json ... --corpus TEXT
        [--methods none rescale linear:fit=map linear lora linear+distill:lr=3e-4 ...] [--items 200] [--windows 32]
        [--dtype bfloat16]

MODEL is a local folder, EVAL a folder with lm-eval task YAMLs in ``tasks/`` and texts in ``text/``. Each plan is
exported and healed once per method; what comes out answers --items items a task of the evaluation split that no plan
has seen, the same for every row, and reads --windows windows of wikitext's test split and of EVAL/text/heldout.jsonl.
``linear+distill`` heals with the first method and then what it wrote with the second; seconds and tokens are of both.
The intact model is the first row. Perplexities are per token. "won back" is the share of the lost nats per token, on
wikitext and on heldout.jsonl.

Every row is a file in FOLDER, written when it is finished: killed, the same command goes on, and other methods or plans
add their rows. Healed checkpoints are removed once measured unless --keep is given. Prints the table, and writes it to
FOLDER/table.md. --seconds stops before a row that would begin later than that.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from layerprune.artifacts import HealLog, Plan
from layerprune.artifacts.base import write_atomically
from layerprune.cli.command import quiet_libraries
from layerprune.cli.console import PlainProgress
from layerprune.data.corpus import Passage, TextDocument, Windows, pack, read_documents
from layerprune.data.tasks import load_eval_set, load_tasks
from layerprune.exporter import export
from layerprune.healing.healer import heal
from layerprune.healing.losses import mean_nats
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import evaluate

INTACT, NONE, BASE = Removal(()), "none", "base"
TASKS = "local_arc_easy,local_hellaswag,local_piqa"  # on which SmolLM2-135M is clearly above chance
METHODS = ("none", "rescale", "linear:fit=map", "linear")
WINDOW = 512


@dataclass
class Bench:
    """Everything rows are measured with, read once."""

    options: argparse.Namespace
    plans: dict[str, Plan]
    progress: Any

    @cached_property
    def wikitext(self) -> list[TextDocument]:
        tasks = load_tasks(["local_wikitext"], [self.options.eval / "tasks"], None)
        (task,) = tasks.values()
        return [TextDocument(text=task.doc_to_target(doc)) for doc in task.eval_docs]

    @cached_property
    def prose(self) -> list[TextDocument]:
        return read_documents(str(self.options.eval / "text" / "heldout.jsonl"))[1]

    def measure(self, folder: str) -> dict[str, Any]:
        """Return accuracies by task, and nats per token on both texts, of one checkpoint."""
        loaded = LoadedModel.load(folder, dtype=self.options.dtype)
        eval_set = load_eval_set(
            self.options.tasks.split(","), loaded.encoder, use="evaluation", limit=self.options.items,
            include_path=[self.options.eval / "tasks"],
            exclude=frozenset().union(*(plan.seen for plan in self.plans.values())),
        )  # fmt: skip
        found = evaluate(Engine(loaded), eval_set, [INTACT], self.progress, f"asking {folder}")[INTACT]
        nats = {name: mean_nats(loaded.model, self.windows(loaded, documents), self.progress, name)
                for name, documents in (("wikitext", self.wikitext), ("prose", self.prose))}  # fmt: skip
        return {
            "accuracy": {name: outcomes.accuracy for name, outcomes in found.items()},
            "probability": {name: outcomes.mean_gold_probability for name, outcomes in found.items()},
            "items": {name: len(outcomes.correct) for name, outcomes in found.items()},
            "nats": nats,
        }

    def windows(self, loaded: LoadedModel, documents: list[TextDocument]) -> Windows:
        head = loaded.encoder.prefix_token_id
        encoded = (loaded.tokenizer(each.text, add_special_tokens=False, verbose=False) for each in documents)
        return pack((Passage.of_text(ids["input_ids"], head) for ids in encoded), WINDOW).spread(self.options.windows)


def main() -> None:
    options = arguments()
    plans = dict(named(text) for text in options.plans)
    options.output.mkdir(parents=True, exist_ok=True)
    with quiet_libraries(True):
        bench = Bench(options, plans, PlainProgress(sys.stderr))
        started = time.monotonic()
        for label, method in [(BASE, NONE), *((label, method) for method in options.methods for label in plans)]:
            if options.seconds is not None and time.monotonic() - started > options.seconds:
                print(f"out of time before {label}, {method}: the same command goes on", file=sys.stderr)
                break
            if not row_file(options.output, label, method).exists():
                measure_row(bench, label, method)
    text = table(list(rows(options.output)), options)
    print(text)
    (options.output / "table.md").write_text(text + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("eval", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--plans", nargs="+", required=True, metavar="LABEL=PLAN")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--keep", action="store_true")
    return parser.parse_args()


def named(text: str) -> tuple[str, Plan]:
    label, _, path = text.partition("=")
    return label, Plan.load(Path(path))


def row_file(folder: Path, label: str, method: str) -> Path:
    name = re.sub(r"[^\w.=-]+", "_", method)
    return folder / "rows" / f"{label}--{name}.json"


def measure_row(bench: Bench, label: str, method: str) -> None:
    """Make one checkpoint, measure it, write its row."""
    options = bench.options
    row: dict[str, Any] = {"plan": label, "method": method}
    if label == BASE:
        row |= bench.measure(options.model)
    else:
        pruned = options.output / label
        if not pruned.exists():
            export(bench.plans[label], pruned, base=options.model)
        folder = pruned if method == NONE else healed(bench, pruned, method, row)
        row |= bench.measure(str(folder))
        if folder is not pruned and not options.keep:
            shutil.rmtree(folder)
    write_atomically(row_file(options.output, label, method), (json.dumps(row, indent=1) + "\n").encode())


def healed(bench: Bench, pruned: Path, method: str, row: dict[str, Any]) -> Path:
    """Heal with each of the methods joined by ``+``, one after the other, and account for them all in the row."""
    folder = pruned
    logs: list[HealLog] = []
    for number, each in enumerate(re.split(r"\+(?=[a-z])", method)):
        before, folder = folder, pruned.with_name(f"{pruned.name}--healed-{number}")
        if folder.exists():
            shutil.rmtree(folder)
        log = heal(before, folder, method=each, progress=bench.progress, **asked(bench.options))
        assert log is not None, "the benchmark runs in one process"
        logs.append(log)
        if before is not pruned:
            shutil.rmtree(before)
    row |= account(logs)
    return folder


def asked(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "corpus": options.corpus, "base": options.model, "tasks": options.tasks,
        "include_path": options.eval / "tasks", "dtype": options.dtype,
    }  # fmt: skip


def account(logs: list[HealLog]) -> dict[str, Any]:
    last = logs[-1]
    return {
        "seconds": sum(log.seconds for log in logs), "tokens": sum(log.tokens for log in logs),
        "changed": len({name for log in logs for name in log.changed}), "found": [log.found for log in logs],
        "curve": [point.model_dump() for point in last.curve],
        "dropped": last.corpus.dropped_documents if last.corpus else 0,
    }  # fmt: skip


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that are there, oldest first within a plan, plans by name."""
    files = sorted((folder / "rows").glob("*.json"), key=lambda file: file.stat().st_mtime)
    found = [json.loads(file.read_text()) for file in files]
    yield from sorted(found, key=lambda row: (row["plan"] != BASE, row["plan"]))


def table(found: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Return the table as Markdown."""
    tasks = options.tasks.split(",")
    base = next((row for row in found if row["plan"] == BASE), None)
    plain = {row["plan"]: row for row in found if row["method"] == NONE}
    names = [name.removeprefix("local_") for name in tasks]
    head = ["plan", "method", *names, "mean", "wikitext ppl", "won back", "prose ppl", "won back", "seconds", "tokens"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for row in found:
        accuracies = [row["accuracy"][task] for task in tasks]
        cells = [row["plan"], row["method"], *(f"{value:.3f}" for value in accuracies)]
        cells += [f"{sum(accuracies) / len(accuracies):.3f}"]
        for name in ("wikitext", "prose"):
            cells += [f"{math.exp(row['nats'][name]):.2f}", won_back(row, plain.get(row["plan"]), base, name)]
        cells += [f"{row['seconds']:.0f}", f"{row['tokens']:,}"] if "seconds" in row else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def won_back(row: dict[str, Any], plain: dict[str, Any] | None, base: dict[str, Any] | None, text: str) -> str:
    if base is None or plain is None or row is plain or row is base:
        return ""
    lost = plain["nats"][text] - base["nats"][text]
    return f"{100 * (plain['nats'][text] - row['nats'][text]) / lost:.0f} %" if lost > 0 else ""


if __name__ == "__main__":
    main()
