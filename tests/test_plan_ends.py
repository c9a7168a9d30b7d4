"""Plans say where the first or the last layer goes, and metrics that need nothing do without a tokenizer."""

import shutil

import audit_tiny
import pytest
from cli_tiny import done, last_line

from layerprune.documents import Plan, Receipt


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
    ("protect", "said"),
    [
        ("1-4", "the first (layer 0) and the last (layer 5) of 6 layers are to go"),
        ("2-5", "the first (layer 0) of 6 layers is to go"),
        ("0-3", "the last (layer 5) of 6 layers is to go"),
        ("0,-1", None),
    ],
)
@pytest.mark.parametrize("metric", ["magnitude", "reverse-order", "random"])
def test_a_plan_says_where_an_end_of_the_stack_goes(base, tmp_path, metric, protect, said):
    ran = done("plan", base, "--metric", metric, "--drop", 2, "--protect", protect, "-o", tmp_path)
    warnings = [each for each in Plan.load(tmp_path / "plan.json").warnings if "to go, which" in each]
    assert [each.partition(",")[0] for each in warnings] == ([] if said is None else [said])
    assert ran.stdout.replace("\n", " ").count("to go, which") == len(warnings)
    done("plan", "--scores", tmp_path / "scores.json", "--drop", 2, "-o", tmp_path / "again")
    again = [each for each in Plan.load(tmp_path / "again" / "plan.json").warnings if "to go, which" in each]
    assert again == warnings


@pytest.mark.parametrize("metric", ["magnitude", "reverse-order", "random"])
def test_what_reads_no_text_plans_and_exports_without_a_tokenizer(mute, tmp_path, metric):
    ran = done("plan", mute, "--metric", metric, "--drop", 2, "-o", tmp_path / "run")
    assert f"has no tokenizer: the metric {metric!r} needs none" in ran.stderr
    done("export", tmp_path / "run" / "plan.json", "-o", tmp_path / "smaller")
    assert len(Receipt.load(tmp_path / "smaller" / "layerprune" / "receipt.json").removal) == 2


def test_what_reads_text_says_that_there_is_no_tokenizer(base, mute, tmp_path):
    audit_tiny.questions(base, tmp_path, "toy", train=20, test=2)
    said = last_line("plan", mute, "--metric", "cosine", "--tasks", "toy", "--include-path", tmp_path, "--drop", 1,
                     "-o", tmp_path / "run")  # fmt: skip
    assert "has no tokenizer that transformers can read" in said
