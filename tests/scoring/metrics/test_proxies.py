"""Cosine and its relatives, against plain arithmetic on what hooks see of one text at a time; Taylor and magnitude."""

import inspect
import math
import re
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from families import FAMILIES
from layerprune.data.items import EvalSet
from layerprune.errors import ModelError, UsageError
from layerprune.formatting import parse_size
from layerprune.removal import Removal
from layerprune.scoring.memory import GRADE, LiveBytes
from layerprune.scoring.metrics import base, proxies
from layerprune.scoring.metrics.base import Data
from layerprune.scoring.metrics.proxies import Angular, Cosine, HiddenStateMetric, Magnitude, Relative, Taylor
from metric_tiny import between, data_of, loss, subject_of, texts_of

TEXTS = texts_of()
SETS = [(0,), (3,), (1, 4), (5,)]


def singles(loaded):
    return [Removal.of(layer) for layer in range(len(loaded.layers))]


def scores(metric, loaded, texts, removals=None):
    return [c.score for c in metric.score(loaded, removals or singles(loaded), data_of(texts))]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def by_hand(loaded, texts, figure, first=None, last=None, only_last_token=False):
    """The mean of ``figure(before, after)`` over tokens, layer by layer (or over one block), without tensors' help."""
    depth = len(loaded.layers)
    sums, count = [0.0] * depth, 0
    for text in texts:
        seen = between(loaded, text)
        places = [len(text) - 1] if only_last_token else range(len(text))
        count += len(places)
        for layer in range(depth):
            before, after = seen[layer if first is None else first][0], seen[layer if last is None else last][1]
            sums[layer] += sum(figure(before[p].tolist(), after[p].tolist()) for p in places)
    return [total / count for total in sums]


@pytest.mark.parametrize("kind", FAMILIES)
def test_cosine_of_all_tokens(kind):
    loaded = subject_of(kind)
    expected = by_hand(loaded, TEXTS, lambda a, b: 1 - cosine(a, b))
    assert scores(Cosine(), loaded, TEXTS) == pytest.approx(expected, abs=1e-6)
    assert max(expected) > 1e-3  # or the tolerance above would hide everything


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "qwen2_moe"])
def test_cosine_of_the_last_token(kind):
    loaded = subject_of(kind)
    expected = by_hand(loaded, TEXTS, lambda a, b: 1 - cosine(a, b), only_last_token=True)
    found = scores(Cosine(tokens="last"), loaded, TEXTS)
    assert found == pytest.approx(expected, abs=1e-6)
    assert found != pytest.approx(scores(Cosine(), loaded, TEXTS), abs=1e-4)


@pytest.mark.parametrize("metric", [Cosine(), Cosine(tokens="last"), Relative(), Angular()])
def test_padding_is_not_counted(metric, monkeypatch):
    loaded = subject_of("llama", torch.float64)
    together = scores(metric, loaded, TEXTS)
    alone = [scores(metric, loaded, [text]) for text in TEXTS]
    weights = [1 if metric.tokens == "last" else len(text) for text in TEXTS]
    expected = [
        sum(w * s for w, s in zip(weights, own, strict=True)) / sum(weights) for own in zip(*alone, strict=True)
    ]
    assert together == pytest.approx(expected, abs=2e-7)  # norms round to float32
    monkeypatch.setattr(base, "BATCH_TOKENS", 20)
    sizes = [batch.ids.shape for batch in base.read(loaded, data_of(TEXTS), "")]
    assert sizes == [(1, 17), (2, 9), (2, 5)]
    assert scores(metric, loaded, TEXTS) == pytest.approx(together, abs=2e-7)


