"""How much the engine saves, on the demonstration's model and questions (make bench); every figure is printed."""

import time

import pytest

from demo.model import fetch_model
from demo.questions import TASKS, fetch_questions
from layerprune.data.tasks import load_eval_set
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.engine import Engine
from layerprune.scoring.paths import PlainPath

ITEMS = 4  # of each task: the plain path needs minutes for more


@pytest.mark.bench
def test_all_layers_by_the_chosen_path_against_plain_forwards():
    loaded = LoadedModel.load(str(fetch_model()))
    eval_set = load_eval_set(TASKS, loaded.encoder, use="selection", data_dir=fetch_questions(), limit=ITEMS)
    removals = [Removal.of(layer) for layer in range(loaded.architecture.depth)]
    chosen, plain = Engine(loaded), Engine(loaded)
    examiners = {"chosen": CachedEvaluator(chosen, eval_set), "plain": CachedEvaluator(plain, eval_set)}
    examiners["chosen"].outcomes([Removal(())], "self-test and intact model")
    plain.path, plain.longest = PlainPath(loaded), 10**9  # no self-test: this is what it would test against
    seconds = {}
    for name, evaluator in examiners.items():
        start = time.perf_counter()
        evaluator.outcomes(removals, name)
        seconds[name] = time.perf_counter() - start
    gain = seconds["plain"] / seconds["chosen"]
    print(f"\n{len(removals)} removals x {ITEMS * len(TASKS)} items, {loaded.dtype}, path {chosen.path.name}:")
    print(f"  {seconds['chosen']:.1f} s against {seconds['plain']:.1f} s by plain forwards: {gain:.1f} times as fast")
    print(f"  work not done: {examiners['chosen'].account.avoided:.0%} of tokens x layers")
    assert gain > 1
