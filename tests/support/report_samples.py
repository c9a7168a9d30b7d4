"""A folder with a full audit of a 30-layer model, put together from drawn outcomes: what a report has to cope with."""

from __future__ import annotations

import random
from pathlib import Path

import audit_samples as samples
from layerprune.artifacts import (
    PRUNED,
    UNHEALED,
    Audit,
    BatchSpeed,
    Continuation,
    FlippedItem,
    Generation,
    LayerRanking,
    MeasuredSpeed,
    Outcomes,
    OwnAnswers,
    Ranked,
    Speed,
    TaskData,
    TextLoss,
)
from layerprune.auditor.comparison import adjusted, compare_task, overall, verdict
from layerprune.auditor.generation import SAMPLES, followed
from layerprune.auditor.layerwise import chosen, layerwise

DEPTH, REMOVAL, ORDER = 30, (3, 11, 19, 25), (19, 3, 25, 11)
TASKS = {"arc_easy": (0.25, 0.62), "a_task_with_a_very_long_name_indeed": (0.25, 0.55), "winogrande": (0.5, 0.5)}
LONG_WORD = "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2


def folder(where: Path, *, healed: bool = False, items: int = 240) -> Path:
    """Lay out plan, receipt and audit; weights are not there."""
    rng = random.Random(5)
    ranking = tuple(Ranked(unit=unit, score=rng.gauss(0.1, 0.08), interval=None) for unit in range(DEPTH))
    ranking = tuple(
        one.model_copy(update={"interval": (one.score - 0.07, one.score + 0.07)})
        for one in sorted(ranking, key=lambda one: one.score)
    )
    plan = samples.plan(removal=REMOVAL, order=ORDER, ranking=ranking)
    samples.exported(where, plan)
    receipt = samples.receipt(plan)
    labels = [PRUNED, "cosine", *([UNHEALED] if healed else [])]
    tasks = adjusted([_task(rng, name, labels, items) for name in TASKS])
    tasks = tuple(task.model_copy(update={"flipped": _flipped(rng, task.data.task)}) for task in tasks)
    parts = [(unit,) for unit in ORDER]
    asked = [*parts, *(tuple(sorted(ORDER[:count])) for count in (2, 3))]
    alone = {units: {t.data.task: _fewer(rng, t, 0.03 * len(units)) for t in tasks} for units in asked}
    everything, generation = overall(tasks), _generation(rng)
    own = tuple(_own_answers(rng, name, labels) for name in (f"writing_{LONG_WORD}", SAMPLES))
    other = {"removal": (4, 5, 6, 7), "plan_sha256": "9" * 64, "metric": "cosine"}
    Audit(
        verdict=verdict(REMOVAL, DEPTH, tasks, generation, own_answers=own),
        base=plan.model,
        pruned=receipt.result,
        removal=REMOVAL,
        plan_sha256=plan.sha256(),
        receipt_sha256=receipt.sha256(),
        heal_sha256="4" * 64 if healed else None,
        compared={label: {**other, "removal": REMOVAL} if label == UNHEALED else other for label in labels[1:]},
        tasks=tasks,
        overall=everything,
        bytes_before=269_030_016,
        bytes_after=250_000_000,
        cache_bytes_per_token=(23_040, 19_968),
        text=TextLoss(
            source="heldout.jsonl (sha256 0123456789ab)", windows=46, tokens=23_552, base_nats=3.163, nats=3.927,
            difference=0.764, interval=(0.71, 0.82), kl=0.83, top1_agreement=0.55,
        ),
        generation=generation,
        own_answers=own,
        speed=_speed(),
        layerwise=layerwise(alone, parts, tasks, UNHEALED if healed else PRUNED),
        rankings=(
            LayerRanking(
                metric="cosine", unit="1-cos", source=f"{2 * items} audit items",
                ranking=tuple(Ranked(unit=unit, score=abs(rng.gauss(0.05, 0.03))) for unit in range(DEPTH)),
            ),
        ),
        dtype="bfloat16",
        device="cpu",
        limit=items,
        seed=0,
        versions={"layerprune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
    ).save(where / "layerprune" / "audit.json")  # fmt: skip
    return where


def _task(rng, name, labels, items):
    chance, accuracy = TASKS[name]
    base = "".join("01"[rng.random() < accuracy] for _ in range(items))
    data = TaskData(
        task=name, split="half of validation", items=items, num_fewshot=0, metric="acc_norm", chance=chance,
        fingerprints=tuple(f"{name[:4]}{number:012x}" for number in range(items)),
    )  # fmt: skip
    models = {label: _outcomes(rng, _worse(rng, base, 0.05 + 0.04 * place)) for place, label in enumerate(labels)}
    return compare_task(data, [chance] * items, 100, _outcomes(rng, base), models, seed=0)


def _worse(rng, base, share):
    return "".join(bit if rng.random() > 2 * share else rng.choice("001") for bit in base)


def _fewer(rng, task, share):
    picked = "".join(task.base_outcomes.correct[place] for place in chosen(task.data.fingerprints))
    return _worse(rng, picked, share)


def _outcomes(rng, correct):
    gold = tuple(round(0.2 + 0.6 * (bit == "1") * rng.random(), 5) for bit in correct)
    return Outcomes(correct=correct, gold_probability=gold)


def _flipped(rng, name):
    return tuple(
        FlippedItem(
            fingerprint=f"{number:016x}", fixed=number > 5, question=f"Question {number} of {name}: {LONG_WORD}?",
            answers=("one thing", f"a <b>bold</b> answer {LONG_WORD}", "another", "none"), gold=(1,),
            base_gold_probability=rng.random(), gold_probability=rng.random(),
        )
        for number in range(8)
    )  # fmt: skip


def _own_answers(rng, name, labels):
    marks = tuple(f"{name[:4]}{number:012x}" for number in range(12))

    def outcomes(nats, share):
        read = [(round(-nats - 0.1 * rng.random(), 4), round(share - 0.2 * rng.random(), 5)) for _ in marks]
        answer, agreed = zip(*read, strict=True)
        return Outcomes(correct="0" * len(marks), answer=answer, agreed=agreed)

    base = outcomes(0.2, 1.0)
    models = {label: followed(base, outcomes(0.5 + 0.2 * place, 0.8), 0) for place, label in enumerate(labels)}
    return OwnAnswers(task=name, fingerprints=marks, tokens=431, base_outcomes=base, models=models)


def _generation(rng):
    said = "The sky is blue because of the way light is scattered. " * 3
    return Generation(
        prompts=3, max_new_tokens=48, faulty=1, base_faulty=0, agreement=0.31, healthy=False,
        continuations=tuple(
            Continuation(
                prompt=f"Explain to a child, in a few words, why the sky is blue. ({number})", base=said,
                pruned="the the the " * 16 if number == 1 else said, shared_tokens=3,
                faults=("repeats",) if number == 1 else (), base_faults=(), nats=1.2, base_nats=0.9,
            )
            for number in range(3)
        ),
    )  # fmt: skip


def _speed():
    def timed(prefill, decode, first):
        found = {"first_token_s": first, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
        return {name: MeasuredSpeed(median=value, low=0.97 * value, high=1.03 * value) for name, value in found.items()}

    return Speed(
        device="cpu, 1 thread", dtype="bfloat16", repeats=7, prompt_tokens=256, new_tokens=32,
        base=timed(1446, 16.6, 0.177), pruned=timed(1611, 18.0, 0.159), peak_bytes=None, layers_kept=26 / 30,
        engine="transformers 5.23.0", threads=1, batches=(
            BatchSpeed(batch_size=8, repeats=3, base=timed(1820, 96.1, 1.125), pruned=timed(2045, 109.3, 1.001)),
            BatchSpeed(batch_size=32, left_out="no room in memory for 32 sequences"),
        ),
    )  # fmt: skip
