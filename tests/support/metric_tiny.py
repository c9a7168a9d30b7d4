"""Tiny subjects and texts for the tests of metrics, and the slow, obvious way to look at what passes between layers."""

from __future__ import annotations

import random
from contextlib import contextmanager

import torch

from families import tiny_config, tiny_model
from layerprune.architecture import read_architecture
from layerprune.artifacts import ModelRef
from layerprune.data.items import EvalItem, EvalSet, EvalTask, Query, Request
from layerprune.models.model import LoadedModel
from layerprune.scoring.metrics.base import Data


def subject_of(kind: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    torch.manual_seed(0)
    model = tiny_model(kind).eval().to(dtype)
    architecture = read_architecture(tiny_config(kind))
    ref = ModelRef(id=kind, fingerprint=kind, model_type=kind, layers=architecture.depth, parameters=1)
    return LoadedModel(model, None, architecture, ref)  # type: ignore[arg-type]  # no text is tokenised here


def texts_of(lengths=(5, 17, 9, 9, 2), vocabulary: int = 96, seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, vocabulary) for _ in range(length)) for length in lengths]


def data_of(texts, seed: int = 0) -> Data:
    """Data whose items' prompts with their first answers are these texts."""
    items = [EvalItem(f"{n:016x}", 0.5, (Query((Request(tuple(text), 1),)),)) for n, text in enumerate(texts)]
    task = EvalTask("texts", "train", "acc", 0, tuple(items), judge=None)  # type: ignore[arg-type]
    return Data(eval_set=EvalSet({"texts": task}), seed=seed)


def between(loaded: LoadedModel, text) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's input and output for one text alone, both (tokens, hidden), float64, by ordinary hooks."""
    seen, handles = [], []

    def look(_, args, kwargs, output):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        seen.append((before[0].double(), after[0].double()))

    for layer in loaded.layers:
        handles.append(layer.register_forward_hook(look, with_kwargs=True))
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([text]), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@contextmanager
def skipped(loaded: LoadedModel, layers):
    """The model with layers skipped by hooks: nothing shared with ``LoadedModel.without``."""

    def skip(_, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [loaded.layers[layer].register_forward_hook(skip, with_kwargs=True) for layer in layers]
    yield loaded.model
    for handle in handles:
        handle.remove()


def logits(loaded: LoadedModel, text, gone=()) -> torch.Tensor:
    """What the model without the layers says to one text alone, (tokens, vocabulary), float64."""
    with skipped(loaded, gone) as model, torch.no_grad():
        return model(input_ids=torch.tensor([text]), use_cache=False).logits[0].double()


def loss(loaded: LoadedModel, texts, gone=()) -> float:
    """Mean loss per predicted token, text after text."""
    total = 0.0
    for text in texts:
        logs = logits(loaded, text, gone)[:-1].log_softmax(-1)
        total -= float(logs.gather(1, torch.tensor(text)[1:, None]).sum())
    return total / sum(len(text) - 1 for text in texts)
