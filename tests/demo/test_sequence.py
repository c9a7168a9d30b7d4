"""The demonstration from end to end, on a tiny model and made-up questions in place of what it would fetch."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli_tiny
from demo import sequence
from demo.__main__ import demo
from demo.display import shown
from demo.sequence import ABLATION, COSINE, Amounts, Chosen, Finished, Ranked, Spoken, run_demo
from demo_fakes import Heard
from layerprune.artifacts import PRUNED, Audit, Plan, Receipt, Scores
from layerprune.errors import UsageError

FOLDER = Path(sequence.__file__).parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return cli_tiny.make(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def ran(home):
    """Every result of one run, and what its progress heard."""
    heard = Heard()
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch, home)
        results = list(run_demo(home / "out", amounts=Amounts(cosine=20, audit=40), progress=heard))
    return {type(result): result for result in results}, [type(result) for result in results], heard


def stand_in(patch, home):
    patch.setattr(sequence, "fetch_model", lambda cache, progress, probe: home / "base")
    patch.setattr(sequence, "fetch_questions", lambda cache, progress, probe: None)
    patch.setattr(sequence, "_reading", lambda data, tasks=(): {"tasks": ("toy",), "include_path": (home / "tasks",)})


def test_results_come_in_the_order_of_the_work(ran):
    assert ran[1] == [Ranked, Chosen, Receipt, Audit, Spoken, Finished]


def test_both_metrics_judge_the_same_items_and_each_plans_to_remove_four(ran, home):
    chosen = ran[0][Chosen]
    assert chosen.comparison.agreement.n == 6
    for metric in (COSINE, ABLATION):
        scores, plan = (kind.load(home / "out" / metric / kind.filename) for kind in (Scores, Plan))
        assert (scores, plan) == (chosen.scores[metric], chosen.plans[metric])
        assert (plan.metric.name, plan.search.name, len(plan.removal)) == (metric, "one-shot", 4)
        assert [candidate.removal for candidate in scores.rounds[0].candidates] == [(layer,) for layer in range(6)]
    assert chosen.scores[COSINE].data == chosen.scores[ABLATION].data  # all 20 items fit into ablation's budget
    assert (home / "out" / ABLATION / "budget.json").exists()
    assert ran[0][Ranked].scores == chosen.scores[COSINE]


def test_the_ablation_plan_is_exported_and_audited_beside_cosines_on_unseen_items(ran, home):
    receipt, audit, chosen = ran[0][Receipt], ran[0][Audit], ran[0][Chosen]
    assert receipt.removal == chosen.plans[ABLATION].removal
    assert audit == Audit.load(home / "out" / "smaller" / "layerprune" / "audit.json")
    assert audit.compared[COSINE].removal == chosen.plans[COSINE].removal
    assert set(audit.overall) == {PRUNED, COSINE}
    seen = {mark for plan in chosen.plans.values() for data in plan.data for mark in data.fingerprints}
    asked = {mark for task in audit.tasks for mark in task.data.fingerprints}
    assert len(asked) == 40
    assert not seen & asked


def test_both_models_write_and_every_path_named_is_there(ran):
    spoken, finished = ran[0][Spoken], ran[0][Finished]
    assert spoken.base
    assert spoken.pruned
    assert spoken.base != spoken.pruned  # four of six layers of this model cannot go unnoticed
    assert len(finished.paths) == 7
    assert all(path.exists() for path in finished.paths)
    assert finished.seconds > 0


def test_the_whole_is_estimated_from_the_first_step_to_the_last(ran):
    done, total = ran[2].done["the whole demonstration"]
    assert done == pytest.approx(total)


def test_what_is_printed_names_what_a_reader_needs(ran):
    said = "\n".join(str(part) for kind in ran[1] for part in shown(ran[0][kind]) if isinstance(part, str))
    chosen, audit = ran[0][Chosen], ran[0][Audit]
    assert "Spearman" in said
    assert "unrelated rankings: 0 ± 0.45" in said  # 1/sqrt(6 - 1)
    for metric in (COSINE, ABLATION):
        removed = ", ".join(str(layer) for layer in chosen.plans[metric].removal)
        assert f"{metric} would remove layers {removed}" in said
    assert audit.verdict in said
    assert f"cosine, on the same items: accuracy {100 * audit.overall[COSINE].difference:+.1f} points" in said
    for path in ran[0][Finished].paths:
        assert str(path) in said


def test_a_folder_in_use_is_refused_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(sequence, "fetch_model", lambda *args: pytest.fail("fetched"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        next(run_demo(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_it_is_run_by_its_folder_from_anywhere_and_answers_faults_in_one_line(tmp_path):
    (tmp_path / "mine").write_text("")
    ran = subprocess.run([sys.executable, FOLDER, "-o", tmp_path], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"layerprune: {tmp_path} is not empty; give")
    assert ran.stderr.count("\n") == 1
    for example in demo.examples:
        assert example in CliRunner().invoke(demo, ["-h"]).stdout
        assert shlex.split(example)[:2] == ["python", str(FOLDER.relative_to(FOLDER.parents[1]))]
        demo.make_context("demo", shlex.split(example)[2:])  # raises where an option does not exist


def test_the_command_runs_it_in_a_new_folder_each_time(home, monkeypatch, tmp_path):
    stand_in(monkeypatch, home)
    monkeypatch.setattr(sequence, "Amounts", lambda: Amounts(cosine=20, audit=20))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layerprune-demo").mkdir()
    ran = CliRunner().invoke(demo, ["-q"])
    assert ran.exit_code == 0, ran.stderr
    assert "done in" in ran.stdout
    assert Path("layerprune-demo-2", "smaller", "model.safetensors").is_file()
    assert list(Path("layerprune-demo").iterdir()) == []
