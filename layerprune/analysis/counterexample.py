"""The decoder whose least-turning layer decides everything: built, not trained, and measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from layerprune.architecture import read_architecture
from layerprune.artifacts import ModelRef
from layerprune.artifacts.study import Counterexample
from layerprune.data.items import Answer, EvalItem, EvalSet, EvalTask, Query, Request, Verdict, fingerprint
from layerprune.errors import UsageError
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.engine import Engine
from layerprune.scoring.metrics.ablation import INTACT
from layerprune.scoring.metrics.base import Data
from layerprune.scoring.metrics.proxies import Cosine

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


# Small models that show a point, built and not trained: the decoder whose least-turning layer decides everything.
#
# The theorem of arXiv:2605.14075 says that for any epsilon there is a decoder with a layer whose cosine score is
# epsilon, the lowest of all, and whose removal takes the accuracy from 1 to 0. ``counterexample`` is that decoder as an
# ordinary three-layer ``LlamaForCausalLM``; ``counting`` is the task it is perfect at.


# The stream is [t | s | w | u]: t the one-hot right answer, s where the answer is written, w the wrong answer's one-hot
# times COMPETITOR, u a number that no prediction reads. The figures are the paper's mechanism in round numbers.
COMPETITOR = 1.0  # what the final score of the answer must beat
IRRELEVANT = 10.0  # |u|: rewritten heavily by the outer layers, which makes their cosine scores large
MARGIN = 10.0  # times COMPETITOR: how much the last layer adds to what the middle layer wrote
NORM = math.sqrt(1 + COMPETITOR**2 + IRRELEVANT**2)  # of the stream before the middle layer has written
# The middle layer alone must not beat the competitor: delta < COMPETITOR, so 1 - NORM / sqrt(NORM^2 + 1) = 0.004866.
LARGEST = 0.00486
SILU_OF_ONE = 1 / (1 + math.exp(-1))
Places = Sequence[int] | torch.Tensor


def counterexample(epsilon: float, vocabulary: int = 32, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    """Build a three-layer llama that answers token x with x + 1 (mod ``vocabulary``) and owes it to its middle layer.

    ====  ==========================================  ========================  ==========================
    layer what it does to the stream [t | s | w | u]  cosine score              accuracy without the layer
    ====  ==========================================  ========================  ==========================
    0     u <- -u                                     1.96                      1 (junk)
    1     s <- s + delta t                            ``epsilon``, the lowest   0: says x again
    2     s <- (1 + A) s, u <- -u                     above 1                   0: says x again
    ====  ==========================================  ========================  ==========================

    delta = NORM sqrt(1 / (1 - epsilon)^2 - 1), A = 10 / delta, logits = s + w up to one positive factor per token.

    How a llama does this: attention answers nothing (its output projection is zero); the weight of each MLP's norm is
    the root mean square that the stream has there, so the norm changes nothing; every gate reads the sum of t, which
    is 1, so a unit adds silu(1) times what it reads. ``LlamaRMSNorm`` computes in float32 whatever the dtype, which
    moves the score by 3e-6 of itself (measured); the stream itself is float64. To *see* an epsilon below 1e-6 takes
    float64; at 1e-13 its own rounding reaches 3e-4 of epsilon. Source: arXiv:2605.14075.

    Raises ``UsageError`` unless 0 < epsilon <= 0.00486 and there are at least 3 tokens.
    """
    if not 0 < epsilon <= LARGEST:
        raise UsageError(f"epsilon is {epsilon}; the construction holds for 0 < epsilon <= {LARGEST}")
    if vocabulary < 3:
        raise UsageError(f"the vocabulary has {vocabulary} tokens; the counterexample needs at least 3")
    model = _blank(vocabulary, dtype)
    tokens = torch.arange(vocabulary)
    t, s, w = tokens, tokens + vocabulary, tokens + 2 * vocabulary  # where each part stands in the stream
    u = 3 * vocabulary
    delta = NORM * math.sqrt(epsilon * (2 - epsilon)) / (1 - epsilon)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight  # (vocabulary, stream)
        embedding[tokens, t[(tokens + 1) % vocabulary]] = 1.0
        embedding[tokens, w[tokens]] = COMPETITOR
        embedding[:, u] = IRRELEVANT
        head = model.lm_head.weight  # (vocabulary, stream)
        head[tokens, s] = 1.0
        head[tokens, w] = 1.0
        first, middle, last = model.model.layers
        for layer, norm in ((first, NORM), (middle, NORM), (last, math.hypot(NORM, delta))):
            # its MLP reads the stream, which has this norm, as it is
            weight = layer.post_attention_layernorm.weight
            weight.fill_(math.sqrt(norm**2 / len(weight) + layer.post_attention_layernorm.variance_epsilon))
            layer.mlp.gate_proj.weight[:, t] = 1.0
        for layer in (first, last):
            _add(layer, [vocabulary], [u], [u], -2.0)
        _add(middle, tokens, t, s, delta)
        _add(last, tokens, s, s, MARGIN * COMPETITOR / delta)
    return model


def _blank(vocabulary: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a llama of the right shape whose matrices are all zero and whose norms weigh 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=3 * vocabulary + 1,
        intermediate_size=vocabulary + 1,
        num_hidden_layers=3,
        num_attention_heads=1,
        head_dim=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
    )
    with torch.random.fork_rng():  # what would be drawn is overwritten: the caller's random numbers stay as they were
        model = LlamaForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        parameter.detach().fill_(1.0 if parameter.dim() == 1 else 0.0)
    return model.eval()


def _add(layer: torch.nn.Module, units: Places, read: Places, written: Places, factor: float) -> None:
    """Let MLP units add ``factor`` times the stream's entries at ``read`` to those at ``written``."""
    layer.mlp.up_proj.weight[units, read] = 1.0
    layer.mlp.down_proj.weight[written, units] = factor / SILU_OF_ONE


