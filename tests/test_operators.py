"""What stands in for removed layers: averages against hooks, and every path of the engine against plain hooks."""

import cli_tiny
import numpy as np
import pytest
import torch
from cli_tiny import done, refused
from metric_tiny import between, data_of, subject_of, texts_of
from test_engine import multiple_choice

from layerprune.documents import Plan, Scores
from layerprune.engine import Engine
from layerprune.engine.paths import ChainPath, PlainPath, TreePath
from layerprune.engine.selftest import Trial
from layerprune.errors import UsageError
from layerprune.metrics.reading import padded
from layerprune.operators import StandIn, average_passage, stand_in
from layerprune.removal import Removal

TEXTS = texts_of()
ROUNDED = {"rtol": 1e-5, "atol": 1e-6}  # norms inside the models round to float32


def passage_of(subject, texts=TEXTS):
    batch = padded(texts)
    return average_passage(subject, [(batch.ids, batch.places("all"))])


def corrected(subject, correction):
    subject.stand_in = stand_in(subject, correction, data_of(TEXTS))
    return subject


def by_hooks(subject, requests, removals, correction):
    """Log-likelihoods with removed layers replaced by hooks: one forward per request and removal, nothing shared."""
    texts = [between(subject, text) for text in TEXTS]
    factors, updates = [], []
    for layer in range(len(subject.layers)):
        before, after = (torch.cat([seen[layer][side] for seen in texts]) for side in (0, 1))
        factors.append(float((after.norm(dim=-1) / before.norm(dim=-1)).log().mean().exp()))
        updates.append((after - before).mean(0))
    result = np.zeros((len(removals), len(requests)))
    for number, removal in enumerate(removals):
        handles = []
        for layer in removal.layers:

            def replace(_, args, kwargs, output, layer=layer):
                hidden = args[0] if args else kwargs["hidden_states"]
                hidden = hidden * factors[layer] if correction == "rescale" else hidden + updates[layer].to(hidden)
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            handles.append(subject.layers[layer].register_forward_hook(replace, with_kwargs=True))
        with torch.no_grad():
            for column, request in enumerate(requests):
                ids = torch.tensor([request.tokens[:-1]])
                logs = subject.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
                asked = torch.tensor(request.tokens[-request.scored :])
                result[number, column] = logs[-request.scored :].gather(1, asked[:, None]).sum()
        for handle in handles:
            handle.remove()
    return result


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_averages_are_those_of_the_tokens_that_hooks_see_and_not_of_padding(kind):
    subject = subject_of(kind, torch.float64)
    found = passage_of(subject)
    assert found.tokens == sum(map(len, TEXTS))
    seen = [between(subject, text) for text in TEXTS]
    for layer in range(len(subject.layers)):
        before, after = (torch.cat([one[layer][side] for one in seen]) for side in (0, 1))
        ratios = [float(b.norm() / a.norm()) for a, b in zip(before, after, strict=True)]
        assert float(found.factors[layer]) == pytest.approx(float(np.exp(np.log(ratios).mean())), rel=1e-6)
        torch.testing.assert_close(found.updates[layer], (after - before).mean(0), **ROUNDED)


def test_averages_of_neighbours_make_up_those_of_the_run():
    subject = subject_of("llama", torch.float64)
    found, seen = passage_of(subject), [between(subject, text) for text in TEXTS]
    before, after = torch.cat([one[1][0] for one in seen]), torch.cat([one[3][1] for one in seen])
    whole = float((after.norm(dim=-1) / before.norm(dim=-1)).log().mean().exp())
    assert float(found.factors[1:4].prod()) == pytest.approx(whole, rel=1e-6)
    torch.testing.assert_close(found.updates[1:4].sum(0), (after - before).mean(0), **ROUNDED)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "qwen2_moe", "gpt_neox"])
@pytest.mark.parametrize("correction", ["rescale", "mean"])
def test_the_walk_hands_on_what_hooks_hand_on(kind, correction):
    subject = subject_of(kind)
    depth = len(subject.layers)
    requests, groups = multiple_choice(subject.vocabulary, count=3)
    removals = [Removal(()), Removal.of(0), Removal.of(1, 2), Removal.of(2, depth - 1)]
    expected = by_hooks(subject, requests, removals, correction)
    plain = by_hooks(subject, requests, removals, "rescale" if correction == "mean" else "mean")
    engine = Engine(corrected(subject, correction), tokens=64)
    sums, _ = engine.measure(requests, groups, removals)
    assert engine.path.name == "trees", engine.remarks
    np.testing.assert_allclose(sums, expected, atol=3e-4)
    assert np.abs(expected[1:] - plain[1:]).max() > 1e-2  # the operators differ by more than the tolerance


