"""Recipes as files: every fault at once with its line, changes from the command line, and the recipes we ship."""

import pytest

from checkout import ROOT
from layerprune.artifacts import Recipe, StudyRecipe
from layerprune.artifacts.recipe import difference
from layerprune.errors import DocumentError, UsageError
from recipe_samples import GOOD, written

__all__ = ["written"]  # a fixture
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def faults(path, *changes):
    with pytest.raises(DocumentError) as raised:
        Recipe.load(path, changes)
    return [line.removeprefix(str(path)) for line in str(raised.value).splitlines()]


def test_a_recipe_is_read_as_people_write_it(written):
    recipe = Recipe.load(written(GOOD))
    assert recipe.score.tasks == ("arc_easy", "hellaswag")
    assert recipe.plan.drop == "25%"
    assert recipe.plan.protect == "0,1,-1"
    assert Recipe.load(written(GOOD.replace("25%", "6"))).plan.drop == "6"
    assert Recipe.load(written(GOOD.replace("[arc_easy, hellaswag]", "arc_easy, hellaswag"))) == recipe


def test_a_saved_recipe_reads_the_same(written, tmp_path):
    recipe = Recipe.load(written(GOOD))
    assert Recipe.load(recipe.save(tmp_path / "recipe.json")) == recipe


def test_every_fault_is_reported_at_once_with_its_line(written):
    path = written(
        "model: org/name\n"
        "revison: main\n"
        "score:\n"
        "  taks: [arc_easy]\n"
        "  limit: 5\n"
        "  limit: none of it\n"
        "plan:\n"
        "  protect: 0\n"
        "audit: everything\n"
        "batch_size: autoo\n"
        "memory: lots\n"
        "include_path: [a, 3]\n"
    )
    with pytest.raises(DocumentError) as raised:
        Recipe.load(path)
    first, *others = str(raised.value).splitlines()
    assert first == f"{path} has 10 faults"
    told = [line.removeprefix(f"{path}:").partition(" Known:")[0] for line in others]
    assert told == [
        "2: revison: unknown key. Did you mean 'revision'?",
        "3: score.tasks: this key is needed",
        "4: score.taks: unknown key. Did you mean 'tasks'?",
        "6: score.limit: this key is given twice",
        "6: score.limit: 'none of it' is not a whole number from 1 to 1000000000",
        "7: plan: nothing says how far to go; give one of drop, target_params, target_bytes, target_speedup, max_drop",
        "9: audit: this key holds further keys; got 'everything'",
        "10: batch_size: 'autoo' is neither auto nor a number from 1 to 1000000",
        "11: memory: 'lots' is not a size; write 5GB or 500MB",
        "12: include_path: 3 is not a path",
    ]


def test_changes_from_the_command_line_come_on_top(written):
    path = written(GOOD)
    changes = ("model=/models/mine", "plan.drop=3", "audit.limit=7", "score.tasks=[piqa]")
    recipe = Recipe.load(path, changes)
    assert (recipe.model, recipe.plan.drop, recipe.audit.limit) == ("/models/mine", "3", 7)
    assert recipe.score.tasks == ("piqa",)


def test_a_faulty_change_is_a_fault_without_a_line(written):
    path = written(GOOD)
    assert faults(path, "score.limt=3")[0].startswith(": score.limt: unknown key. Did you mean 'limit'?")
    assert faults(path, "model.name=3") == [": model.name: 'model' has no keys below it (from --set model.name=3)"]
    assert faults(path, "score.limit=[") == [": score.limit: '[' is not a YAML value (from --set)"]
    with pytest.raises(UsageError, match=r"--set 'drop' is not a change; write --set score.limit=100"):
        Recipe.load(path, ("drop",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [unclosed\n", r"recipe.yaml:2: not YAML: "),
        ("- a\n- b\n", r"holds list where a recipe's keys are expected"),
        ("", r"holds NoneType where a recipe's keys are expected"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_line(written, text, message):
    with pytest.raises(DocumentError, match=message) as raised:
        Recipe.load(written(text))
    assert "\n" not in str(raised.value)


def test_a_missing_recipe_is_refused(tmp_path):
    with pytest.raises(DocumentError, match=r"none\.yaml does not exist; expected a recipe"):
        Recipe.load(tmp_path / "none.yaml")


def test_differences_are_named_by_key(written):
    before = Recipe.load(written(GOOD))
    after = Recipe.load(written(GOOD.replace("20", "30").replace("org/name", "org/other")))
    assert difference(before, after) == ["model: org/name -> org/other", "score.limit: 20 -> 30"]
    assert difference(before, before) == []


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_sound_and_headed_by_the_command_that_runs_them(path):
    recipe = (StudyRecipe if path.stem == "study" else Recipe).load(path)
    first = path.read_text().splitlines()[0]
    assert first == f"# layerprune run recipes/{path.name} -o {path.stem}/"
    assert (recipe.study if path.stem == "study" else recipe.score).tasks


def test_the_promised_recipes_are_there():
    assert {"quickstart", "cosine-baseline", "paper-ablation", "study"} <= {path.stem for path in RECIPES}
    paper = next(path for path in RECIPES if path.stem == "paper-ablation")
    assert "mmlu" not in Recipe.load(paper).score.tasks  # 57 tasks, each of which would count like one


def test_a_date_that_no_calendar_has_is_not_yaml(written):
    with pytest.raises(DocumentError, match="not YAML"):
        Recipe.load(written(GOOD + "revision: 2024-02-30\n"))
    assert "is not a YAML value" in faults(written(GOOD), "revision=2024-02-30")[0]