def counting(vocabulary: int = 32) -> EvalSet:
    """Return the task "what comes after x?", one item per token, with four choices; x itself is one of them."""
    choices = [[(x + step) % vocabulary for step in range(min(4, vocabulary))] for x in range(vocabulary)]
    items = tuple(
        EvalItem(
            fingerprint=fingerprint(["counting", vocabulary, x]),
            chance=1 / len(offered),
            queries=tuple(Query((Request((x, y), 1),)) for y in offered),
        )
        for x, offered in enumerate(choices)
    )
    task = EvalTask("counting", "all tokens", "acc", 0, items, _judge)
    return EvalSet({task.name: task})


def _judge(item: EvalItem, answers: Sequence[Answer]) -> Verdict:
    """Judge as lm-eval's multiple choice: the likeliest choice counts. The right one is the second offered, x + 1."""
    logs = [float(answer[0]) for answer in answers]  # type: ignore[index]
    top = max(logs)
    weights = [math.exp(value - top) for value in logs]
    return Verdict(logs.index(top) == 1, weights[1] / sum(weights))


def subject_of(model: LlamaForCausalLM) -> LoadedModel:
    """Return a model in memory as a ``LoadedModel``; it has no tokenizer, so only token ids can be asked."""
    architecture = read_architecture(model.config)
    ref = ModelRef(
        id="counterexample",
        fingerprint="in memory",
        model_type=model.config.model_type,
        layers=architecture.depth,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    return LoadedModel(model, None, architecture, ref)  # type: ignore[arg-type]


# The counterexample, measured: what cosine says of its layers, and what each is worth.


EPSILON = 1e-6


def counterexample_shown() -> Counterexample:
    """Build the three-layer llama for a small epsilon and ask it its task, intact and without each layer."""
    loaded, eval_set = subject_of(counterexample(EPSILON)), counting()
    layers = [Removal.of(layer) for layer in range(3)]
    scores = [candidate.score for candidate in Cosine().score(loaded, layers, Data(eval_set=eval_set))]
    found = CachedEvaluator(Engine(loaded), eval_set).outcomes([INTACT, *layers])
    intact, *without = (outcomes["counting"].accuracy for outcomes in found.values())
    return Counterexample(epsilon=EPSILON, cosine=tuple(scores), accuracy=intact, accuracy_without=tuple(without))
