"""Slow: a real model and real benchmarks, against lm-eval on physically pruned checkpoints.

Needs ``LAYERPRUNE_EVAL`` (a folder with lm-eval YAMLs in ``tasks/``; ``../shared/eval`` by default). The model is the
one that ``make demo`` fetches, or the folder ``LAYERPRUNE_MODEL``.
"""

from __future__ import annotations

from pathlib import Path

from checkout import EVAL
from families import make_plan
from layerprune.removal import Removal
from real_model import model, pytestmark  # noqa: F401  a fixture and marks

TASKS = ("local_arc_easy", "local_hellaswag")
LAYERS = (0, 8, 15, 22, 29)
ITEMS = 200


def decisions_by_lm_eval(folder: Path) -> dict[str, dict[str, str]]:
    """Return lm-eval's per-item values on a checkpoint, by task and metric."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "dtype": "float32"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(EVAL / "tasks"), include_defaults=False),
        limit=ITEMS,
        batch_size=16,
        bootstrap_iters=0,
        device="cpu",
    )
    return {
        task: {
            metric: "".join(str(int(s[metric])) for s in sorted(samples, key=lambda s: s["doc_id"]))
            for metric in ("acc", "acc_norm")
        }
        for task, samples in found["samples"].items()
    }


def test_ablation_equals_lm_eval_on_the_physically_pruned_model(model, tmp_path):  # noqa: F811
    """At least 99.5 % of the decisions, and every accuracy within one item, for each of five layers."""
    from layerprune.data.tasks import load_eval_set
    from layerprune.exporter import export
    from layerprune.models.model import LoadedModel
    from layerprune.scoring.engine import Engine
    from layerprune.scoring.evaluator import evaluate

    loaded = LoadedModel.load(str(model), dtype="float32")
    eval_set = load_eval_set(TASKS, loaded.encoder, use="evaluation", include_path=[EVAL / "tasks"], limit=ITEMS)
    engine = Engine(loaded)
    own = evaluate(engine, eval_set, [Removal.of(layer) for layer in LAYERS])
    assert engine.path.name == "trees"
    same = total = 0
    for layer in LAYERS:
        export(make_plan(model, Removal.of(layer)), tmp_path / f"without-{layer}")
        theirs = decisions_by_lm_eval(tmp_path / f"without-{layer}")
        for task in TASKS:
            mine = own[Removal.of(layer)][task].correct
            reference = theirs[task][eval_set.tasks[task].metric]
            equal = sum(a == b for a, b in zip(mine, reference, strict=True))
            right = f"{mine.count(chr(49))} against {reference.count(chr(49))} right"
            print(f"layer {layer} {task}: {right}, {equal} of {len(mine)} decisions equal")
            assert abs(mine.count("1") - reference.count("1")) <= 1
            same, total = same + equal, total + len(mine)
    assert same / total >= 0.995
