"""What reading own answers costs beside choice scoring, and generation under removals beside plain model.generate.

    python benchmarks/writing.py MODEL EVAL [--prompts 48] [--choices local_arc_easy] [--rounds 3] [--dtype ...]

MODEL is a local folder, EVAL a folder with lm-eval task YAMLs in ``tasks/``. Two tables, each from alternating rounds:

1. Own answers to --prompts prompts of --writes, and as many choice items of --choices, both read by the engine under
   the removal of each single layer. A token is one of the prompt, the answer or a choice, counted once per item
   however often it is read: what an item consists of. Writing the answers, once, is timed apart.
2. The same prompts continued without --remove, by ``layerprune.models.generation.generate`` (a view of the base) and by
   ``transformers`` on a model with those layers really gone: the same batches, greedy, stop strings by lm-eval in both.
   Tokens are those written, up to what ended the text; in float32 the texts have to be the same.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from layerprune.cli.command import quiet_libraries
from layerprune.config import PromptOptions
from layerprune.data.items import EvalSet, Request
from layerprune.data.tasks import load_eval_set, prompting_of
from layerprune.models.generation import batches, generate
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import own_answers
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import evaluate

SYSTEM = "Answer with the shortest span of the background."


def main() -> None:
    options = arguments()
    with quiet_libraries(True):
        loaded = LoadedModel.load(options.model, dtype=options.dtype)
        writing = load(loaded, options, options.writes, chat=bool(loaded.tokenizer.chat_template))
        if options.only != "generation":
            reading(loaded, writing, load(loaded, options, options.choices, chat=False), options)
        if options.only != "reading":
            generating(loaded, writing, options)


def arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model")
    made.add_argument("eval", type=Path)
    made.add_argument("--prompts", type=int, default=48)
    made.add_argument("--writes", default="local_squad")
    made.add_argument("--choices", default="local_arc_easy")
    made.add_argument("--remove", default="4,9")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--dtype", default="auto")
    made.add_argument("--only", choices=("reading", "generation"))
    return made.parse_args()


def load(loaded: LoadedModel, options: argparse.Namespace, task: str, *, chat: bool) -> EvalSet:
    prompting = prompting_of(
        PromptOptions(apply_chat_template=True, system_instruction=SYSTEM) if chat else PromptOptions()
    )
    return load_eval_set(
        [task], loaded.encoder, use="selection", include_path=[options.eval / "tasks"], limit=options.prompts,
        prompting=prompting,
    )  # fmt: skip


def tokens_of(eval_set: EvalSet) -> int:
    """Count each item's tokens once: its longest common beginning, and what each choice has behind it."""
    total = 0
    for task in eval_set.tasks.values():
        for item in task.items:
            rows = {part.tokens for query in item.queries for part in query.parts}
            total += len({row[:length] for row in rows for length in range(1, len(row) + 1)})
    return total


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def reading(loaded: LoadedModel, writing: EvalSet, choices: EvalSet, options: argparse.Namespace) -> None:
    engine = Engine(loaded)
    wrote, answers = timed(lambda: own_answers(engine, writing))
    removals = [Removal.of(layer) for layer in range(loaded.architecture.depth)]
    both = {"own answers": answers, "choices": choices}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(options.rounds):
        for name, eval_set in both.items():
            engine = Engine(loaded)  # keeps no states of an earlier round
            engine.measure([Request((0, 0), 1)], [[0]], removals[:1])  # the self-test is nobody's
            seconds[name].append(timed(partial(evaluate, engine, eval_set, removals))[0])
    print(f"\nread under {len(removals)} removals, {options.dtype}, median of {options.rounds} alternating rounds")
    print(f"{'':14}{'items':>8}{'tokens':>9}{'seconds':>10}{'ms an item':>12}{'us a token':>12}")
    rates = {}
    for name, eval_set in both.items():
        took, tokens = median(seconds[name]), tokens_of(eval_set)
        rates[name] = took / tokens
        items = len(eval_set)
        row = f"{items:8}{tokens:9}{took:10.1f}{1e3 * took / items / len(removals):12.2f}"
        print(f"{name:14}{row}{1e6 * took / tokens / len(removals):12.1f}")
    print(f"own answers over choices, per token: {rates['own answers'] / rates['choices']:.2f}")
    print(f"writing the answers, once: {wrote:.1f} s", flush=True)


def generating(loaded: LoadedModel, writing: EvalSet, options: argparse.Namespace) -> None:
    removal = Removal.from_layers(int(layer) for layer in options.remove.split(","))
    instances = [item.queries[0].generation for task in writing.tasks.values() for item in task.items]
    truncated = physically(loaded, removal)
    memory = 4 * 1024**3
    plans = batches(loaded, instances, memory)

    def ours() -> list[str]:
        return [own.text for own in generate(loaded, instances, removal, memory=memory)]

    def plain() -> list[str]:
        return by_transformers(truncated, loaded, instances, plans)

    seconds: dict[str, list[float]] = {"layerprune": [], "model.generate": []}
    texts: dict[str, list[str]] = {}
    for _ in range(options.rounds):
        for name, work in (("layerprune", ours), ("model.generate", plain)):
            took, texts[name] = timed(work)
            seconds[name].append(took)
    written = generate(loaded, instances, removal, memory=memory)
    tokens = sum(len(own.ids) for own in written)
    same = sum(a == b for a, b in zip(*texts.values(), strict=True))
    print(f"\n{len(instances)} prompts without {removal}, {options.dtype}, {len(plans)} batches, {tokens} tokens")
    for name, took in seconds.items():
        print(f"{name:16}{median(took):8.1f} s{tokens / median(took):10.1f} tokens/s")
    ratio = median(seconds["model.generate"]) / median(seconds["layerprune"])
    print(f"tokens/s, layerprune over model.generate: {ratio:.2f}; same text: {same} of {len(instances)}", flush=True)


def physically(loaded: LoadedModel, removal: Removal) -> Any:
    """Return a deep copy of the model whose layers are gone, as the tutorials do it."""
    model = copy.deepcopy(loaded.model)
    stack = model.get_submodule(loaded.architecture.stack)
    kept = [layer for number, layer in enumerate(stack) if number not in removal.layers]
    for number, layer in enumerate(kept):
        layer.self_attn.layer_idx = number
    parent, _, name = loaded.architecture.stack.rpartition(".")
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList(kept))
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [k for n, k in enumerate(model.config.layer_types) if n not in removal.layers]
    return model


@torch.no_grad()
def by_transformers(
    model: Any, loaded: LoadedModel, instances: Sequence[Any], plans: Sequence[Sequence[int]]
) -> list[str]:
    """Continue the same batches with plain ``generate`` and its own stop strings."""
    tokenizer = loaded.tokenizer
    found: dict[int, str] = {}
    for batch in plans:
        prompts = [instances[place].args[0] for place in batch]
        settings = instances[batch[0]].args[1]
        stops = list(settings["until"])
        padded = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
        whole = model.generate(
            **padded, max_new_tokens=settings["max_gen_toks"], do_sample=False, stop_strings=stops, tokenizer=tokenizer,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        new = whole[:, padded.input_ids.shape[1] :]
        for place, text in zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            for stop in stops:
                text = text.split(stop)[0]
            found[place] = text
    return [found[place] for place in range(len(instances))]


if __name__ == "__main__":
    main()
