"""The theorem's decoder: cosine would remove first the layer that decides everything; ablation is not taken in."""

import contextlib
import io
import re

import numpy as np
import pytest
import torch

from checkout import ROOT
from layerprune.analysis.counterexample import counterexample, counting, subject_of
from layerprune.errors import UsageError
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.engine import Engine
from layerprune.scoring.metrics.ablation import Ablation
from layerprune.scoring.metrics.base import Data
from layerprune.scoring.metrics.proxies import Cosine

PAGE = ROOT / "docs" / "counterexample.md"
EPSILONS = (4.86e-3, 4e-3, 1e-4, 1e-6, 1e-9, 1e-12)
SINGLE = [Removal.of(layer) for layer in range(3)]
JUNK, MIDDLE, LAST = range(3)


def session(epsilon, vocabulary=32):
    loaded, eval_set = subject_of(counterexample(epsilon, vocabulary)), counting(vocabulary)
    return loaded, Data(eval_set=eval_set, evaluator=CachedEvaluator(Engine(loaded), eval_set))


def streams(epsilon, vocabulary, token):
    """The construction of the paper on paper: the stream before, between and after the three blocks."""
    t, w = np.eye(vocabulary)[(token + 1) % vocabulary], np.eye(vocabulary)[token]
    delta = np.sqrt(102) * np.sqrt(1 / (1 - epsilon) ** 2 - 1)
    s = np.zeros(vocabulary)
    return [
        np.concatenate([t, *rest])
        for rest in ((s, w, [10]), (s, w, [-10]), (delta * t, w, [-10]), ((delta + 10) * t, w, [10]))
    ]


@pytest.mark.parametrize("epsilon", [4e-3, 1e-6])
def test_the_layers_do_what_the_construction_says(epsilon):
    model, seen = counterexample(epsilon, vocabulary=7), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(torch.arange(7)[None], use_cache=False)
    found = torch.stack([seen[0][0], *(output for _, output in seen)])[:, 0]  # (4, tokens, stream)
    for token in range(7):
        expected = streams(epsilon, 7, token)
        np.testing.assert_allclose(found[:, token].numpy(), expected, rtol=3e-6, atol=1e-15)


@pytest.mark.parametrize(("gone", "step"), [((), 1), ((JUNK,), 1), ((MIDDLE,), 0), ((LAST,), 0), ((0, 1, 2), 0)])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_what_each_removal_makes_of_the_answers(epsilon, gone, step):
    loaded, ids = subject_of(counterexample(epsilon)), torch.arange(32)
    with loaded.without(Removal.of(*gone)) as model, torch.no_grad():
        alone = model(ids[:, None], use_cache=False).logits[:, 0]
        together = model(ids[None], use_cache=False).logits[0]  # no token hears of another
    assert alone.argmax(-1).tolist() == [(x + step) % 32 for x in range(32)]
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_cosine_would_remove_the_middle_layer_first(epsilon):
    loaded, data = session(epsilon)
    scores = [candidate.score for candidate in Cosine().score(loaded, SINGLE, data)]
    assert min(range(3), key=scores.__getitem__) == MIDDLE
    assert scores[MIDDLE] == pytest.approx(epsilon, rel=1e-5 if epsilon > 1e-10 else 1e-3, abs=0)
    assert scores[JUNK] == pytest.approx(200 / 102)
    assert scores[LAST] > 1


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_ablation_names_the_junk_layer_as_the_only_safe_one(epsilon):
    loaded, data = session(epsilon)
    found = Ablation().score(loaded, SINGLE, data)
    assert [candidate.score for candidate in found] == pytest.approx([0, 4 / 3, 4 / 3], abs=1e-6)  # 1 / 4 is chance
    assert [candidate.tasks["counting"].accuracy for candidate in found] == [1, 0, 0]
    intact = data.evaluator.outcomes([Removal(())])[Removal(())]["counting"]
    assert intact.correct == "1" * 32


def test_float32_is_wrong_about_epsilon_and_right_about_accuracy():
    loaded, eval_set = subject_of(counterexample(1e-12, dtype=torch.float32)), counting()
    found = Ablation().score(loaded, SINGLE, Data(eval_set, CachedEvaluator(Engine(loaded), eval_set)))
    assert [candidate.score for candidate in found] == pytest.approx([0, 4 / 3, 4 / 3], abs=1e-6)  # 1 / 4 is chance


def test_it_is_an_ordinary_llama(tmp_path):
    from transformers import AutoModelForCausalLM

    model = counterexample(1e-6, vocabulary=5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.tensor([[0, 3, 4]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generate(ids, max_new_tokens=7, do_sample=False)[0, 3:].tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_building_it_draws_nothing_from_the_callers_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    counterexample(1e-3)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("epsilon", [0, -1e-3, 4.9e-3, 0.5, float("nan")])
def test_an_epsilon_for_which_the_construction_fails_is_refused(epsilon):
    with pytest.raises(UsageError, match=r"the construction holds for 0 < epsilon <= 0\.00486"):
        counterexample(epsilon)


def test_two_tokens_are_too_few():
    with pytest.raises(UsageError, match="at least 3"):
        counterexample(1e-3, vocabulary=2)


def test_the_page_shows_what_its_code_prints():
    code, printed = re.findall(r"```(?:python|text)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(code, str(PAGE), "exec"), {})
    assert shown.getvalue() == printed
