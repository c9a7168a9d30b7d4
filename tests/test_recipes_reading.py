"""What a recipe says, held against what goals, searches and healers take, before anything slow."""

import sys

import pytest

from layerprune.errors import DocumentError
from layerprune.recipes import read_recipe
from recipe_samples import GOOD, written

__all__ = ["written"]  # a fixture


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("drop: 2\n  max_drop: 2%", "plan: drop and max_drop are given; give one of drop, target_params,"),
        ("drop: 2\n  confidence: 90%", "plan: confidence belongs to max_drop, and drop is given"),
        ("drop: 2\n  no_adjacent: true\n  contiguous: true", "plan: no_adjacent and contiguous exclude each other"),
        ("max_drop: 2", "plan.max_drop: --max-drop '2' is not a share between 0% and 100%; write 2%"),
        ("max_drop: 2%\n  confidence: sure", "plan.confidence: --confidence 'sure' is not a share"),
        ("max_drop: 2%\n  up_to: none", "plan.up_to: --up-to 'none' is neither a count nor a share"),
        ("max_drop: 2%\n  certify_limit: 0", "plan.certify_limit: 0 is not in the range 1 to 1000000000"),
        ("target_params: many", "plan.target_params: --target-params 'many' is not a number of parameters"),
        ("target_speedup: 0.5", "plan.target_speedup: --target-speedup '0.5' is not a speed-up; write 1.3x"),
        ("target_bytes: 5 apples", "plan.target_bytes: --target-bytes '5 apples' is not a size"),
    ],
)
def test_one_goal_and_what_belongs_to_it(written, lines, message):
    with pytest.raises(DocumentError) as raised:
        read_recipe(written(f"model: org/name\nscore:\n  tasks: [arc_easy]\nplan:\n  {lines}\n"))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("line", ["max_drop: 2%", "target_params: 1.2B", "target_speedup: 1.3", "target_bytes: 2GB"])
def test_goals_are_written_as_on_the_command_line(written, line):
    recipe = read_recipe(written(f"model: org/name\nscore:\n  tasks: [arc_easy]\nplan:\n  {line}\n"))
    key, value = line.split(": ")
    assert recipe.plan.model_dump(exclude_defaults=True) == {key: value}


@pytest.mark.parametrize("given", ["weights: arc_easy", "floor: [arc_easy]", "weights: 3"])
def test_figures_in_another_form_are_a_fault_with_its_line(written, given):
    path = written(GOOD.replace("  limit: 20\n", f"  {given}\n"))
    with pytest.raises(DocumentError, match=rf"recipe.yaml:4: score.{given.partition(':')[0]}"):
        read_recipe(path)


def test_healing_that_reads_text_asks_for_it_before_anything_slow(written):
    with pytest.raises(DocumentError, match=r"recipe.yaml:8: heal: linear reads text: give a corpus"):
        read_recipe(written(GOOD + "heal:\n  method: linear\n"))
    with pytest.raises(DocumentError, match=r"heal\.window"):
        read_recipe(written(GOOD + "heal:\n  method: linear\n  corpus: builtin\n  window: 1\n"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("audit:\n  speed: true\n  speed_engine: vllm\n", "audit: --speed-engine vllm: vLLM is not installed; pip"),
        ("audit:\n  speed_engine: vllm\n", "audit: --speed-engine vllm belongs to --speed, which is not given"),
        ("audit:\n  speed: true\n  speed_engine: sglang\n", "audit.speed_engine: 'sglang' is not one of transformers"),
    ],
)
def test_an_engine_that_is_not_here_is_told_of_before_anything_slow(written, monkeypatch, lines, message):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(DocumentError) as raised:
        read_recipe(written(GOOD + lines))
    assert message in str(raised.value)


def test_a_plan_is_not_timed_by_vllm(written):
    with pytest.raises(DocumentError, match=r"plan.speed_engine: --speed-engine vllm reads checkpoints"):
        read_recipe(written(GOOD.replace("plan:\n", "plan:\n  speed_engine: vllm\n")))
