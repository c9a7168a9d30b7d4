"""How far a plan goes: targets of size and speed, and as far as a loss can be ruled out. On a tiny model."""

import pytest

import audit_tiny
from cli_tiny import done, last_line, refused
from layerprune.artifacts import Plan, Receipt, Scores
from layerprune.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("goals")
    audit_tiny.base_model(folder / "base")
    audit_tiny.eval_set(folder / "base", folder / "tasks", "toy", train=20, test=2)
    audit_tiny.eval_set(folder / "base", folder / "tasks", "many", train=90, test=2)
    return folder


def plan(home, out, *words, task="toy"):
    return ["plan", home / "base", "--tasks", task, "--include-path", home / "tasks", "-o", out, *words]


def random(home, out, *words):
    return ["plan", home / "base", "--metric", "random", "-o", out, *words]


def test_a_number_of_parameters_is_reached_with_the_fewest_layers_and_export_writes_it(home, tmp_path):
    whole = Checkpoint.open(home / "base")
    layer = sum(t.elements for t in whole.tensors.values() if ".layers.3." in t.name)
    wanted = whole.parameters - 2 * layer - 5
    said = done(*random(home, tmp_path / "run", "--target-params", wanted)).stdout
    made = Plan.load(tmp_path / "run" / "plan.json")
    assert made.requested == f"--target-params {wanted}"
    assert len(made.removal) == 3
    assert made.target.model_dump() == {
        "what": "parameters", "wanted": wanted, "base": whole.parameters,
        "reached": whole.parameters - 3 * layer, "speed": None,
    }  # fmt: skip
    assert f"target: {whole.parameters - 3 * layer:,} parameters of {whole.parameters:,}" in said
    done("export", tmp_path / "run", "-o", tmp_path / "smaller")
    assert Receipt.load(tmp_path / "smaller/layerprune/receipt.json").result.parameters == made.target.reached


def test_a_size_is_reached_exactly(home, tmp_path):
    whole = Checkpoint.open(home / "base")
    layer = sum(t.nbytes for t in whole.tensors.values() if ".layers.3." in t.name)
    done(*plan(home, tmp_path / "run", "--target-bytes", whole.nbytes - 2 * layer))
    made = Plan.load(tmp_path / "run" / "plan.json")
    assert (len(made.removal), made.target.what, made.target.reached) == (2, "bytes", whole.nbytes - 2 * layer)
    done(*plan(home, tmp_path / "drop", "--drop", 2))
    same = Plan.load(tmp_path / "drop" / "plan.json")
    assert (made.order, made.predicted) == (same.order, same.predicted)
    done("export", tmp_path / "run", "-o", tmp_path / "smaller")
    assert Receipt.load(tmp_path / "smaller/layerprune/receipt.json").bytes_after == made.target.reached


def test_layers_of_different_sizes_count_as_what_they_weigh(tmp_path, home):
    """A model whose first layers are dense and whose others hold experts: the fewest layers depends on which go."""
    from layerprune.architecture.tiny import save_tiny

    save_tiny("deepseek_v3", tmp_path / "moe", num_hidden_layers=6, first_k_dense_replace=3)
    for path in (home / "base").glob("tokenizer*"):
        (tmp_path / "moe" / path.name).write_bytes(path.read_bytes())
    whole = Checkpoint.open(tmp_path / "moe")
    sizes = [sum(t.elements for t in whole.tensors.values() if f".layers.{i}." in t.name) for i in range(6)]
    assert len(set(sizes)) > 1
    words = ["plan", tmp_path / "moe", "--metric", "reverse-order", "--target-params"]
    for wanted in (whole.parameters - sizes[5], whole.parameters - sizes[5] - 1, whole.parameters - sum(sizes[3:]) - 1):
        out = tmp_path / str(wanted)
        done(*words, wanted, "-o", out)
        made = Plan.load(out / "plan.json")
        assert made.target.reached == whole.parameters - sum(sizes[layer] for layer in made.removal) <= wanted
        assert whole.parameters - sum(sizes[layer] for layer in made.order[:-1]) > wanted


