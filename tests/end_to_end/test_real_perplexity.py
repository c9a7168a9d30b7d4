"""Slow: the perplexity metric on a real model and real text equals lm-eval's wikitext, whole and without a layer."""

from __future__ import annotations

import math
import os

import pytest

from checkout import EVAL
from layerprune.removal import Removal
from layerprune.scoring.metrics.base import Data
from layerprune.scoring.metrics.loss import INTACT, Perplexity, predicted_tokens, text_losses
from real_model import model, pytestmark  # noqa: F401  a fixture and marks

DOCUMENTS = int(os.environ.get("LAYERPRUNE_WIKITEXT", "2"))  # of wikitext's test split, some thousand tokens each


def by_lm_eval(encoder):
    """lm-eval's figure for the model behind ``encoder``, the documents as it read them, and the bytes it counted."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model=encoder,
        tasks=["local_wikitext"],
        task_manager=TaskManager(include_path=str(EVAL / "tasks"), include_defaults=False),
        limit=DOCUMENTS,
        bootstrap_iters=0,
    )
    samples = found["samples"]["local_wikitext"]
    asked = [sample["arguments"] for sample in samples]
    documents = [one["gen_args_0"]["arg_0"] if isinstance(one, dict) else one[0][0] for one in asked]
    size = sum(len(sample["doc"]["page"].encode()) for sample in samples)  # of the page before its spaces are put right
    return found["results"]["local_wikitext"]["byte_perplexity,none"], documents, size


def test_perplexity_equals_lm_evals_wikitext(model):  # noqa: F811
    from layerprune.models.model import LoadedModel

    loaded = LoadedModel.load(str(model), dtype="float32", device="cpu")
    encoder, removal = loaded.encoder, Removal.of(15)
    intact, documents, size = by_lm_eval(encoder)
    with loaded.without(removal):
        without, *_ = by_lm_eval(encoder)
    texts = [
        (encoder.prefix_token_id, *encoder.tok_encode(document, add_special_tokens=False)) for document in documents
    ]
    assert max(map(len, texts)) <= encoder.max_length + 1  # or lm-eval reads them in windows
    losses = text_losses(loaded, texts, [INTACT, removal], Data(), "").sum(axis=1)  # nats
    assert [math.exp(nats / size) for nats in losses] == pytest.approx([intact, without], rel=1e-5)

    data = Data()
    data.texts = texts  # what a task's items supply otherwise
    (found,) = Perplexity().score(loaded, [removal], data)
    rise = (math.log(without) - math.log(intact)) * size / predicted_tokens(texts)
    assert found.score == pytest.approx(rise, rel=1e-3)
    assert rise > 0.05
