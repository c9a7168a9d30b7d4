"""What ablation of every layer costs: layerprune against lm-eval on each physically pruned model, alternating.

    python benchmarks/ablation.py MODEL EVAL [--dtype float32] [--case local_hellaswag:0:100 ...] [--repeats 1]

MODEL is a local folder, EVAL a folder with lm-eval task YAMLs in ``tasks/``, a case TASK:SHOTS:ITEMS. Prints a table:
seconds of both, their ratio, the ratio that counting arithmetic predicts, the share of decisions that agree item by
item, tokens x layers computed over the least possible, and the rates of arithmetic, of the whole and of the layers
alone, beside the machine's own rate for matrix products, measured in the same run. Model and task loading are not
counted on either side; lm-eval's batch size is the fastest of three, tried on the intact model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from layerprune.data.items import Request
from layerprune.data.tasks import load_eval_set
from layerprune.exporter import export
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import as_requests, evaluate
from layerprune.scoring.prefix_tree import tree_size

CASES = ("local_hellaswag:0:100", "local_arc_easy:0:100", "local_arc_easy:5:100")
COLUMNS = ("task", "shots", "items", "path", "layerprune s", "lm-eval s", "ratio", "theory", "of theory", "agree",
           "work/least", "GFLOP/s", "layers' GFLOP/s", "matrix GFLOP/s")  # fmt: skip
PRUNED = 3  # physically pruned models that lm-eval is timed on; the rest is scaled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("eval", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--case", nargs="+", default=list(CASES), metavar="TASK:SHOTS:ITEMS")
    parser.add_argument("--repeats", type=int, default=1, help="of layerprune's run; lm-eval runs on three models")
    options = parser.parse_args()
    loaded = LoadedModel.load(options.model, dtype=options.dtype)
    table = Table(*COLUMNS)
    console = Console(width=180)
    with tempfile.TemporaryDirectory() as folder:
        for case in options.case:
            task, shots, items = case.split(":")
            row = measured(loaded, options, task, int(shots), int(items), Path(folder))
            console.print(task, *row)  # at once: a long run may not come to its end
            table.add_row(task, shots, items, *row)
    console.print(table)


def measured(
    loaded: LoadedModel, options: argparse.Namespace, task: str, shots: int, items: int, folder: Path
) -> list[str]:
    """Time one task, both ways in turn, and return the table's figures."""
    depth = len(loaded.layers)
    eval_set = load_eval_set(
        [task], loaded.encoder, use="evaluation", include_path=[options.eval / "tasks"], limit=items,
        num_fewshot=shots,
    )  # fmt: skip
    requests, groups = as_requests(eval_set.tasks[task].items)
    chosen = [depth * (2 * i + 1) // (2 * PRUNED) for i in range(PRUNED)]
    models = {layer: pruned(options.model, layer, folder, options.dtype) for layer in chosen}
    harness = Harness(loaded, options, task, shots, [item.key[0].doc for item in eval_set.tasks[task].items])
    harness.tune(loaded.model)
    engine = Engine(loaded)
    engine.choose_path(requests, groups)  # once per run, however many removals follow
    removals = [Removal.of(layer) for layer in range(depth)]
    ours, theirs, same = [], [], []
    layers = Stopwatch(engine.path.walk)
    engine.path.walk.base_states = None  # a repeat must not find what the one before has left
    engine.account.computed = engine.path.walk.work.computed = 0
    for number, (layer, model) in enumerate(models.items()):
        if number < options.repeats:
            start = time.perf_counter()
            found = evaluate(engine, eval_set, removals)
            ours.append(time.perf_counter() - start)
        seconds, decisions = harness.run(model)
        theirs.append(seconds)
        own = found[Removal.of(layer)][task].correct
        mine = [own[place] for place in harness.order]
        same += [a == b for a, b in zip(mine, decisions[eval_set.tasks[task].metric], strict=True)]
    seconds, lm_eval = statistics.median(ours), statistics.mean(theirs) * depth
    least, naive, head = flops(loaded, requests, groups)
    rate, machine = least / seconds / 1e9, matrix_rate(loaded) / 1e9
    work = engine.account.computed / len(ours) / (tree_tokens(requests) * (depth - 1 + depth * (depth - 1) // 2))
    layer_rate = (least - head) / (layers.seconds / len(ours)) / 1e9
    return [
        engine.path.name,
        f"{seconds:.1f}", f"{lm_eval:.1f}", f"{lm_eval / seconds:.2f}", f"{naive / least:.2f}",
        f"{lm_eval / seconds / (naive / least):.0%}", f"{sum(same) / len(same):.2%}", f"{work:.3f}",
        f"{rate:.0f} (head {head / least:.0%})", f"{layer_rate:.0f} ({layer_rate / machine:.0%})", f"{machine:.0f}",
    ]  # fmt: skip


class Harness:
    """lm-eval as its users run it, on a model that is in memory, tasks loaded."""

    def __init__(
        self, loaded: LoadedModel, options: argparse.Namespace, task: str, shots: int, docs: list[Any]
    ) -> None:
        self.loaded, self.task, self.batch = loaded, task, 8
        manager = TaskManager(include_path=str(options.eval / "tasks"), include_defaults=False)
        self.loaded: Any = manager.load([task])
        made = self.loaded["tasks"][task]
        made.set_config(key="num_fewshot", value=shots)
        self.made = made
        every = list(made.eval_docs)
        places = [every.index(doc) for doc in docs]
        self.order = sorted(range(len(places)), key=lambda place: places[place])  # lm-eval's order, in ours
        self.chosen = sorted(places)

    def tune(self, model: Any) -> None:
        """Take the fastest of three batch sizes on a fifth of the items."""
        chosen, self.chosen = self.chosen, self.chosen[: max(10, len(self.chosen) // 5)]
        seconds = {}
        for size in (1, 8, 32):
            self.batch = size
            seconds[size] = self.run(model)[0]
        self.batch, self.chosen = min(seconds, key=lambda size: seconds[size]), chosen

    def run(self, model: Any) -> tuple[float, dict[str, str]]:
        """Return seconds, and the decisions per metric."""
        self.made.set_fewshot_seed(seed=1234)
        lm = HFLM(pretrained=model, tokenizer=self.loaded.tokenizer, batch_size=self.batch)
        start = time.perf_counter()
        found = lm_eval.evaluate(lm=lm, task_dict=self.loaded, samples={self.task: self.chosen}, bootstrap_iters=0,
                         log_samples=True)  # fmt: skip
        seconds = time.perf_counter() - start
        samples = sorted(found["samples"][self.task], key=lambda sample: sample["doc_id"])
        return seconds, {m: "".join(str(int(s[m])) for s in samples) for m in ("acc", "acc_norm") if m in samples[0]}


def pruned(model: str, layer: int, folder: Path, dtype: str) -> Any:
    """Export without one layer and load the result as a user would."""
    out = folder / f"without-{layer}"
    if not out.exists():
        import sys

        sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
        from families import make_plan

        export(make_plan(Path(model), Removal.of(layer)), out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, dtype)).eval()


class Stopwatch:
    """Adds up the time a walk spends in the layers, everything but the head."""

    def __init__(self, walk: Any) -> None:
        self.seconds, run = 0.0, walk.hidden

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = run(*args, **kwargs)
            self.seconds += time.perf_counter() - start
            return result

        walk.hidden = timed


def tree_tokens(requests: Sequence[Request]) -> int:
    """Return the nodes of the prefix tree of all requests."""
    return tree_size(request.tokens[:-1] for request in requests)


def lm_eval_tokens(requests: Sequence[Request], groups: Sequence[Sequence[int]]) -> int:
    """Return the tokens that lm-eval computes: every request's, but answers of one token share their question."""
    return sum(
        sum(map(len, {requests[i].tokens[:-1] for i in group}))
        if all(requests[i].scored == 1 for i in group)
        else sum(len(requests[i].tokens) - 1 for i in group)
        for group in groups
    )


def graded(request: Request) -> list[tuple[int, ...]]:
    """Return the prefixes whose next token is graded."""
    first = len(request.tokens) - request.scored
    return [request.tokens[:stop] for stop in range(first, len(request.tokens))]


def flops(
    loaded: LoadedModel, requests: Sequence[Request], groups: Sequence[Sequence[int]]
) -> tuple[float, float, float]:
    """Return FLOPs of every layer's ablation: the least necessary, naive, and the head's part of the least.

    Least: each node of the prefix tree of all requests once in the intact prefix and once per layer above a removed
    one, head at answer positions. Naive: lm-eval's tokens through all but one layer, head at every position, once per
    layer. Two FLOPs per weight and token; attention scores are left out on both sides.
    """
    depth = len(loaded.layers)
    layer = 2 * sum(p.numel() for p in loaded.layers[0].parameters())
    width = loaded.model.get_output_embeddings().weight.shape
    head = 2 * width[0] * width[1]
    answers = sum(len({prefix for i in group for prefix in graded(requests[i])}) for group in groups)
    nodes, tokens = tree_tokens(requests), lm_eval_tokens(requests, groups)
    least_head = depth * answers * head
    least = nodes * layer * (depth - 1 + depth * (depth - 1) / 2) + least_head
    naive = depth * tokens * ((depth - 1) * layer + head)
    return least, naive, least_head


def matrix_rate(loaded: LoadedModel, rows: int = 2048) -> float:
    """Return FLOP/s of this machine on the model's own MLP products, same dtype and device."""
    weight = max(loaded.layers[0].parameters(), key=lambda p: p.numel()).detach()
    x = torch.randn(rows, weight.shape[1], dtype=loaded.dtype, device=loaded.device)

    def product() -> None:
        torch.nn.functional.linear(x, weight)

    return 2 * rows * weight.numel() / best_time(product)


def best_time(work: Callable[[], None], repeats: int = 50) -> float:
    """Return the shortest of many runs: the machine's rate, not its neighbours'."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
