"""The main job from end to end on a small real model, result by result."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.cache import cache_dir
from demo.hub import Probe, probe_hub
from demo.model import fetch_model
from demo.questions import fetch_questions
from demo.steps import Steps
from layerprune.artifacts import Audit, Plan, Receipt, Scores
from layerprune.errors import UsageError
from layerprune.files import locked
from layerprune.scoring.aggregation import ScoresComparison, compare_scores
from layerprune.util import SILENT, Progress

DROP = "4"
COSINE, ABLATION = "cosine", "ablation"
# On a hundred items a task accuracy, a step an item, leaves most layers tied. Four layers chosen by it were worse than
# cosine's on 1,500 unseen items; four chosen by the gold answer's probability were better (see the note on the engine).
SPECS = {COSINE: "cosine", ABLATION: "ablation:signal=probability"}
# The shortest of the tasks that are fetched chooses: the most items in the same time, and the intact model is clearly
# above chance on few of them. Another judges beside it, which no plan has seen.
CHOOSING, JUDGING = ("arc_easy",), ("arc_easy", "piqa")
PROMPT = "The most important thing to know about the Moon is that"
NEW_TOKENS = 40


@dataclass(frozen=True)
class Amounts:
    """How much is asked. The defaults keep the whole demonstration within five minutes on any two CPU cores."""

    budget: str = "2m"  # of ablation, whose items are as many as fit; measured: docs/notes/2026-11-29-demo.md
    cosine: int = 100  # items that cosine reads: one pass over each, so its ranking is there at once
    audit: int = 150  # items of each task that judge at most, and no more than four times those that chose
    seed: int = 10  # which items choose


@dataclass(frozen=True)
class Ranked:
    """The first ranking, there within a minute or so."""

    scores: Scores


@dataclass(frozen=True)
class Chosen:
    """Both rankings and what each would remove."""

    comparison: ScoresComparison
    scores: dict[str, Scores]
    plans: dict[str, Plan]


@dataclass(frozen=True)
class Spoken:
    """One sentence, continued greedily by both models."""

    prompt: str
    base: str
    pruned: str


@dataclass(frozen=True)
class Finished:
    """Where everything is, and how long it took."""

    paths: tuple[Path, ...]
    seconds: float


Result = Ranked | Chosen | Receipt | Audit | Spoken | Finished


def run_demo(
    out: Path,
    *,
    cache: Path | None = None,
    amounts: Amounts | None = None,
    probe: Probe = probe_hub,
    progress: Progress = SILENT,
) -> Iterator[Result]:
    """Do the main job and yield each result as it is there; everything is written below ``out``, which must be new.

    Raises ``UsageError`` when ``out`` is in use, ``FetchError`` when model or questions cannot be had.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty; give the demonstration a new folder with -o, or remove this one")
    with locked(out):  # tried before anything is fetched
        pass
    start, amounts, probe = time.monotonic(), amounts or Amounts(), functools.cache(probe)
    # Weights: shares of the time they take on two CPU cores, for the estimate of the whole.
    steps = Steps(progress, {"fetch": 10, COSINE: 8, ABLATION: 50, "export": 7, "audit": 20, "speak": 5})
    with steps:
        with steps.take("fetch", tasks=4) as inner:
            model = fetch_model(cache or cache_dir(), inner, probe)
            data = fetch_questions(cache or cache_dir(), inner, probe)
        with steps.take(COSINE, tasks=1) as inner:
            cosine = _score(COSINE, model, out, inner, limit=amounts.cosine, seed=amounts.seed, **_reading(data))
        yield Ranked(cosine)
        with steps.take(ABLATION, tasks=3) as inner:
            ablation = _score(ABLATION, model, out, inner, budget=amounts.budget, seed=amounts.seed, **_reading(data))
        chosen = _choose({COSINE: cosine, ABLATION: ablation}, out)
        yield chosen
        smaller = out / "smaller"
        with steps.take("export", tasks=1) as inner:
            yield _export(chosen.plans[ABLATION], smaller, inner)
        with steps.take("audit", tasks=2) as inner:
            items = min(amounts.audit, 4 * min(data.items for data in ablation.data))
            yield _audit(chosen.plans[COSINE], smaller, data, items, inner)
        with steps.take("speak", tasks=1) as inner:
            yield _speak(model, smaller, inner)
    documents = [out / name / file for name in (ABLATION, COSINE) for file in (Scores.filename, Plan.filename)]
    audited = smaller / "layerprune" / Audit.filename
    yield Finished((*documents, smaller, audited, smaller / "README.md"), time.monotonic() - start)


def _score(metric: str, model: Path, out: Path, progress: Progress, **options: Any) -> Scores:
    from layerprune import api

    return api.score(model, metric=SPECS[metric], out=out / metric, progress=progress, **options)


def _choose(scores: dict[str, Scores], out: Path) -> Chosen:
    """Plan from each ranking."""
    from layerprune import api

    plans = {
        metric: api.plan(scores=found, drop=DROP, search="one-shot", out=out / metric, progress=False)
        for metric, found in scores.items()
    }
    return Chosen(compare_scores(scores[COSINE], scores[ABLATION]), scores, plans)


def _export(plan: Plan, smaller: Path, progress: Progress) -> Receipt:
    from layerprune.exporter import export

    return export(plan, smaller, progress=progress)


def _audit(cosine: Plan, smaller: Path, data: Path | None, items: int, progress: Progress) -> Audit:
    from layerprune.auditor import audit

    # The sentence at the end stands for the generation check. Single layers would be asked on all these items once more
    # each, which the five minutes do not hold.
    return audit(
        smaller, compare={COSINE: cosine}, limit=items, generation=False, layerwise=False, progress=progress,
        **_reading(data, JUDGING),
    )  # fmt: skip


def _reading(data: Path | None, tasks: tuple[str, ...] = CHOOSING) -> dict[str, Any]:
    """Return which tasks, from where: lm-eval's own definitions, without indexing thousands of others for seconds."""
    import lm_eval.tasks

    shipped = Path(lm_eval.tasks.__file__).parent
    folders = tuple(shipped / name for name in ("arc", "piqa"))
    return {"tasks": tasks, "include_path": folders, "data_dir": data}


def _speak(model: Path, smaller: Path, progress: Progress) -> Spoken:
    """Load both folders as any user would and let them go on with one sentence."""
    with progress.task("writing a sentence", 2, "models") as advance:
        said = []
        for folder in (model, smaller):
            said.append(_continue(folder))
            advance()
    return Spoken(PROMPT, *said)


def _continue(folder: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer(PROMPT, return_tensors="pt")
    written = AutoModelForCausalLM.from_pretrained(folder).generate(
        **asked, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