def test_a_text_that_is_there_twice_counts_twice():
    loaded = subject_of("llama")
    a, b = texts_of((6, 6))
    once, twice, other = (scores(Cosine(), loaded, t) for t in ([a, b], [a, a, b], [b]))
    mixed = [2 / 3 * (2 * o - x) + x / 3 for o, x in zip(once, other, strict=True)]
    assert twice == pytest.approx(mixed, abs=1e-6)
    assert twice != pytest.approx(once, abs=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_the_last_layer_is_looked_at_before_the_final_norm(kind):
    loaded = subject_of(kind)
    text, last = TEXTS[1], len(loaded.layers) - 1
    with torch.no_grad():
        states = loaded.model(input_ids=torch.tensor([text]), output_hidden_states=True, use_cache=False).hidden_states
    normed = 1 - torch.cosine_similarity(states[-2][0].double(), states[-1][0].double(), dim=-1).mean()
    (right,) = by_hand(loaded, [text], lambda a, b: 1 - cosine(a, b))[last:]
    (found,) = scores(Cosine(), loaded, [text])[last:]
    assert found == pytest.approx(right, abs=1e-6)
    assert abs(found - float(normed)) > 1e-4  # the mistake would show


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2"])
def test_cosine_and_angular_equal_what_the_models_own_hidden_states_say(kind):
    """For all layers but the last, whose output the model reports after its final norm."""
    loaded = subject_of(kind)
    last = len(loaded.layers) - 1
    turns, angles, count = [0.0] * last, 0.0, 0
    for text in TEXTS:
        with torch.no_grad():
            ids = torch.tensor([text])
            states = loaded.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        own = [state[0].double() for state in states]
        count += len(text)
        for layer in range(last):
            turns[layer] += float((1 - torch.cosine_similarity(own[layer], own[layer + 1], dim=-1)).sum())
        angles += float(torch.cosine_similarity(own[1][-1], own[last][-1], dim=-1).arccos()) / math.pi
    removals = [Removal.of(layer) for layer in range(last)]
    assert scores(Cosine(), loaded, TEXTS, removals) == pytest.approx([t / count for t in turns], abs=1e-6)
    block = [Removal.of(*range(1, last))]
    assert scores(Angular(tokens="last"), loaded, TEXTS, block) == pytest.approx([angles / len(TEXTS)], abs=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_relative_update(kind):
    loaded = subject_of(kind)
    expected = by_hand(loaded, TEXTS, lambda a, b: math.dist(a, b) / math.hypot(*a))
    assert scores(Relative(), loaded, TEXTS) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "phi3"])
@pytest.mark.parametrize("tokens", ["last", "all"])
def test_angular_distance_of_every_block(kind, tokens):
    loaded = subject_of(kind)
    blocks = [(0, 0), (0, 2), (2, 2), (1, 3), (3, 5), (0, 5)]
    removals = [Removal.of(*range(a, b + 1)) for a, b in blocks]
    found = scores(Angular(tokens=tokens), loaded, TEXTS, removals)
    for (a, b), score in zip(blocks, found, strict=True):
        figure = lambda x, y: math.acos(cosine(x, y)) / math.pi  # noqa: E731
        expected = by_hand(loaded, TEXTS, figure, a, b, only_last_token=tokens == "last")[0]
        assert score == pytest.approx(expected, abs=1e-4), (a, b)


def test_angles_are_right_where_arccos_is_blind():
    axis = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
    angles = torch.tensor([1e-12, 1e-3, 0.5, 1.0], dtype=torch.float64)  # shares of pi
    turned = torch.stack([(math.pi * angles).cos(), (math.pi * angles).sin()], -1) * 7
    torch.testing.assert_close(Angular().distance(axis, turned), angles, rtol=1e-9, atol=0)


@dataclass(frozen=True)
class Largest(HiddenStateMetric):
    """Largest change of any hidden unit, mean over tokens."""

    figure = "largest change"
    unit = "update"
    source = "a test"

    def distance(self, before, after):
        return (after - before).abs().amax(dim=-1)


