"""Tiny loaded models, made-up requests, and their log-likelihoods by plain forwards."""

from __future__ import annotations

import random

import numpy as np
import torch

from families import tiny_config, tiny_model
from layerprune.architecture import read_architecture
from layerprune.artifacts import ModelRef
from layerprune.data.items import Request
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal


def tiny_loaded(kind: str) -> LoadedModel:
    torch.manual_seed(0)
    model = tiny_model(kind).eval()
    architecture = read_architecture(tiny_config(kind))
    ref = ModelRef(id=kind, fingerprint=kind, model_type=kind, layers=architecture.depth, parameters=1)
    return LoadedModel(model, None, architecture, ref)  # type: ignore[arg-type]  # no text is read here


def multiple_choice(vocabulary: int, count: int = 5, seed: int = 0) -> tuple[list[Request], list[list[int]]]:
    rng = random.Random(seed)
    requests: list[Request] = []
    groups = []
    for number in range(count):
        context = [rng.randrange(3, vocabulary) for _ in range(4 + 5 * number)]
        groups.append(list(range(len(requests), len(requests) + 3)))
        for _ in range(3):
            answer = [rng.randrange(3, vocabulary) for _ in range(rng.randint(1, 4))]
            requests.append(Request((*context, *answer), len(answer)))
    return requests, groups


def plainly(loaded: LoadedModel, requests: list[Request], removals: list[Removal]) -> np.ndarray:
    """Skip the layers by hooks, read all logits, add up: nothing shared with the engine."""
    result = np.zeros((len(removals), len(requests)))
    for number, removal in enumerate(removals):
        undo = []
        for layer in removal.layers:
            module = loaded.layers[layer]

            def skip(_, args, kwargs, output):
                hidden = args[0] if args else kwargs["hidden_states"]
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            undo.append(module.register_forward_hook(skip, with_kwargs=True))
        with torch.no_grad():
            for column, request in enumerate(requests):
                ids = torch.tensor([request.tokens[:-1]])
                logs = loaded.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
                asked = torch.tensor(request.tokens[-request.scored :])
                result[number, column] = logs[-request.scored :].gather(1, asked[:, None]).sum()
        for handle in undo:
            handle.remove()
    return result
