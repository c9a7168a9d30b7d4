"""Small documents for tests of cards, audits and reports: written out in full, so that a test can change one thing."""

from __future__ import annotations

import json
from pathlib import Path

from layerprune.artifacts import (
    PRUNED,
    Candidate,
    MetricRef,
    ModelRef,
    Outcomes,
    Plan,
    Ranked,
    Receipt,
    Round,
    Scores,
    SearchRef,
    TaskData,
)


def model_ref(**changes):
    fields = {
        "id": "some-org/Some-135M",
        "revision": "abc123",
        "fingerprint": "sha256:" + "1" * 64,
        "model_type": "llama",
        "layers": 30,
        "parameters": 134_515_008,
    }
    return ModelRef(**(fields | changes))


def plan(**changes):
    fields = {
        "model": model_ref(),
        "metric": MetricRef(
            name="ablation", spec="ablation", options={}, unit="relevance", scope="any", owner="layerprune 0.1.0"
        ),
        "search": SearchRef(name="greedy"),
        "limits": {},
        "requested": "2",
        "removal": (3, 11),
        "order": (11, 3),
        "ranking": (Ranked(unit=11, score=0.01), Ranked(unit=3, score=0.02)),
        "scores_sha256": "2" * 64,
        "data": (
            TaskData(
                task="toy", split="train", items=2, fingerprints=("s1", "s2"), num_fewshot=0, metric="acc", chance=0.25
            ),
        ),
        "seed": 0,
        "versions": {"layerprune": "0.1.0", "transformers": "5.23.0"},
    }
    return Plan(**(fields | changes))


def receipt(of=None, **changes):
    of = of or plan()
    fields = {
        "base": of.model,
        "result": of.model.model_copy(
            update={
                "layers": of.model.layers - len(of.removal),
                "parameters": 125_000_000,
                "fingerprint": "sha256:" + "3" * 64,
            }
        ),
        "removal": of.removal,
        "plan_sha256": of.sha256(),
        "files": {},
        "dropped_tensors": 18,
        "bytes_before": 269_030_016,
        "bytes_after": 250_000_000,
        "config_changes": {"num_hidden_layers": {"before": 30, "after": 28}},
        "versions": {"layerprune": "0.1.0"},
    }
    return Receipt(**(fields | changes))


def exported(folder: Path, of=None, **receipt_changes) -> Path:
    """Lay out what export leaves, without weights."""
    of = of or plan()
    of.save(folder / "layerprune" / "plan.json")
    receipt(of, **receipt_changes).save(folder / "layerprune" / "receipt.json")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 28}))
    return folder


def outcomes(correct, gold=None):
    return Outcomes(correct=correct, gold_probability=gold)


def task(name, base, chance=0.25, gold=None, **models):
    data = TaskData(
        task=name,
        split="test",
        items=len(base),
        fingerprints=tuple(f"{name}-{i}" for i in range(len(base))),
        num_fewshot=0,
        metric="acc",
        chance=chance,
    )
    from layerprune.auditor.comparison import compare_task  # loads torch, which the other samples do without

    made = {PRUNED if label == "pruned" else label: outcomes(*given) for label, given in models.items()}
    return compare_task(data, [chance] * len(base), 3, outcomes(base, gold), made, seed=0)


def scores(**changes):
    fields = {
        "model": model_ref(),
        "metric": plan().metric,
        "data": plan().data,
        "rounds": (Round(removed=(), candidates=(Candidate(removal=(3,), score=0.5, interval=(0.1, 0.9)),)),),
        "seed": 0,
        "versions": {"layerprune": "0.1.0"},
    }
    return Scores(**(fields | changes))
