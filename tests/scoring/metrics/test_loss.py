"""Metrics that read the model's predictions, against losses and logits of one text at a time, and the toy games."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

import cli_tiny
from families import FAMILIES
from layerprune.artifacts import Scores
from layerprune.errors import UsageError
from layerprune.registry import build
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine
from layerprune.scoring.metrics import METRICS
from layerprune.scoring.metrics import loss as output
from layerprune.scoring.metrics.base import Data, spread
from layerprune.scoring.metrics.loss import (
    INTACT,
    Output,
    Perplexity,
    Shapley,
    drawn_orders,
    marginal_rises,
    predicted_tokens,
    text_losses,
)
from layerprune.search import SEARCHES
from metric_tiny import data_of, logits, loss, skipped, subject_of, texts_of

TEXTS = texts_of()
SETS = [(0,), (3,), (1, 4), (5,)]


def scores(metric, loaded, texts=TEXTS, sets=SETS, seed=0):
    return [c.score for c in metric.score(loaded, [Removal.of(*each) for each in sets], data_of(texts, seed))]


# perplexity


@pytest.mark.parametrize("kind", FAMILIES)
def test_perplexity_is_the_rise_of_the_mean_loss_over_tokens(kind):
    loaded = subject_of(kind)
    expected = [loss(loaded, TEXTS, gone) - loss(loaded, TEXTS) for gone in SETS]
    assert scores(Perplexity(), loaded) == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 1e-3


@pytest.mark.parametrize("metric", [Perplexity(), Shapley(permutations=2)])
def test_batches_and_memory_are_those_asked_for(metric, monkeypatch):
    loaded, made = subject_of("llama"), []

    def engine(loaded, **settings):
        made.append(settings)
        return Engine(loaded, **settings)

    monkeypatch.setattr("layerprune.scoring.metrics.loss.Engine", engine)
    metric.score(loaded, [Removal.of(1)], replace(data_of(TEXTS, 0), rows=2, memory=10**7))
    assert made
    assert all(settings == {"rows": 2, "memory": 10**7} for settings in made)


def test_the_interval_of_perplexity_holds_its_score_and_shrinks_with_more_text():
    loaded = subject_of("llama")
    few, many = (Perplexity().score(loaded, [Removal.of(2)], data_of(texts_of([12] * count)))[0] for count in (10, 160))
    for found in (few, many):
        assert found.interval[0] < found.score < found.interval[1]
    assert many.interval[1] - many.interval[0] < 0.5 * (few.interval[1] - few.interval[0])


def test_perplexity_of_a_single_text_has_no_interval():
    loaded = subject_of("llama")
    (found,) = Perplexity().score(loaded, [Removal.of(2)], data_of(TEXTS[:1]))
    assert found.score == pytest.approx(loss(loaded, TEXTS[:1], (2,)) - loss(loaded, TEXTS[:1]), abs=1e-4)
    assert found.interval is None


def test_losses_equal_lm_evals_rolling_log_likelihood(tmp_path):
    from layerprune.models.model import LoadedModel

    cli_tiny.audit_tiny.base_model(tmp_path / "base")
    loaded = LoadedModel.load(str(tmp_path / "base"), dtype="float32")
    texts = ["The old oak stands.", "A wet dog, a tin can and a big map of nothing at all."]
    from lm_eval.api.instance import Instance

    asked = [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts)]
    encoder = loaded.encoder
    tokens = [(encoder.prefix_token_id, *encoder.tok_encode(text, add_special_tokens=False)) for text in texts]
    with loaded.without(Removal.of(2)):
        expected = [-value for value in encoder.loglikelihood_rolling(asked, disable_tqdm=True)]
    found = text_losses(loaded, tokens, [INTACT, Removal.of(2)], Data(), "")
    np.testing.assert_allclose(found[1], expected, rtol=1e-5)
    assert predicted_tokens(tokens) == sum(len(text) for text in texts)  # a byte tokenizer


# output


def by_hand(by, intact, own):
    """One token's distance, from the definition; ``intact`` and ``own`` are its logits."""
    if by == "l2":
        return math.dist(intact, own)
    if by == "cosine":
        return 1 - intact @ own / math.sqrt((intact @ intact) * (own @ own))
    p, q = np.exp(intact) / np.exp(intact).sum(), np.exp(own) / np.exp(own).sum()
    return (p * np.log(p / q)).sum()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "qwen2_moe"])
def test_the_output_moves_as_plain_logits_say(kind):
    loaded = subject_of(kind)
    sets = [(0,), (1, 4)]
    said = {gone: [logits(loaded, text, gone).numpy() for text in TEXTS] for gone in [(), *sets]}
    for by in ("kl", "cosine", "l2"):
        for tokens in ("all", "last"):
            expected = []
            for gone in sets:
                pairs = [list(zip(a, b, strict=True)) for a, b in zip(said[()], said[gone], strict=True)]
                values = [by_hand(by, a, b) for pair in pairs for a, b in (pair if tokens == "all" else pair[-1:])]
                expected.append(sum(values) / len(values))
            found = scores(Output(by=by, tokens=tokens), loaded, sets=sets)
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), (by, tokens)


