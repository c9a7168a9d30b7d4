"""Plans say where the first or the last layer goes, and metrics that need nothing do without a tokenizer."""

import shutil

import pytest

import audit_tiny
from cli_tiny import done, last_line
from layerprune.artifacts import Plan, Receipt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return audit_tiny.base_model(tmp_path_factory.mktemp("ends") / "base")


@pytest.fixture(scope="module")
def mute(base, tmp_path_factory):
    """The same model without its tokenizer."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("mute") / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return folder


@pytest.mark.parametrize(
    ("metric", "drop", "protect", "warned"),
    [
        ("reverse-order", 5, "3", False),  # nothing else may go
        ("reverse-order", 2, "0,-1", False),
        ("reverse-order", 4, "4", True),
        ("random", 4, "1", True),
        ("magnitude", 2, "1-3", True),
    ],
)
def test_a_plan_says_where_an_end_of_the_stack_goes(base, tmp_path, metric, drop, protect, warned):
    ran = done("plan", base, "--metric", metric, "--drop", drop, "--protect", protect, "-o", tmp_path)
    removal = Plan.load(tmp_path / "plan.json").removal
    ends = [f"the {name} (layer {layer})" for name, layer in (("first", 0), ("last", 5)) if layer in removal]
    assert bool(ends) or not warned
    said = f"{' and '.join(ends)} of 6 layers {'are' if len(ends) > 1 else 'is'} to go, which"
    warnings = [each for each in Plan.load(tmp_path / "plan.json").warnings if "to go, which" in each]
    assert [each.startswith(said) for each in warnings] == [True] * warned
    assert ran.stdout.replace("\n", " ").count("to go, which") == len(warnings)
    done("plan", "--scores", tmp_path / "scores.json", "--drop", drop, "-o", tmp_path / "again")
    again = [each for each in Plan.load(tmp_path / "again" / "plan.json").warnings if "to go, which" in each]
    assert again == warnings


@pytest.mark.parametrize("metric", ["magnitude", "reverse-order", "random"])
def test_what_reads_no_text_plans_and_exports_without_a_tokenizer(mute, tmp_path, metric):
    ran = done("plan", mute, "--metric", metric, "--drop", 2, "-o", tmp_path / "run")
    assert f"has no tokenizer: the metric {metric!r} needs none" in ran.stderr
    done("export", tmp_path / "run" / "plan.json", "-o", tmp_path / "smaller")
    assert len(Receipt.load(tmp_path / "smaller" / "layerprune" / "receipt.json").removal) == 2


def test_what_reads_text_says_that_there_is_no_tokenizer(base, mute, tmp_path):
    audit_tiny.eval_set(base, tmp_path, "toy", train=20, test=2)
    said = last_line("plan", mute, "--metric", "cosine", "--tasks", "toy", "--include-path", tmp_path, "--drop", 1,
                     "-o", tmp_path / "run")  # fmt: skip
    assert "has no tokenizer that transformers can read" in said
