"""A judge for tests of searches: one score for every set of units, drawn or given."""

import random

from layerprune.artifacts import Candidate
from layerprune.search import OneShot, Others


class TableJudge:
    """A judge that draws one score for every set of units and counts how often it is asked."""

    def __init__(self, seed=0, score=None):
        self.seed, self.score, self.asked = seed, score, []

    def value(self, units):
        if self.score is not None:
            return self.score(units)
        return random.Random(f"{self.seed}{units}").random() * len(units)

    def __call__(self, removals):
        self.asked.append([removal.layers for removal in removals])
        return [Candidate(removal=removal.layers, score=self.value(removal.layers)) for removal in removals]


def others(judge, own=None):
    """What a search asks beside its judge: every other metric says what ``judge`` says."""
    return Others(lambda _, constraints, drop: OneShot().find(judge, constraints, drop), lambda _: own)
