"""A target of speed: what is timed is the model that export would write; how far to go is then arithmetic."""

import pytest
import torch

import audit_tiny
from cli_tiny import done, last_line
from layerprune.architecture.tiny import save_tiny
from layerprune.artifacts import MeasuredSpeed, Plan, Speed
from layerprune.exporter.proof import sharing_weights
from layerprune.models.model import LoadedModel
from layerprune.planner import goals
from layerprune.planner.goals import speedup
from layerprune.removal import Removal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    audit_tiny.base_model(folder / "base")
    return folder


def figures(ratio, kept):
    def at(rate):
        return {
            name: MeasuredSpeed(median=rate * scale, low=rate, high=rate)
            for name, scale in (("prefill_tokens_per_s", 10), ("decode_tokens_per_s", 1), ("first_token_s", 1))
        }

    return Speed(
        device="cpu, 1 thread", dtype="float32", repeats=3, prompt_tokens=256, new_tokens=32, base=at(100.0),
        pruned=at(100.0 * ratio), peak_bytes=None, layers_kept=kept,
    )  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """A machine on which half of the time is outside the layers; remembers what it timed."""
    timed = []

    def time_both(base, pruned, *, repeats, progress):
        kept = pruned.architecture.depth / base.architecture.depth
        timed.append((pruned.architecture.depth, repeats))
        return figures(2 / (1 + kept), kept)

    monkeypatch.setattr(goals, "time_both", time_both)
    return timed


def random(home, out, *words):
    return ["plan", home / "base", "--metric", "random", "-o", out, *words]


@pytest.mark.parametrize("removal", [(0,), (2, 5), (1, 2, 3)])
def test_the_timed_model_is_the_pruned_one_on_the_very_weights(home, removal):
    loaded = LoadedModel.load(str(home / "base"))
    pruned = sharing_weights(loaded, home / "base", Removal.of(*removal))
    tokens = torch.randint(3, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), loaded.without(Removal.of(*removal)):
        expected = loaded.model(input_ids=tokens, use_cache=False).logits
    with torch.no_grad():
        found = pruned.model(input_ids=tokens, use_cache=False).logits
        text = pruned.model.generate(tokens[:1], max_new_tokens=4, do_sample=False)  # with a cache
    assert torch.allclose(found, expected, atol=1e-5)
    assert text.shape[1] <= 21
    assert pruned.architecture.depth == 6 - len(removal)
    assert not any(parameter.is_meta for parameter in pruned.model.parameters())
    shared = {parameter.data_ptr() for parameter in loaded.model.parameters()}
    assert {parameter.data_ptr() for parameter in pruned.model.parameters()} <= shared


@pytest.mark.parametrize("type_", ["gemma2", "qwen3_moe", "gpt2"])
def test_other_families_too(home, tmp_path, type_):
    save_tiny(type_, tmp_path / type_, num_hidden_layers=4)
    for path in (home / "base").glob("tokenizer*"):
        (tmp_path / type_ / path.name).write_bytes(path.read_bytes())
    loaded = LoadedModel.load(str(tmp_path / type_))
    pruned = sharing_weights(loaded, tmp_path / type_, Removal.of(2, 3))
    tokens = torch.arange(3, 19)[None]
    with torch.no_grad(), loaded.without(Removal.of(2, 3)):
        expected = loaded.model(input_ids=tokens, use_cache=False).logits
    with torch.no_grad():
        assert torch.allclose(pruned.model(input_ids=tokens, use_cache=False).logits, expected, atol=1e-5)


@pytest.mark.parametrize(("wanted", "layers"), [("1.05x", 1), ("1.2x", 2), ("1.21", 3), ("1.7x", 5)])
def test_the_fewest_layers_are_removed_that_are_fast_enough(home, tmp_path, clock, wanted, layers):
    said = done(*random(home, tmp_path / "run", "--target-speedup", wanted)).stdout
    made = Plan.load(tmp_path / "run" / "plan.json")
    assert len(made.removal) == layers
    assert made.requested == f"--target-speedup {wanted}"
    assert made.target.what == "speed-up"
    assert made.target.reached == pytest.approx(2 / (2 - layers / 6), abs=1e-4)
    assert made.target.reached >= made.target.wanted
    assert made.target.speed.repeats == 3
    assert f"target: {made.target.reached:.2f} times as fast, wanted {made.target.wanted:g}; measured on cpu" in said
    assert clock[0] == (1, goals.STAND_IN_REPEATS)  # what can be reached at all, before anything slow
    assert clock[-1] == (6 - layers, goals.REPEATS)


def test_a_stand_in_that_promised_too_much_is_followed_by_a_larger_removal(home, tmp_path, clock, monkeypatch):
    real, stand_ins = goals.speedup, []

    def speedup(speed):
        if speed.layers_kept != 4 / 6:
            return real(speed)
        stand_ins.append(speed)  # the first of this size is the stand-in, the others are what the search chose
        return real(speed) * (1 if len(stand_ins) == 1 else 0.93)

    monkeypatch.setattr(goals, "speedup", speedup)
    said = done(*random(home, tmp_path / "run", "--target-speedup", "1.15x")).stderr
    assert "2 removed: 1.12 times as fast" in said
    assert len(Plan.load(tmp_path / "run" / "plan.json").removal) == 3


def test_a_speed_beyond_reach_is_refused_with_what_is_reached(home, tmp_path, clock):
    said = last_line(*random(home, tmp_path / "run", "--target-speedup", "3x"))
    assert said == (
        "--target-speedup 3x cannot be reached: with 5 of 6 layers removed, as many as may go, "
        "the model is 1.71 times as fast here"
    )
    said = last_line(*random(home, tmp_path / "run", "--target-speedup", "1.7x", "--contiguous", "--protect", "2"))
    assert "with 3 of 6 layers removed" in said
    assert not (tmp_path / "run").exists()


def test_a_size_that_the_architecture_lets_no_stand_in_reach_is_not_the_end(home, tmp_path):
    """Layers share keys and values: their sets are refused one by one, and what can be reached is still found."""
    from layerprune.errors import RefusedError
    from layerprune.planner.goals import Faster
    from layerprune.search import Constraints

    def check(removal):
        if len(removal) > 3:
            raise RefusedError("three at most")

    class ScoringSession:
        constraints = Constraints(6, check=check)

    assert [len(removal) for removal in Faster("x", 1.5).stand_ins(ScoringSession)] == [1, 2, 3]


def test_the_lesser_of_prefill_and_decoding_counts():
    speed = figures(1.5, 0.5)
    slower = {**speed.pruned, "decode_tokens_per_s": MeasuredSpeed(median=120.0, low=1, high=1)}
    assert speedup(speed) == 1.5
    assert speedup(speed.model_copy(update={"pruned": slower})) == 1.2


def test_the_clock_is_real(home, tmp_path):
    """With nothing replaced: some speed-up over 1.0001 is measured on a model of which five layers of six may go."""
    done(*random(home, tmp_path / "run", "--target-speedup", "1.0001x"))
    made = Plan.load(tmp_path / "run" / "plan.json")
    assert made.target.speed.repeats == goals.REPEATS
    assert made.target.reached > 1