@pytest.mark.parametrize("path", [TreePath, ChainPath, PlainPath])
@pytest.mark.parametrize("correction", ["rescale", "mean"])
def test_each_path_alone(path, correction):
    subject = corrected(subject_of("llama"), correction)
    requests, groups = multiple_choice(subject.vocabulary, count=3)
    made, removals = path(subject), [Removal.of(0, 3)]
    members, (sums, _) = made.run(made.layout(requests, groups), removals)
    np.testing.assert_allclose(sums, by_hooks(subject, requests, removals, correction)[:, members], atol=3e-4)


def test_the_self_test_finds_a_path_that_forgets_the_operator(monkeypatch):
    subject = corrected(subject_of("llama"), "mean")
    requests, groups = multiple_choice(subject.vocabulary)
    assert Trial.of(subject, requests, groups).choose()[0].name == "trees"
    monkeypatch.setattr("layerprune.engine.walk.Walk._past", lambda self, index, state: state)
    path, remarks = Trial.of(subject, requests, groups).choose()
    assert path.name == "plain"
    assert "differ" in remarks[0]


def test_halves_have_no_stand_in():
    subject = corrected(subject_of("llama"), "rescale")
    requests, groups = multiple_choice(subject.vocabulary, count=1)
    with pytest.raises(UsageError, match="stands in for whole layers; of layer 1 half is removed"), \
            subject.without(Removal.of(1.5)):  # fmt: skip
        pytest.fail("the block must not run")
    with pytest.raises(UsageError, match="of layer 0 half is removed"):
        Engine(subject).measure(requests, groups, [Removal.of(2), Removal.of(1.5), Removal.of(0.5)])


def test_a_stand_in_keeps_dtype_and_device():
    passage = passage_of(subject_of("llama"))
    hidden = torch.ones(1, 2, passage.updates.shape[1], dtype=torch.bfloat16)
    for correction in ("rescale", "mean"):
        assert StandIn(passage, correction, "")(1, hidden).dtype == torch.bfloat16


# the command line


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return cli_tiny.make(tmp_path_factory.mktemp("operators"))


def score(home, out, *words):
    tasks = ("--tasks", "toy", "--include-path", home / "tasks", "--limit", 12)
    return ["score", home / "base", *tasks, "-o", out, "--force", *words]


@pytest.mark.parametrize("metric", ["ablation", "perplexity", "output", "shapley:permutations=2"])
def test_every_metric_that_runs_without_layers_takes_an_operator_and_says_which(home, tmp_path, metric):
    found = {}
    for operator in ("skip", "rescale", "mean"):  # in one folder: what was measured with one is not taken for another
        printed = done(*score(home, tmp_path, "--metric", metric, "--operator", operator)).stdout
        scores = Scores.load(tmp_path / "scores.json")
        assert scores.metric.operator == operator
        assert (f"with {operator}" in printed) is (operator != "skip")
        found[operator] = [candidate.score for candidate in scores.rounds[0].candidates]
    done(*score(home, tmp_path, "--metric", metric))
    assert [c.score for c in Scores.load(tmp_path / "scores.json").rounds[0].candidates] == found["skip"]
    assert found["skip"] != found["rescale"] != found["mean"] != found["skip"]


def test_a_plan_made_with_an_operator_says_that_export_skips_plainly(home, tmp_path):
    words = ("--tasks", "toy", "--include-path", home / "tasks", "--drop", 1, "--operator", "rescale")
    printed = done("plan", home / "base", *words, "-o", tmp_path / "run").stdout
    warnings = Plan.load(tmp_path / "run" / "plan.json").warnings
    assert any("the operator rescale: export skips the layers plainly" in warning for warning in warnings)
    assert warnings[-1] in printed
    done("plan", "--scores", tmp_path / "run" / "scores.json", "--drop", 1, "-o", tmp_path / "again")
    assert warnings[-1] in Plan.load(tmp_path / "again" / "plan.json").warnings


def test_an_operator_that_nothing_runs_with_is_refused(home, tmp_path):
    said = refused(*score(home, tmp_path, "--metric", "cosine", "--operator", "mean"))
    assert "the metric 'cosine' never runs the model without a layer" in said
    said = refused(*score(home, tmp_path, "--unit", "half", "--operator", "mean"))
    assert said == "--operator mean stands in for whole layers; leave it or --unit half out"
    assert not list(tmp_path.iterdir())
