"""The sentences of the README through click's runner, on a tiny model: every command, real from end to end."""

import json
import shutil

import pytest

import cli_tiny
from cli_tiny import done, last_line, layerprune, refused
from layerprune.artifacts import Audit, Plan, Receipt, Scores


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The tiny model, and the main sentence carried out once: plan, export, audit."""
    folder = cli_tiny.make(tmp_path_factory.mktemp("cli"))
    said = [
        done("plan", folder / "base", "--metric", "ablation", *tasks(folder), "--drop", 2, "-o", folder / "run"),
        done("export", folder / "run" / "plan.json", "-o", folder / "smaller"),
        done("audit", folder / "smaller", *tasks(folder)),
    ]
    (folder / "said.json").write_text(json.dumps([result.stdout for result in said]))
    return folder


def tasks(home):
    return ["--tasks", "toy", "--include-path", home / "tasks"]


def test_plan_writes_both_documents_and_no_weights(home):
    scores, plan = Scores.load(home / "run" / "scores.json"), Plan.load(home / "run" / "plan.json")
    assert plan.scores_sha256 == scores.sha256()
    assert plan.search.name == "greedy"  # the default for ablation
    assert len(plan.removal) == 2
    assert [len(entry.candidates) for entry in scores.rounds] == [6, 5]
    assert not list((home / "run").rglob("*.safetensors"))


def test_plan_prints_the_ranking_with_intervals_and_relevance_per_task(home):
    said = json.loads((home / "said.json").read_text())[0]
    scores, plan = Scores.load(home / "run" / "scores.json"), Plan.load(home / "run" / "plan.json")
    rows = {line.split()[0]: line for line in said.splitlines() if line.strip()[:1].isdigit()}
    first = scores.rounds[0].candidates
    assert [candidate.removal for candidate in first] == [(layer,) for layer in range(6)]
    for candidate in first:
        score, low, high = (min(value, 1.0) for value in (candidate.score, *candidate.interval))  # more is not shown
        assert f"{score:.4f}" in said
        assert f"{low:.4f} … {high:.4f}" in said
    assert "1st" in rows[str(plan.order[0])]
    assert f"to remove, by greedy: layers {', '.join(map(str, plan.removal))} of 6" in said


def test_export_and_audit_leave_a_whole_folder(home):
    folder = home / "smaller"
    receipt, audit = (kind.load(folder / "layerprune" / kind.filename) for kind in (Receipt, Audit))
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 4
    assert audit.receipt_sha256 == receipt.sha256()
    assert audit.verdict in json.loads((home / "said.json").read_text())[2]
    assert "toy" in (folder / "README.md").read_text()
    seen = {mark for data in Plan.load(home / "run" / "plan.json").data for mark in data.fingerprints}
    assert not seen & {mark for task in audit.tasks for mark in task.data.fingerprints}


def test_layers_named_by_hand_are_exported_and_audited_without_a_plan(home, tmp_path):
    words = done("export", home / "base", "--remove", "1,-1", "-o", tmp_path / "named").stdout
    assert "6 layers" in words
    assert "4 layers" in words
    words = done("audit", tmp_path / "named", "--tasks", "toy", "--include-path", home / "tasks", "--limit", 8).stdout
    assert "2 of 6" in words
    report = (tmp_path / "named" / "report.html").read_text()
    assert "chosen by</th><td>hand</td>" in report
    assert "the plan went by this" not in report
    assert "layerprune</span> <span>plan" not in report
    assert done("verify", tmp_path / "named").exit_code == 0


def test_layers_that_a_mergekit_file_leaves_out_are_exported_and_audited(home, tmp_path):
    given, out = tmp_path / "passthrough.yaml", tmp_path / "given"
    given.write_text(done("export", home / "run" / "plan.json", "--as", "mergekit").stdout)
    done("export", home / "base", "--remove", given, "-o", out)
    planned = home / "smaller" / "model.safetensors"
    assert (out / "model.safetensors").read_bytes() == planned.read_bytes()
    done("audit", out, "--tasks", "toy", "--include-path", home / "tasks", "--limit", 8)
    plan, audit = (kind.load(out / "layerprune" / kind.filename) for kind in (Plan, Audit))
    assert plan.seen == frozenset()
    assert audit.removal == Plan.load(home / "run" / "plan.json").removal
    assert plan.requested == f"--remove {','.join(map(str, plan.removal))}"  # the report repeats it without the file
    assert "chosen by</th><td>hand</td>" in (out / "report.html").read_text()
    assert done("verify", out).exit_code == 0


def test_what_is_named_by_hand_has_to_be_a_model_and_a_plan_has_its_layers(home, tmp_path):
    out = tmp_path / "named"
    assert "is a model and not a plan; name the layers to remove" in refused("export", home / "base", "-o", out)
    assert "--base is for a PLAN" in refused("export", home / "base", "--remove", 1, "--base", home / "base", "-o", out)
    assert "--revision is for a MODEL" in refused("export", home / "base", "--revision", "main", "-o", out)
    assert "--remove '9': layer 9 does not exist" in last_line("export", home / "base", "--remove", 9, "-o", out)
    assert not out.exists()


def test_planning_again_from_scores_needs_no_model(home, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("layerprune.models.model.LoadedModel.load", forbidden)
    done("plan", "--scores", home / "run" / "scores.json", "--drop", 2, "-o", tmp_path / "same")
    done("plan", "--scores", home / "run" / "scores.json", "--drop", 4, "--protect", "-1", "-o", tmp_path / "more")
    first, same, more = (Plan.load(path / "plan.json") for path in (home / "run", tmp_path / "same", tmp_path / "more"))
    assert same.order == first.order
    assert len(more.removal) == 4
    assert 5 not in more.removal
    assert (tmp_path / "more" / "scores.json").read_bytes() == (home / "run" / "scores.json").read_bytes()


def test_the_same_plan_is_byte_identical(home, tmp_path):
    done("plan", home / "base", *tasks(home), "--drop", 2, "-o", tmp_path / "again")
    for name in ("scores.json", "plan.json"):
        assert (tmp_path / "again" / name).read_bytes() == (home / "run" / name).read_bytes()


def test_score_then_plan_from_it_is_what_one_shot_plans(home, tmp_path):
    done("score", home / "base", "--metric", "cosine:tokens=last", *tasks(home), "-o", tmp_path / "cosine")
    done("plan", "--scores", tmp_path / "cosine" / "scores.json", "--drop", "33%", "-o", tmp_path / "cosine")
    plan = Plan.load(tmp_path / "cosine" / "plan.json")
    assert plan.metric.spec == "cosine:tokens=last"
    assert plan.search.name == "one-shot"
    scores = Scores.load(tmp_path / "cosine" / "scores.json")
    ordered = sorted(scores.rounds[0].candidates, key=lambda candidate: candidate.score)
    assert plan.order == tuple(candidate.removal[0] for candidate in ordered[:2])
    compared = done("compare", home / "run" / "scores.json", tmp_path / "cosine" / "scores.json")
    assert "Spearman" in compared.stdout


def test_a_compared_plan_is_audited_beside_the_checkpoint(home, tmp_path):
    done("plan", home / "base", "--metric", "reverse-order", "--drop", 2, "-o", tmp_path / "last")
    shutil.copytree(home / "smaller", tmp_path / "smaller")
    done("audit", tmp_path / "smaller", *tasks(home), "--compare", f"last={tmp_path / 'last' / 'plan.json'}")
    audit = Audit.load(tmp_path / "smaller" / "layerprune" / "audit.json")
    assert set(audit.tasks[0].models) == {"pruned", "last"}


def test_scores_that_are_replaced_take_the_plan_made_from_them_along(home, tmp_path):
    out = tmp_path / "run"
    done("plan", home / "base", "--metric", "reverse-order", "--drop", 2, "--search", "one-shot", "-o", out)
    done("score", home / "base", "--metric", "reverse-order", "-o", out, "--force")
    assert (out / "plan.json").exists()  # the very scores it was made from
    said = done("score", home / "base", "--metric", "random", "-o", out, "--force").stderr
    assert not (out / "plan.json").exists()
    assert f"removed: {out / 'plan.json'}" in said
    shutil.copy(home / "run" / "plan.json", out)  # made from other scores: it is none of theirs
    done("score", home / "base", "--metric", "reverse-order", "-o", out, "--force")
    assert (out / "plan.json").exists()


@pytest.mark.parametrize("search", ["one-shot", "blocks", "exchange"])
def test_every_search_plans_from_a_model(home, tmp_path, search):
    done("plan", home / "base", *tasks(home), "--drop", 2, "--search", search, "--protect", "0", "-o", tmp_path / "run")
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.search.name == search.partition(":")[0]
    assert len(plan.removal) == 2
    assert 0 not in plan.removal


def test_without_racing_every_candidate_sees_every_item(home, tmp_path):
    done("plan", home / "base", *tasks(home), "--no-racing", "--drop", 2, "-o", tmp_path / "run")
    scores = Scores.load(tmp_path / "run" / "scores.json")
    candidates = [candidate for entry in scores.rounds for candidate in entry.candidates]
    assert not any(candidate.stopped for candidate in candidates)
    assert len({candidate.tasks["toy"].items for candidate in candidates}) == 1


def test_text_and_speed_are_measured_when_asked_for_and_generation_can_be_left_out(home, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A line of running text for two small models to read. " * 60)
    words = [*tasks(home), "--limit", 20]
    for name in ("all", "none"):
        shutil.copytree(home / "smaller", tmp_path / name)
    said = done("audit", tmp_path / "all", *words, "--text", text, "--speed").stdout
    audit = Audit.load(tmp_path / "all" / "layerprune" / "audit.json")
    assert f"{audit.text.base_nats:.3f} -> {audit.text.nats:.3f} nats per token" in said
    assert f"{audit.generation.faulty} of {audit.generation.prompts} texts faulty" in said
    assert f"speed by {audit.speed.engine} on {audit.speed.device}" in said
    done("audit", tmp_path / "none", *words, "--no-generation")
    bare = Audit.load(tmp_path / "none" / "layerprune" / "audit.json")
    assert (bare.text, bare.generation, bare.speed) == (None, None, None)


def test_inspect_shows_the_stack(home):
    said = done("inspect", home / "base").stdout
    for fact in ("llama", "model.layers", "6 (numbered 0 to 5)", "num_hidden_layers", "0 to 5", "LlamaDecoderLayer"):
        assert fact in said


def test_metrics_lists_every_metric_with_its_options():
    from layerprune.scoring.metrics import METRICS

    said = done("metrics").stdout
    for name, entry in METRICS.entries().items():
        assert name in said
        assert entry.owner in said
    assert "'all' | 'last'" in done("metrics", "cosine").stdout


def test_quiet_prints_results_only(home, tmp_path):
    loud = layerprune("plan", home / "base", "--metric", "random", "--drop", 1, "-o", tmp_path / "a")
    quiet = layerprune("plan", home / "base", "--metric", "random", "--drop", 1, "-o", tmp_path / "b", "-q")
    assert "loading" in loud.stderr
    assert quiet.stderr == ""
    assert quiet.stdout.replace(str(tmp_path / "b"), "") == loud.stdout.replace(str(tmp_path / "a"), "")


def test_documents_are_not_replaced_unless_told(home, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(home / "run", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = ["plan", home / "base", "--metric", "random", "--drop", 1, "-o", folder]
    assert "plan.json exists; give another folder with -o, or --force" in refused(*again)
    (folder / "plan.json").unlink()
    assert "scores.json exists; plan from it with --scores" in refused(*again)
    other = ["plan", "--scores", home / "run" / "scores.json", "--drop", 1, "-o", folder]
    assert "scores.json exists" in refused(*other)
    score = ["score", home / "base", "--metric", "random", "-o", folder]
    assert "scores.json exists" in refused(*score)
    assert before["scores.json"] == (folder / "scores.json").read_bytes()
    done(*score, "--force")
    assert before["scores.json"] != (folder / "scores.json").read_bytes()
    done(*again, "--force")
    assert Plan.load(folder / "plan.json").metric.name == "random"


def test_a_traceback_is_shown_to_those_who_ask_twice(home, tmp_path):
    words = ["plan", home / "nowhere", "--drop", 1, "--metric", "random", "-o", tmp_path / "run"]
    assert "Traceback" not in layerprune(*words, "-v").stderr
    loud = layerprune(*words, "-vv")
    assert "Traceback" in loud.stderr
    assert loud.exit_code == 2


def test_ctrl_c_is_answered_with_how_to_go_on(home, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("layerprune.planner.plan_model", interrupted)
    result = layerprune("plan", home / "base", *tasks(home), "--drop", 1, "-o", tmp_path / "run")
    assert result.exit_code == 130
    assert result.stderr == "layerprune: interrupted; run the same command again: what was finished is kept\n"