def test_a_new_hidden_state_metric_is_eight_lines():
    """A declaration and its formula: the reader, the scope and the option are those of all metrics of this kind."""
    for metric in (Largest, Cosine, Relative):
        assert len([line for line in inspect.getsource(metric).splitlines() if line.strip()]) == 8
    loaded = subject_of("llama")
    for tokens in ("all", "last"):
        figure = lambda a, b: max(abs(y - x) for x, y in zip(a, b, strict=True))  # noqa: E731
        expected = by_hand(loaded, TEXTS, figure, only_last_token=tokens == "last")
        assert scores(Largest(tokens=tokens), loaded, TEXTS) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UsageError, match="the metric 'largest' scores single layers"):
        Largest().score(loaded, [Removal.of(0, 1)], data_of(TEXTS))


def test_only_what_a_metric_can_score_is_scored():
    loaded = subject_of("llama")
    for metric, removal in [(Cosine(), (0, 1)), (Relative(), (0, 1)), (Angular(), (0, 2)), (Angular(), ())]:
        with pytest.raises(UsageError, match=r"scores (single layers|contiguous blocks)"):
            metric.score(loaded, [Removal.of(*removal)], data_of(TEXTS))


def test_a_state_that_overflows_is_not_a_low_score():
    loaded = subject_of("llama")
    with torch.no_grad():
        loaded.layers[2].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="nan: the model's states overflow"):
        scores(Cosine(), loaded, TEXTS)


def test_without_text_there_is_no_score():
    loaded = subject_of("llama")
    with pytest.raises(UsageError, match="give it items with --tasks"):
        Cosine().score(loaded, singles(loaded), Data())
    task = data_of([]).eval_set.tasks["texts"]
    with pytest.raises(UsageError, match="prompts with their answers are to be read and texts only generates"):
        Cosine().score(loaded, singles(loaded), Data(EvalSet({"texts": task})))


def test_forwards_are_given_back():
    loaded = subject_of("llama")
    scores(Angular(), loaded, TEXTS)
    assert all("forward" not in vars(layer) for layer in loaded.layers)


# taylor


def scores_of(metric, loaded, sets=SETS):
    return scores(metric, loaded, TEXTS, [Removal.of(*each) for each in sets])


def scaled_loss(loaded, layer, factor):
    """The loss with one layer's update of the stream times ``factor``, by a hook."""

    def scale(_, args, kwargs, out):
        before = args[0] if args else kwargs["hidden_states"]
        after = out[0] if isinstance(out, tuple) else out
        now = before + factor * (after - before)
        return (now, *out[1:]) if isinstance(out, tuple) else now

    handle = loaded.layers[layer].register_forward_hook(scale, with_kwargs=True)
    value = loss(loaded, TEXTS)
    handle.remove()
    return value


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neox", "qwen3"])
def test_taylor_of_an_update_is_the_finite_difference_of_the_loss(kind):
    loaded, step = subject_of(kind, torch.float64), 1e-2  # norms round to float32: a smaller step drowns in that
    slopes = [
        (scaled_loss(loaded, layer, 1 - step) - scaled_loss(loaded, layer, 1 + step)) / (2 * step)
        for layer in range(len(loaded.layers))
    ]
    found = scores_of(Taylor(), loaded, sets=[(layer,) for layer in range(len(slopes))])
    assert found == pytest.approx(slopes, rel=1e-2, abs=1e-4)
    assert max(map(abs, slopes)) > 1e-2
    assert scores_of(Taylor(), loaded, sets=[(0, 2, 5)]) == pytest.approx([found[0] + found[2] + found[5]], rel=1e-6)