def test_what_cannot_be_reached_is_refused_with_what_can(home, tmp_path):
    out = tmp_path / "out"
    whole = Checkpoint.open(home / "base")
    layer = sum(t.elements for t in whole.tensors.values() if ".layers.3." in t.name)
    said = refused(*plan(home, out, "--target-params", "1K"))
    assert said == (
        f"--target-params 1K cannot be reached: 5 of 6 layers may go, which leaves {whole.parameters - 5 * layer:,} "
        f"parameters of {whole.parameters:,} parameters"
    )
    said = refused(*plan(home, out, "--target-params", "1K", "--no-adjacent", "--protect", "0"))
    assert "3 of 6 layers may go, which leaves" in said
    assert "as it is; ask for less" in refused(*plan(home, out, "--target-params", "1B"))
    assert "as it is; ask for less" in refused(*plan(home, out, "--target-bytes", "1GB"))
    assert "--target-bytes 1KB cannot be reached" in refused(*plan(home, out, "--target-bytes", "1KB"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("goal", "answer"),
    [
        ("--target-speedup 1.1x", "--target-speedup 1.1x cannot begin: none of the 6 layers may go"),
        ("--max-drop 2%", "--max-drop 2% --confidence 95% cannot begin: none of the 6 layers may go"),
        ("--front", "--front --up-to 75% cannot begin: no 5 layers or fewer may go"),
        ("--front --up-to 1", "--front --up-to 1 cannot begin: no 1 layers or fewer may go"),
        ("--drop 1", "cannot remove 1 layers: of 6 layers 0 may go (protected: 0, 1, 2, 3, 4, 5)"),
    ],
)
def test_nothing_may_go(home, tmp_path, goal, answer):
    assert refused(*plan(home, tmp_path / "out", *goal.split(), "--protect", "0,1,2,3,4,5")) == answer
    assert not (tmp_path / "out").exists()


def test_shapes_reach_the_plan_and_its_limits(home, tmp_path):
    done(*plan(home, tmp_path / "apart", "--drop", 3, "--no-adjacent"))
    made = Plan.load(tmp_path / "apart" / "plan.json")
    assert all(b - a > 1 for a, b in zip(made.removal, made.removal[1:], strict=False))
    assert made.limits.no_adjacent
    done(*plan(home, tmp_path / "run", "--drop", 3, "--contiguous"))
    made = Plan.load(tmp_path / "run" / "plan.json")
    assert made.removal[2] - made.removal[0] == 2
    assert made.limits.contiguous
    again = ["plan", "--scores", tmp_path / "apart" / "scores.json", "--drop", 2, "--search", "one-shot"]
    done(*again, "--contiguous", "-o", tmp_path / "again")
    made = Plan.load(tmp_path / "again" / "plan.json")
    assert made.removal[1] - made.removal[0] == 1
    said = refused(*plan(home, tmp_path / "no", "--drop", 4, "--no-adjacent"))
    assert said == "cannot remove 4 of 6 layers: at most 3 may go with no two adjacent"
    assert not (tmp_path / "no").exists()


def test_a_search_that_breaks_a_rule_is_found_out(home, tmp_path, monkeypatch):
    from layerprune.search.base import SearchResult
    from layerprune.search.searches import OneShot

    monkeypatch.setattr(OneShot, "find", lambda self, judge, constraints, drop, **more: SearchResult((0, 1), (), ()))
    said = last_line(*random(home, tmp_path / "run", "--drop", 2, "--no-adjacent", "--search", "one-shot"))
    assert "found {0, 1}, which may not go: 0 and 1 are adjacent" in said
    assert not (tmp_path / "run").exists()


# --- as far as a loss can be ruled out


def test_the_largest_certified_removal_is_planned_with_its_guarantee(home, tmp_path):
    words = ("--max-drop", "60%", "--confidence", "90%", "--limit", 30, "--certify-limit", 60)
    said = done(*plan(home, tmp_path / "run", *words, task="many")).stdout
    made, scores = Plan.load(tmp_path / "run" / "plan.json"), Scores.load(tmp_path / "run" / "scores.json")
    found = made.certificate
    assert f"certified: {found.statement}" in said
    assert made.requested == "--max-drop 60% --confidence 90%"
    assert (found.limit, found.confidence) == (0.6, 0.9)
    assert (found.selection_limit, found.certify_limit) == (30, 60)
    assert "With 90 % confidence, removing" in found.statement
    assert "by less than 60 points" in found.statement
    assert found.statement.endswith("Not looked at: generated text")
    certified = [step for step in found.steps if step.certified]
    assert certified
    assert made.removal == certified[-1].removal
    assert all(step.p_value <= 0.1 for step in certified)
    assert [len(step.removal) for step in found.steps] == list(range(1, len(found.steps) + 1))
    assert len(found.steps) == 5 or found.steps[-1].p_value > 0.1
    # three slices that share no item, all of them in the plan
    seen = {mark for data in made.data for mark in data.fingerprints}
    certifying = set(found.fingerprints["many"])
    judged = scores.rounds[0].candidates[0].tasks["many"].items
    assert certifying < seen
    assert len(seen) == judged + made.predicted.tasks["many"].items + len(certifying) == made.data[0].items


def test_the_model_card_states_the_guarantee(home, tmp_path):
    words = ("--metric", "cosine", "--max-drop", "95%", "--up-to", 1, "--limit", 30, "--certify-limit", 60)
    done(*plan(home, tmp_path / "run", *words, task="many"))
    done("export", tmp_path / "run", "-o", tmp_path / "smaller")
    statement = Plan.load(tmp_path / "run" / "plan.json").certificate.statement
    assert f"Certified: {statement}." in (tmp_path / "smaller" / "README.md").read_text()


def test_a_recipe_says_how_far_to_go_in_the_same_words(home, tmp_path):
    whole = Checkpoint.open(home / "base")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {home / 'base'}\ninclude_path: [{home / 'tasks'}]\nscore:\n  tasks: toy\n  metric: cosine\n"
        f"plan:\n  target_params: {whole.parameters - 5}\n  protect: 5\n  no_adjacent: true\n"
        "audit:\n  tasks: many\n  limit: 2\n  generation: false\n"
    )
    done("run", recipe, "-o", tmp_path / "run")
    made = Plan.load(tmp_path / "run" / "plan.json")
    assert made.requested == f"--target-params {whole.parameters - 5}"
    assert (len(made.removal), made.limits.no_adjacent, made.limits.protect) == (1, True, (5,))
    again = done("run", recipe, "-o", tmp_path / "run")
    assert "score, plan: done before" in again.stderr
    assert "plan.target_params" in refused("run", recipe, "--set", "plan.target_params=many", "-o", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_certifies_has_had_no_say_in_the_search(home, tmp_path, monkeypatch):
    """Whatever the certification items answer, the path is the same: only its length can change."""
    import layerprune.planner.goals as certifying

    words = ("--max-drop", "95%", "--limit", 30, "--certify-limit", 60)
    done(*plan(home, tmp_path / "a", *words, "--up-to", 3, task="many"))
    bits = certifying.correct_bits
    monkeypatch.setattr(certifying, "correct_bits", lambda outcomes: bits(outcomes)[::-1])
    done(*plan(home, tmp_path / "b", *words, "--up-to", 2, task="many"))
    longer, shorter = (Plan.load(tmp_path / name / "plan.json") for name in "ab")
    assert (len(longer.removal), len(shorter.removal)) == (3, 2)
    assert longer.order[:2] == shorter.order


def test_too_few_items_to_certify_anything(home, tmp_path):
    said = last_line(*plan(home, tmp_path / "a", "--max-drop", "2%", "--limit", 30, "--certify-limit", 60, task="many"))
    assert "--max-drop 2% --confidence 95%: " in said
    assert "can certify nothing, not even a removal that changes no answer: 149 at least" in said
    said = last_line(*plan(home, tmp_path / "b", "--max-drop", "6%", "--limit", 30, "--certify-limit", 60, task="many"))
    assert said.startswith("no removal can be certified to lose less than 6 points with 95 % confidence: without {")
    assert "if that is its true loss, " in said
    assert not list(tmp_path.rglob("plan.json"))


def test_a_cheap_metric_is_certified_on_items_it_does_not_read(home, tmp_path):
    words = ("--metric", "cosine", "--max-drop", "95%", "--up-to", 2, "--limit", 30, "--certify-limit", 60)
    done(*plan(home, tmp_path / "run", *words, task="many"))
    made = Plan.load(tmp_path / "run" / "plan.json")
    assert made.metric.name == "cosine"
    assert made.certificate.steps[-1].certified
    assert made.predicted.tasks["many"].items == 6
    assert "give tasks" in refused(*random(home, tmp_path / "no", "--max-drop", "2%"))
    assert not (tmp_path / "no").exists()
