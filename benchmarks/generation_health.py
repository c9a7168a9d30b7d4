"""How sound and broken texts are spread over the measures of the generation check, on a real model.

    python benchmarks/generation_health.py MODEL TEXT [--texts FILE] [--only 'mild, 4']

MODEL is a local llama folder, TEXT a .txt or .jsonl file of prose. Layers are taken out for real, in an order that
harms little and in one that harms much; for each model the table shows the loss on TEXT (the harm, measured without any
text of the model's own), the spread of each measure over the prompts, and how many texts have which fault at the
present thresholds. The rows "sampled" are the intact model's own texts, drawn at random and judged beside its greedy
ones: what the check says of them are false alarms.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from layerprune.auditor import generation
from layerprune.auditor.generation import PROMPTS, Continued, faults, repeated_share, surprise, write
from layerprune.auditor.performance import read_text, windows_of
from layerprune.models.model import LoadedModel

ORDERS = {
    "mild": (3, 26, 19, 7, 14, 15, 25, 5, 20, 17, 13, 18),  # greedy on accuracy for six, then cosine's favourites
    "from the end": (28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17),
}
COUNTS = (1, 2, 3, 4, 6, 8, 10, 12)
SEEDS = (0, 1)
WINDOWS = 2  # of 512 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--only", default="", help="the rows whose name begins so")
    options = parser.parse_args()
    base = LoadedModel.load(options.model)
    windows = windows_of(read_text(options.text), base, most=WINDOWS)
    greedy = write(base, PROMPTS)
    print(
        "model | loss | repeated | length / base's | ended | nats by base | faults | faulty | same as greedy",
        flush=True,
    )
    said = []
    for name, loaded, texts in models(base, greedy, options.only):
        nats = [surprise(base, text) for text in texts]
        found = [faults(text, value, len(own.ids)) for text, value, own in zip(texts, nats, greedy, strict=True)]
        figures = [f"{loss(loaded, windows):.3f}", *spreads(texts, nats, greedy), *counted(found), same(texts, greedy)]
        print(" | ".join([name, *figures]), flush=True)
        said += [f"== {name}: {', '.join(own) or 'sound'} | {t.text!r}" for t, own in zip(texts, found, strict=True)]
        if options.texts:
            options.texts.write_text("\n".join(said), encoding="utf-8")


def models(base: LoadedModel, greedy: list[Continued], only: str) -> Iterator[tuple[str, LoadedModel, list[Continued]]]:
    """Yield the intact model, greedy and sampled, then what is left of it after each removal."""
    if "intact, greedy".startswith(only):
        yield "intact, greedy", base, greedy
    for seed in SEEDS:
        if f"intact, sampled {seed}".startswith(only):
            yield f"intact, sampled {seed}", base, sampled(base, seed)
    for order, layers in ORDERS.items():
        for count in COUNTS:
            if f"{order}, {count} gone".startswith(only):
                smaller = without(base, layers[:count])
                yield f"{order}, {count} gone", smaller, write(smaller, PROMPTS)


def sampled(base: LoadedModel, seed: int) -> list[Continued]:
    """Return texts drawn at temperature 0.7 from the likeliest 90 %, as chats usually are."""
    torch.manual_seed(seed)
    greedy = GenerationConfig

    def drawn(**settings: object) -> GenerationConfig:
        return greedy(**{**settings, "do_sample": True, "temperature": 0.7, "top_p": 0.9})

    import transformers

    transformers.GenerationConfig = drawn  # the function under test makes its own
    try:
        return write(base, PROMPTS)
    finally:
        transformers.GenerationConfig = greedy


def without(base: LoadedModel, gone: Sequence[int]) -> LoadedModel:
    """Return a llama with layers really taken out: renumbered, so that it can be asked with a cache."""
    kept = [layer for number, layer in enumerate(base.layers) if number not in gone]
    model = copy.copy(base.model)
    model._modules = dict(base.model._modules)
    model.model = copy.copy(base.model.model)
    model.model._modules = dict(base.model.model._modules)
    model.model.layers = nn.ModuleList(copy.copy(layer) for layer in kept)
    for number, layer in enumerate(model.model.layers):
        layer._modules = dict(layer._modules)
        layer.self_attn = copy.copy(layer.self_attn)
        layer.self_attn.layer_idx = number
    model.config = copy.deepcopy(base.model.config)
    model.config.num_hidden_layers = len(kept)
    model.model.config = model.config
    return LoadedModel(model, base.tokenizer, base.architecture, base.ref)


@torch.no_grad()
def loss(loaded: LoadedModel, windows: list[list[int]]) -> float:
    found = []
    for window in windows:
        ids = torch.tensor([window])
        logs = loaded.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        found.append(-float(logs.gather(1, ids[0, 1:, None]).mean()))
    return float(np.mean(found))


def spreads(texts: Sequence[Continued], nats: Sequence[float | None], greedy: Sequence[Continued]) -> list[str]:
    lengths = [len(text.ids) / len(own.ids) for text, own in zip(texts, greedy, strict=True)]
    known = [value for value in nats if value is not None]
    repeats = [repeated_share(text.ids) for text in texts]
    return [spread(repeats), spread(lengths), str(sum(text.ended for text in texts)), spread(known)]


def spread(values: Sequence[float]) -> str:
    """Return minimum, quartiles and maximum."""
    return " ".join(f"{value:.2f}" for value in np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))


def counted(found: Sequence[tuple[str, ...]]) -> list[str]:
    kinds = Counter(fault for own in found for fault in own)
    listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    return [listed, f"{sum(map(bool, found))}/{len(found)}"]


def same(texts: Sequence[Continued], greedy: Sequence[Continued]) -> str:
    return f"{np.mean([text.ids == own.ids for text, own in zip(texts, greedy, strict=True)]):.2f}"


if __name__ == "__main__":
    print(f"{generation.NEW_TOKENS} new tokens, {len(PROMPTS)} prompts")
    main()