def test_taylor_of_weights_is_the_sum_of_finite_differences_of_every_weight():
    loaded, layer, step = subject_of("llama", torch.float64), 3, 1e-2
    expected = 0.0
    weights = [w for w in loaded.layers[layer].parameters() if w.dim() >= 2]
    picked = [(w, i) for w in weights for i in range(0, w.numel(), w.numel() // 3)]
    for weight, index in picked:
        flat = weight.data.view(-1)
        before = float(flat[index])
        at = []
        for sign in (1, -1):
            flat[index] = before + sign * step
            at.append(loss(loaded, TEXTS))
        flat[index] = before
        expected += abs(before * (at[0] - at[1]) / (2 * step))
    everything = scores_of(Taylor(of="weights"), loaded, sets=[(layer,)])[0]
    for weight in weights:  # leave only the picked entries: the others' share is then nothing
        keep = torch.zeros(weight.numel(), dtype=torch.bool)
        keep[[index for other, index in picked if other is weight]] = True
        weight.requires_grad_(True)
        mask = keep.view_as(weight)
        weight.register_hook(lambda slope, mask=mask: slope * mask)
    found = scores_of(Taylor(of="weights"), loaded, sets=[(layer,)])[0]
    assert found == pytest.approx(expected, rel=2e-2)
    assert found < everything


def slopes_at_once(loaded, texts, tokens):
    """|w dL/dw| of every layer's weights the obvious way: all gradients of a batch, all sums in float32 copies."""
    weights = [[w for w in layer.parameters() if w.dim() >= 2] for layer in loaded.layers]
    flat = [w.requires_grad_(True) for own in weights for w in own]
    sums = [torch.zeros_like(w, dtype=torch.float32) for w in flat]
    for batch in base.read(loaded, data_of(texts), "", tokens):
        slopes = torch.autograd.grad(proxies.summed_loss(loaded, batch), flat, allow_unused=True)
        for total, slope in zip(sums, slopes, strict=True):
            if slope is not None:
                total += slope
    products = iter([float((w.detach().double() * s).abs().sum()) for w, s in zip(flat, sums, strict=True)])
    return [sum(next(products) for _ in own) / sum(len(text) - 1 for text in texts) for own in weights]


def counted(loaded, texts, memory=None):
    """Taylor of weights, the most bytes that were alive on the way, and how often the texts were read backward."""
    backward, passes = torch.Tensor.backward, []
    data = replace(data_of(texts), memory=memory)
    with pytest.MonkeyPatch.context() as patch, LiveBytes(lambda: GRADE) as counter:
        patch.setattr(torch.Tensor, "backward", lambda self: (passes.append(1), backward(self)))
        found = [c.score for c in Taylor(of="weights").score(loaded, singles(loaded), data)]
    return found, max(event.alive for event in counter.events), len(passes) - 1  # one says what a row takes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("lengths", [(17, 16, 17, 9), (2, 2, 2, 2)])
def test_taylor_of_weights_in_little_memory_is_what_copies_of_all_weights_give(kind, dtype, lengths, monkeypatch):
    """The same batches, so the same figures, with everything counted within the memory: gradients, sums, states."""
    loaded, texts, longest = subject_of(kind, dtype), texts_of(lengths), max(lengths)
    monkeypatch.setattr(proxies, "BACKWARD_TOKENS", longest)  # four batches: slopes are added up
    expected = slopes_at_once(loaded, texts, longest)
    copies = 4 * sum(w.numel() for layer in loaded.layers for w in layer.parameters() if w.dim() >= 2)
    roomy, with_copies, passes = counted(loaded, texts, memory=10**9)
    assert roomy == pytest.approx(expected, rel=1e-6)
    assert passes == len(texts)
    assert with_copies > copies
    with pytest.raises(UsageError, match=r"--memory 1 B does not hold a text of \d+ tokens .* does is \d") as refused:
        counted(loaded, texts, memory=1)
    least = parse_size(re.search(r"does is (\S+)$", str(refused.value))[1], "")
    for memory in (least, least + copies // 3):
        tight, most, passes = counted(loaded, texts, memory=memory)
        assert tight == pytest.approx(expected, rel=1e-6)
        assert passes > len(texts)
        assert most <= memory
        assert most < with_copies


def test_taylor_of_weights_keeps_no_sums_of_a_text_in_one_batch():
    loaded, texts = subject_of("llama"), texts_of((17,))
    weights = 4 * sum(w.numel() for layer in loaded.layers for w in layer.parameters() if w.dim() >= 2)
    largest = 4 * max(w.numel() for w in loaded.model.parameters())
    found, most, passes = counted(loaded, texts)
    assert found == pytest.approx(slopes_at_once(loaded, texts, 1024), rel=1e-6)
    assert passes == 1
    with LiveBytes(lambda: GRADE) as counter, torch.enable_grad():
        kept = proxies.summed_loss(loaded, next(iter(base.read(loaded, data_of(texts), ""))))
    assert kept.requires_grad
    forward = max(event.alive for event in counter.events)
    assert most <= forward + 8 * largest < forward + weights  # one gradient, its products in float64


def test_portions_hold_every_weight_once():
    weights = [nn.Parameter(torch.zeros(size)) for size in [(3, 5), (2, 2), (7, 7)]]
    for most in (1, 4, 15, 16, 40, 68, 100):
        made = proxies.portions(weights, most)
        held = {w: [i for part in made if w in part for i in range(part[w].start, part[w].stop)] for w in weights}
        assert all(held[w] == list(range(w.numel())) for w in weights)
        sizes = [sum(part.stop - part.start for part in own.values()) for own in made]
        assert max(sizes) <= most
        assert len(made) == math.ceil(68 / most)


@pytest.mark.parametrize(("kind", "dtype"), [("qwen2_moe", torch.float32), ("llama", torch.float64)])
@pytest.mark.parametrize("of", ["update", "weights"])
def test_taylor_leaves_the_model_as_it_was(of, kind, dtype):
    loaded = subject_of(kind, dtype)  # experts that no token reached have no slope
    first = next(loaded.layers[0].parameters()).requires_grad_(False)
    before = loss(loaded, TEXTS)
    assert all(math.isfinite(score) for score in scores_of(Taylor(of=of), loaded))
    assert loss(loaded, TEXTS) == before
    assert not first.requires_grad
    assert all(parameter.grad is None for parameter in loaded.model.parameters())
    assert all("forward" not in vars(layer) for layer in loaded.layers)


@pytest.mark.parametrize("of", ["update", "weights"])
def test_taylor_does_not_depend_on_the_batches(of, monkeypatch):
    loaded = subject_of("llama")
    whole = scores_of(Taylor(of=of), loaded)
    monkeypatch.setattr(proxies, "BACKWARD_TOKENS", 9)
    assert scores_of(Taylor(of=of), loaded) == pytest.approx(whole, rel=1e-3)


# magnitude


def test_magnitude_adds_up_the_weight_matrices():
    loaded = subject_of("llama")
    totals = []
    for power in (1, 2):
        own = [0.0] * len(loaded.layers)
        for name, tensor in loaded.model.state_dict().items():
            if name.startswith("model.layers.") and name.endswith("proj.weight"):
                own[int(name.split(".")[2])] += sum(abs(value) ** power for value in tensor.flatten().tolist())
        totals.append(own)
    sets = [(0,), (3,), (1, 4)]
    found = scores_of(Magnitude(), loaded, sets=sets)
    assert found == pytest.approx([sum(totals[0][layer] for layer in each) for each in sets], rel=1e-6)
    found = scores_of(Magnitude(norm="l2"), loaded, sets=sets)
    assert found == pytest.approx([math.sqrt(sum(totals[1][layer] for layer in each)) for each in sets], rel=1e-6)


@pytest.mark.parametrize("metric", [Magnitude(), Taylor(of="weights")])
def test_packed_weights_are_refused(metric):
    loaded = subject_of("llama")
    packed = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    loaded.layers[1].register_parameter("packed", packed)
    with pytest.raises(ModelError, match="packed"):
        scores_of(metric, loaded)
