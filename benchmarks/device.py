"""How fast the ablation engine is on a device: a random Llama, made-up multiple-choice items, one table.

    python benchmarks/device.py [--shape tiny|small|8b|70b] [--device cuda] [--dtype bfloat16] [--minutes 6] [--json J]

Rows are printed as they are measured, so a run that is killed has shown what it found; a section that the time left is
too short for is skipped with a row. By default the shape is 8b in bfloat16 on a card, small in float32 elsewhere. In
this order:

1. The device's matrix rate: the fastest of several large products in the model's dtype; again before 2 and 4, for the
   share of it that the engine reaches.
2. The removal of every layer on zero-shot items (contexts of 30 to 150 tokens, mostly 4 answers), as the first round of
   a search has it. Time is taken undisturbed. The shares of layers and grading come from a second run that waits for
   the device around both; waits, and memory where the device does not count it, from a third of few items. FLOPs are
   two per weight and token of the layers, padding included, and the head's at graded places; attention's scores are
   left out. Memory is counted beside the weights.
3. lm-eval on the model with a layer bypassed, over the same tokens, its batch size the fastest of three.
4. As 2 on few-shot items: beginnings of 700 tokens, each with 27 questions, as in MMLU.
5. Minutes of a greedy search, by default that of arXiv:2605.14075, from what was measured; how is printed with them.
6. With --offload: the same batches with the layers' weights on disk or in host memory.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from layerprune.cli.command import quiet_libraries
from layerprune.data.items import Request
from layerprune.errors import LayerpruneError
from layerprune.formatting import in_words, parse_size
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring import paths
from layerprune.scoring.engine import KEPT_SHARE, Account, Engine, sample, trial_removals
from layerprune.scoring.memory import LiveBytes
from layerprune.scoring.prefix_tree import tree_size
from layerprune.scoring.walk import BaseStateCache, tensors_in, traffic
from random_model import SHAPES, build, load

PROBE = 4  # items that are measured first, to warm up and to see how many more there is time for
SHARE = 0.15  # of --minutes, for one run of a section
LEAST_RATE = 0.1  # of the matrix rate: what is expected before anything was measured
COUNTED = 12  # items of the run that counts waits and live bytes
SUBJECT, BEGINNING = 27, 700  # questions behind a few-shot beginning (1,531 of 57 subjects), its tokens
SPECIAL = 3  # tokens below have a meaning
EXTRAPOLATED = """
Greedy, extrapolated: of {drop} rounds, one with m layers left asks m candidates. Measured was the first, m = {depth}.
Of its time the layers' share grows with the states carried through them, m (m + 1) / 2 - 1, grading's with m, the rest
not at all; everything with the tokens of the items' prefix trees. Self-tests, and states kept from earlier rounds, are
left out. Lazy in a race: the exact minutes / {factor:g} (--race-factor), as if every item evaluation took the same; few
candidates share less. lm-eval: the time of one removal for each candidate, though later ones have fewer layers.
"""
# What makes the host wait: a number or a size that depends on values, a comparison; and any copy to the host.
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select")


def main() -> None:
    try:
        with quiet_libraries(True), tempfile.TemporaryDirectory() as scratch:
            options = arguments()
            if options.offload and not options.folder:
                options.folder = Path(scratch) / "model"  # both ways load the same weights
            Bench(options).run()
    except LayerpruneError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def arguments() -> argparse.Namespace:
    card = torch.cuda.is_available()
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if card else "cpu")
    made.add_argument("--shape", choices=list(SHAPES), default="8b" if card else "small")
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16" if card else "float32")
    made.add_argument("--minutes", type=float, default=6, help="for all of it, making the model included")
    made.add_argument("--items", type=int, default=256, help="of each kind at most, where there is time for them")
    made.add_argument("--memory", help="what the engine may hold beside the weights, such as 4GB")
    made.add_argument("--tokens", type=int, help="in a batch; default: the engine's own")
    made.add_argument("--drop", type=int, help="layers that greedy search removes; default: a quarter, 8 of 32")
    made.add_argument("--greedy-items", type=int, default=11_400, help="zero-shot items of that search")
    made.add_argument("--mmlu-items", type=int, default=1531, help="few-shot items of that search")
    made.add_argument(
        "--race-factor", type=float, default=4.5,
        help="item evaluations of exact greedy over those of lazy greedy in a race; 4.5 was measured once, on "
        "SmolLM2-135M and 720 items (docs/notes/2026-11-25-engine.md), on 480 others it was 3.3 (2026-11-26-greedy.md)",
    )  # fmt: skip
    made.add_argument("--folder", type=Path, help="write the model there, or load what is there; default: no disk")
    made.add_argument("--offload", choices=("cpu", "disk"), help="also measure with the weights there")
    made.add_argument("--json", type=Path, metavar="OUT", help="the rows, rewritten after each")
    options = made.parse_args()
    known = ("cpu", "cuda") if card else ("cpu",)
    if options.device.partition(":")[0] not in known:
        made.error(f"--device {options.device} is not here; there is {' and '.join(known)}")
    if options.json and not options.json.absolute().parent.is_dir():
        made.error(f"--json {options.json}: there is no such folder")
    return options


# Items: the requests of one question after the other.


def zero_shot(rng: random.Random, vocabulary: int) -> Iterator[list[Request]]:
    """Yield questions with answers as tasks have them, from a word to a sentence."""
    while True:
        context = words(rng, vocabulary, min(150, 30 + int(rng.expovariate(1 / 40))))
        longest = rng.choice((2, 6, 12, 25))
        answers = [words(rng, vocabulary, rng.randint(1, longest)) for _ in range(rng.choice((2, 4, 4, 4, 5)))]
        yield [Request((*context, *answer), len(answer)) for answer in answers]


def few_shot(rng: random.Random, vocabulary: int) -> Iterator[list[Request]]:
    """Yield questions with four answers of one token, each behind the beginning of its subject."""
    while True:
        beginning = words(rng, vocabulary, BEGINNING)
        for _ in range(SUBJECT):
            context = beginning + words(rng, vocabulary, rng.randint(40, 160))
            yield [Request((*context, SPECIAL + answer), 1) for answer in range(4)]


def words(rng: random.Random, vocabulary: int, count: int) -> tuple[int, ...]:
    return tuple(rng.choices(range(SPECIAL, vocabulary), k=count))


@dataclass(frozen=True)
class Block:
    """Some items as the engine is given them."""

    requests: list[Request]
    groups: list[list[int]]

    @classmethod
    def of(cls, items: Sequence[list[Request]]) -> Block:
        ends = np.cumsum([0, *map(len, items)]).tolist()
        return cls([each for item in items for each in item], [list(range(*ends)) for ends in pairwise(ends)])

    def first(self, items: int) -> Block:
        return Block(self.requests[: self.groups[:items][-1][-1] + 1], self.groups[:items])

    @property
    def tokens(self) -> int:
        """Nodes of the prefix tree of all requests: what has to be computed."""
        return tree_size(request.tokens[:-1] for request in self.requests)


# What is watched while the engine runs.


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        to_host = any(each.is_cpu for each in tensors_in(found)) and not all(each.is_cpu for each in tensors_in(args))
        self.count += to_host or str(func).startswith(WAITS)
        return found


@dataclass
class Watch:
    """Seconds of the parts of a run, its batches and the places that were graded."""

    seconds: dict[str, float] = field(default_factory=lambda: {"layers": 0.0, "grading": 0.0, "batches": 0.0})
    batches: int = 0
    places: int = 0

    @contextmanager
    def over(self, path: paths.EvaluationPath, settle: Callable[[], None]) -> Iterator[None]:
        """Watch the path's runs; ``settle`` waits for the device, before and after each part."""

        def timed(part: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                self.batches += part == "batches"
                self.places += len(args[1]) if part == "grading" else 0  # graded(walk, hidden, ...)
                settle()
                start = time.perf_counter()
                result = work(*args, **kwargs)
                settle()
                self.seconds[part] += time.perf_counter() - start
                return result

            return run

        with (
            mock.patch.object(path.walk, "hidden", timed("layers", path.walk.hidden)),
            mock.patch.object(paths, "graded", timed("grading", paths.graded)),
            mock.patch.object(path, "run", timed("batches", path.run)),
        ):
            yield


@dataclass(frozen=True)
class Round:
    """The removal of every layer, measured on a block."""

    seconds: float
    sums: np.ndarray  # (removals, requests) nats
    computed: int  # tokens x layers, padding included
    watch: Watch


@dataclass
class Section:
    """What is known of one kind of item."""

    block: Block
    round: Round
    flops: float  # a second
    shares: dict[str, float]  # of the time, by part

    def tokens(self, items: int) -> float:
        """Tokens of the prefix tree of so many items of the kind."""
        here = len(self.block.groups)
        shared = BEGINNING if len(self.block.requests[0].tokens) > BEGINNING else 0
        own = self.block.tokens / here - shared * math.ceil(here / SUBJECT) / here
        return items * own + shared * math.ceil(items / SUBJECT)


class Bench:
    """The table, and the time that is left for it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.shape, self.device = options, SHAPES[options.shape], torch.device(options.device)
        self.start, self.limit = time.perf_counter(), 60 * options.minutes
        self.rows: list[dict[str, Any]] = []
        self.removals = [Removal.of(layer) for layer in range(self.shape.layers)]
        self.memory = parse_size(options.memory, "--memory") if options.memory else None
        self.lm_eval_item = math.nan  # seconds of lm-eval per item and removal

    def run(self) -> None:
        shape, folder, dtype = self.shape, self.options.folder, self.options.dtype
        loaded = load(shape, folder, dtype, self.device) if folder else build(shape, dtype, self.device)
        self.row("model", "weights", in_words(shape.bytes(dtype)))
        self.row("model", "made or loaded", time.perf_counter() - self.start, "s")
        self.engine = Engine(loaded, tokens=self.options.tokens, memory=self.memory)
        rate = matrix_rate(self.device, loaded.dtype)
        self.row("device", "matrix products", rate / 1e12, "TFLOP/s")
        self.expected = LEAST_RATE * rate  # FLOP/s that the next section is taken to reach
        sections = {}
        for name, kind in (("zero-shot", zero_shot), ("few-shot", few_shot)):
            items = kind(random.Random(0), shape.vocabulary)
            section = self.measured(name, list(islice(items, max(PROBE, self.options.items))))
            if section is not None:
                sections[name] = section
                if name == "zero-shot":
                    self.against_lm_eval(section)
        if sections:
            self.greedy(sections)
        if self.options.offload and "zero-shot" in sections:
            self.offloaded(sections["zero-shot"])

    def row(self, section: str, measure: str, value: float | str, unit: str = "") -> None:
        """Print a row at once."""
        options = self.options
        if not self.rows:
            card, threads = self.device.type == "cuda", torch.get_num_threads()
            name = torch.cuda.get_device_name(self.device) if card else f"{self.device.type}, threads: {threads}"
            print(f"{name}; shape {options.shape}, {options.dtype}, torch {torch.__version__}\n")
            print("| section | measure | value | unit |\n|---|---|---|---|")
        self.rows.append({"section": section, "measure": measure, "value": value, "unit": unit})
        shown = value if isinstance(value, str) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        print(f"| {section} | {measure} | {shown} | {unit} |", flush=True)
        if options.json:
            about = {name: getattr(options, name) for name in ("shape", "device", "dtype", "minutes")}
            options.json.write_text(json.dumps({**about, "rows": self.rows}, indent=1) + "\n")

    @property
    def left(self) -> float:
        return self.limit - (time.perf_counter() - self.start)

    def enough(self, section: str, seconds: float) -> bool:
        """Whether there is time for something; a row says where there is not."""
        if seconds > self.left:
            self.row(section, "skipped", f"takes about {seconds:.0f} s, {max(self.left, 0):.0f} s are left")
        return seconds <= self.left

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def round(self, block: Block, settle: Callable[[], None] = lambda: None, engine: Engine | None = None) -> Round:
        """Measure every layer's removal with nothing left of earlier rounds."""
        engine = engine or self.engine
        walk, watch = engine.path.walk, Watch()
        walk.base_states, engine.path.read = BaseStateCache(int(KEPT_SHARE * engine.memory)), None
        engine.account, found = Account(), walk.work.found
        with watch.over(engine.path, settle):
            self.settle()
            start = time.perf_counter()
            sums, _ = engine.measure(block.requests, block.groups, self.removals)
            self.settle()
            seconds = time.perf_counter() - start
        return Round(seconds, sums, engine.account.computed - (walk.work.found - found), watch)

    def measured(self, name: str, drawn: list[list[Request]]) -> Section | None:
        """Measure one kind of item, as many as there is time for."""
        block = Block.of(drawn)
        probe = block.first(PROBE)
        inputs = {block.requests[i].tokens[:-1] for group in sample(block.requests, block.groups) for i in group}
        trials = 2 * len(trial_removals(self.engine.loaded)) * sum(map(len, inputs)) + probe.tokens * self.shape.layers
        if not self.enough(name, 2 * trials * self.shape.layers * self.shape.layer_weights / self.expected):
            return None
        start = time.perf_counter()
        self.engine.choose_path(block.requests, block.groups)
        self.settle()
        self.row(name, "self-test", time.perf_counter() - start, "s")
        self.row(name, "path", "; ".join([self.engine.path.name, *self.engine.remarks]))
        self.round(probe)  # warms up
        each = self.round(probe).seconds / probe.tokens
        while len(block.groups) > PROBE and block.tokens * each > min(SHARE * self.limit, self.left / 3):
            block = block.first(max(PROBE, int(0.8 * len(block.groups))))
        if not self.enough(name, block.tokens * each):
            return None
        rate, weights = matrix_rate(self.device, self.engine.loaded.dtype), self.weights()
        found = self.round(block)
        flops = 2 * self.shape.layer_weights * found.computed
        flops += 2 * self.shape.hidden * self.shape.vocabulary * found.watch.places
        section = Section(block, found, flops / found.seconds, {"layers": 1.0, "grading": 0.0})
        self.expected = section.flops / 2
        self.row(name, "items", len(block.groups))
        self.row(name, "tokens of their prefix tree", block.tokens)
        self.row(name, "batches", found.watch.batches)
        self.row(name, "time", found.seconds, "s")
        self.row(name, "tokens x layers", found.computed / found.seconds, "a second")
        self.row(name, "arithmetic", section.flops / 1e12, "TFLOP/s")
        self.row(name, "of the matrix rate", 100 * section.flops / rate, "%")
        if weights:
            peak = (torch.cuda.max_memory_allocated(self.device) - weights) / 1e6
            self.row(name, "peak memory", peak, "MB")
        self.counted(name, block.first(COUNTED), memory=not weights)
        self.row(name, "memory allowed", self.engine.memory / 1e6, "MB")
        if self.enough(f"{name}, shares", 1.2 * found.seconds):
            again = self.round(block, self.settle)
            section.shares = {part: again.watch.seconds[part] / again.seconds for part in section.shares}
            for part, share in {**section.shares, "the rest": 1 - sum(section.shares.values())}.items():
                self.row(name, f"share of {part}", 100 * share, "%")
        return section

    def counted(self, name: str, few: Block, *, memory: bool) -> None:
        """Count waits and live bytes, which slows a run down."""
        with Waits() as waits:
            batches = self.round(few).watch.batches
        self.row(name, "waits of the host", waits.count / batches, "a batch")
        if memory:
            walk = self.engine.path.walk
            with LiveBytes(lambda: walk.stage) as counter:
                self.round(few)
            peak = max(event.alive for event in counter.events) / 1e6
            self.row(name, "peak memory", peak, f"MB (of {len(few.groups)} items)")

    def weights(self) -> int:
        """Return the bytes allocated on a card once the engine holds none, and reset its peak; 0 elsewhere."""
        self.engine.path.walk.base_states = self.engine.path.read = None
        if self.device.type != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def against_lm_eval(self, section: Section) -> None:
        """Ask lm-eval about two removals."""
        self.weights()
        forward = self.shape.layers * self.shape.layer_weights + self.shape.hidden * self.shape.vocabulary
        tokens = sum(len(each.tokens) for each in section.block.requests) / len(section.block.groups)
        runs = 2 * forward * tokens / self.expected  # seconds of an item and removal
        items = max(1, min(len(section.block.groups), int(SHARE * self.limit / (2 * runs))))
        if not self.enough("lm-eval", 4 * items * runs):
            return
        block, part, sizes = section.block.first(items), section.block.first(max(1, items // 4)), {}
        for size in (8, 32, 128) if self.device.type == "cuda" else (1, 8, 32):
            try:
                sizes[size] = min(self.lm_eval(part, Removal(()), size)[0] for _ in range(2))  # the first warms up
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                self.row("lm-eval", "batch size beyond memory", size)
        if not sizes:
            return
        best = min(sizes, key=lambda size: sizes[size])
        layers = [0, self.shape.layers // 2]
        found = [self.lm_eval(block, Removal.of(layer), best) for layer in layers]
        ours = section.round.sums[layers, : len(block.requests)]
        per_token = np.array([[1 / request.scored for request in block.requests]])
        apart = np.abs(ours - np.array([figures for _, figures in found])) * per_token
        self.lm_eval_item = float(np.mean([seconds for seconds, _ in found])) / items
        engine_item = section.round.seconds / len(section.block.groups) / self.shape.layers
        removals = np.abs(ours[0] - ours[1]) * per_token  # what a difference has to be seen beside
        for measure, value, unit in (
            ("items", items, ""), ("batch size", best, ""),
            ("time of a removal and item", 1000 * self.lm_eval_item, "ms"), ("the engine's", 1000 * engine_item, "ms"),
            ("ratio", self.lm_eval_item / engine_item, "times"),
            ("largest difference", float(apart.max()), "nats per token"),
            ("mean difference", float(apart.mean()), "nats per token"),
            ("mean difference of the two removals", float(removals.mean()), "nats per token"),
        ):  # fmt: skip
            self.row("lm-eval", measure, value, unit)

    def lm_eval(self, block: Block, removal: Removal, size: int) -> tuple[float, np.ndarray]:
        """Return lm-eval's seconds, its tokeniser apart, and log-likelihoods, (requests,)."""
        encoder = self.engine.loaded.encoder
        encoder.batch_size_per_gpu = size
        asked = [(("", ""), [*r.tokens[: -r.scored]], [*r.tokens[-r.scored :]]) for r in block.requests]
        with self.engine.loaded.without(removal):
            start = time.perf_counter()
            found = encoder._loglikelihood_tokens(asked, disable_tqdm=True)
            return time.perf_counter() - start, np.array([total for total, _ in found])

    def greedy(self, sections: dict[str, Section]) -> None:
        """Extrapolate to a whole search."""
        depth, factor = self.shape.layers, self.options.race_factor
        drop = self.options.drop or max(1, depth // 4)
        counts, total = {"zero-shot": self.options.greedy_items, "few-shot": self.options.mmlu_items}, 0.0
        for name, section in sections.items():
            minutes = greedy_seconds(depth, drop, section, counts[name]) / 60
            self.row("greedy", f"exact, {drop} of {depth} layers, {counts[name]:,} {name} items", minutes, "minutes")
            total += minutes
        both = " and ".join(sections)
        if len(sections) > 1:
            self.row("greedy", f"exact, {both}", total, "minutes")
        self.row("greedy", f"lazy in a race, {both}", total / factor, "minutes")
        if math.isfinite(self.lm_eval_item):
            asked = sum(depth - gone for gone in range(drop)) * counts["zero-shot"]
            self.row("greedy", "lm-eval for each candidate, zero-shot", asked * self.lm_eval_item / 60, "minutes")
        print(EXTRAPOLATED.format(drop=drop, depth=depth, factor=factor), flush=True)

    def offloaded(self, section: Section) -> None:
        """Measure the same batches in memory and with the layers' weights elsewhere."""
        if "offload" not in inspect.signature(LoadedModel.load).parameters:
            self.row("offload", "skipped", "LoadedModel.load has no such option")
            return
        where, block = self.options.offload, section.block.first(COUNTED)
        self.engine.choose_path(block.requests, block.groups)  # few-shot items have another
        near = self.round(block)
        if not self.enough("offload", 20 * near.seconds):
            return
        loaded = load(self.shape, self.options.folder, self.options.dtype, self.device, offload=where)
        engine = Engine(loaded, tokens=self.options.tokens, memory=self.memory)
        start = time.perf_counter()
        engine.choose_path(block.requests, block.groups)
        self.row("offload", "self-test", time.perf_counter() - start, "s")
        self.row("offload", "path", "; ".join([engine.path.name, *engine.remarks]))
        reads = layers_read(loaded)
        far = self.round(block, engine=engine)
        reads = layers_read(loaded) - reads
        self.row("offload", "a batch in memory", near.seconds / near.watch.batches, "s")
        self.row("offload", f"a batch from {where}", far.seconds / far.watch.batches, "s")
        if reads:
            layer = self.shape.layer_weights * loaded.dtype.itemsize
            self.row("offload", "read", reads * layer / far.watch.batches / 1e6, "MB a batch")
        self.row("offload", "largest difference", float(np.abs(near.sums - far.sums).max()), "nats")


def layers_read(loaded: LoadedModel) -> int:
    """Return how many layers were read so far; 0 where the model does not count them."""
    return sum(getattr(getattr(loaded, "stream", None), "reads", []))


def greedy_seconds(depth: int, drop: int, section: Section, items: int) -> float:
    """Return the seconds of exact greedy search over so many items, every round measured anew.

    How many states a walk carries does not depend on which layers are gone: here they are the first.
    """

    def states(gone: int) -> int:
        return sum(traffic(depth, tuple(frozenset({*range(gone), each}) for each in range(gone, depth))).runs)

    share = section.shares
    rest = 1 - sum(share.values())
    rounds = [
        share["layers"] * states(gone) / states(0) + share["grading"] * (depth - gone) / depth + rest
        for gone in range(drop)
    ]
    return sum(rounds) * section.round.seconds * section.tokens(items) / section.block.tokens


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the device's FLOP/s on large square products: the shortest of several runs."""
    size, products = (8192, 20) if device.type == "cuda" else (1024, 2)
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(products):
            torch.matmul(one, other)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 * products / min(times)


if __name__ == "__main__":
    main()