def test_output_does_not_depend_on_the_batches(monkeypatch):
    loaded = subject_of("llama")
    whole = scores(Output(), loaded)
    monkeypatch.setattr(output, "LOGIT_BYTES", 1)
    assert scores(Output(), loaded) == pytest.approx(whole, rel=1e-4)


# shapley

PLAYERS = 4


def toy(gone):
    """A loss: players 0 and 1 stand in for each other, 2 does twice the work of one, 3 does nothing."""
    return (1.0 if {0, 1} <= gone else 0.0) + (2.0 if 2 in gone else 0.0) + (0.5 if {0, 2} <= gone else 0.0)


def game(sets):
    return [toy(gone) for gone in sets]


def test_shapley_over_all_orders_is_the_textbook_value():
    orders = list(itertools.permutations(range(PLAYERS)))
    found = marginal_rises(game, orders).mean(axis=0)
    for player in range(PLAYERS):
        others = [other for other in range(PLAYERS) if other != player]
        value = 0.0
        for size in range(PLAYERS):
            weight = math.factorial(size) * math.factorial(PLAYERS - 1 - size) / math.factorial(PLAYERS)
            for chosen in itertools.combinations(others, size):
                value += weight * (toy({*chosen, player}) - toy(set(chosen)))
        assert found[player] == pytest.approx(value)
    assert found == pytest.approx([0.75, 0.5, 2.25, 0.0])


def test_shapley_of_a_sample_is_efficient_and_gives_a_dummy_nothing():
    rises = marginal_rises(game, drawn_orders(PLAYERS, 3, seed=1))
    assert rises.sum(axis=1) == pytest.approx([3.5] * 3)
    assert (rises[:, 3] == 0).all()


def test_every_set_is_asked_once():
    asked = []
    marginal_rises(lambda sets: [asked.append(gone) or toy(gone) for gone in sets], drawn_orders(PLAYERS, 9, seed=0))
    assert len(asked) == len(set(asked))


def test_shapley_shares_out_the_whole_loss_of_a_model():
    loaded = subject_of("llama")
    depth = len(loaded.layers)
    metric, data = Shapley(permutations=3, texts=3), data_of(TEXTS, seed=5)
    found = metric.score(loaded, [Removal.of(layer) for layer in range(depth)], data)
    texts = [TEXTS[0], TEXTS[2], TEXTS[4]]
    whole = loss(loaded, texts, range(depth)) - loss(loaded, texts)
    assert sum(candidate.score for candidate in found) == pytest.approx(whole, abs=1e-4)
    expected = []
    for order in drawn_orders(depth, 3, seed=5):
        at = order.index(2)
        expected.append(loss(loaded, texts, order[: at + 1]) - loss(loaded, texts, order[:at]))
    assert found[2].score == pytest.approx(sum(expected) / 3, abs=1e-4)
    half = 4.302653 * np.std(expected, ddof=1) / math.sqrt(3)  # Student's t with two degrees of freedom
    assert found[2].interval == pytest.approx((found[2].score - half, found[2].score + half), abs=1e-3)
    pair = metric.score(loaded, [Removal.of(1, 4)], data)[0]
    assert pair.score == pytest.approx(found[1].score + found[4].score, abs=1e-6)


def test_shapley_depends_on_the_seed_and_nothing_else():
    loaded = subject_of("llama")
    metric = Shapley(permutations=2, texts=2)
    assert scores(metric, loaded, seed=1) == scores(metric, loaded, seed=1)
    assert scores(metric, loaded, seed=1) != scores(metric, loaded, seed=2)


def test_texts_are_spread_evenly():
    texts = [(n, n) for n in range(10)]
    assert spread(texts, 4) == [(0, 0), (3, 3), (6, 6), (9, 9)]
    assert spread(texts, 20) == texts


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="permutations is 1 and has to be from 2 to 10,000"):
        build(METRICS, "shapley:permutations=1")


# all of them


@pytest.mark.parametrize("name", sorted(METRICS.builtin))
def test_every_metric_declares_what_the_table_shows_and_a_search_that_exists(name):
    _, metric = build(METRICS, name)
    assert metric.scope in ("single layers", "contiguous blocks", "any set")
    assert metric.needs in (("items",), ("text",), ())
    assert metric.unit
    assert metric.cost
    assert metric.source
    assert metric.search in SEARCHES.entries()


@pytest.mark.parametrize(
    "spec", ["angular", "magnitude", "output:by=l2", "perplexity", "relative", "shapley:permutations=2", "taylor"]
)
def test_every_metric_plans_from_the_command_line(spec, tmp_path_factory):
    home = tmp_path_factory.getbasetemp() / "metrics-home"
    if not home.exists():
        cli_tiny.make(home)
    out = home / spec.replace(":", "-")
    tasks = ("--tasks", "toy", "--include-path", home / "tasks", "--limit", 8)
    cli_tiny.done("plan", home / "base", "--metric", spec, *tasks, "--drop", 2, "-o", out)
    recorded = Scores.load(out / "scores.json")
    assert recorded.metric.spec == spec
    assert len({candidate.score for candidate in recorded.rounds[0].candidates}) > 1


def test_skipping_by_hooks_is_undone():
    loaded = subject_of("llama")
    before = loss(loaded, TEXTS)
    with skipped(loaded, [1]):
        pass
    assert loss(loaded, TEXTS) == before
