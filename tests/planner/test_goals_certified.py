"""The guarantee of --max-drop as a whole, by simulation: search, mixture of tasks, and walk, over thousands of models.

A simulated model loses a known share of its right answers with each layer; the search sees it through noisy selection
items only, the certificate through certification items only. A violation is a certified removal whose true loss, the
mean of the tasks, is the limit or more.
"""

import numpy as np
import pytest

from layerprune.artifacts import Candidate
from layerprune.errors import RefusedError
from layerprune.planner.goals import walk
from layerprune.removal import Removal
from layerprune.search import Constraints, Greedy, SearchResult
from layerprune.stats import draw_mixture

LIMIT, CONFIDENCE = 0.06, 0.95
SIZES = {"easy": 140, "hard": 420}  # certification items: tasks of unlike size, of which a mixture is drawn
SHARE = {"easy": 0.5, "hard": 1.5}  # of a layer's loss: unlike tasks, whose mean is the loss itself
SELECTION, RIGHT, GAIN = 150, 0.7, 0.02
MODELS = 2_000


class Simulated:
    """One model: what each layer's removal truly loses, seen through items."""

    def __init__(self, losses, seed):
        self.losses, self.rng = np.array(losses), np.random.default_rng(seed)
        self.constraints = Constraints(len(losses) + 1, protect=frozenset({len(losses)}))
        drawn = draw_mixture(SIZES, seed)
        self.share = np.concatenate([np.full(len(drawn[name]), SHARE[name]) for name in SIZES])
        self.right = self.rng.random(self.share.size) < RIGHT
        self.judged = {}

    def loss(self, removal):
        return self.losses[list(removal)].sum()

    def judge(self, removals):
        """Score by the loss on the selection items, the same score each time a removal is asked about."""
        for removal in removals:
            if removal not in self.judged:
                lost = self.rng.binomial(SELECTION, self.loss(removal) + GAIN) - self.rng.binomial(SELECTION, GAIN)
                self.judged[removal] = lost / SELECTION
        return [Candidate(removal=removal.layers, score=self.judged[removal]) for removal in removals]

    def look(self, count):
        return Greedy().find(self.judge, self.constraints, count)

    def answers(self, removal):
        """Answer the certification items: an item's chance to turn wrong depends on its task."""
        flips = self.rng.random(self.share.size)
        turns_wrong = flips < (self.loss(removal) * self.share + GAIN) / RIGHT
        turns_right = flips < GAIN / (1 - RIGHT)
        return as_text(np.where(self.right, ~turns_wrong, turns_right))

    def certified(self):
        """Return the largest certified removal, and the number of searches it took."""
        counts = self.constraints.counts()
        path, found = walk(self.look, counts, as_text(self.right), self.answers, LIMIT, CONFIDENCE)
        return (path[found.certified - 1].removal if found.certified else Removal(())), len(path)


def as_text(right):
    return (right + np.uint8(48)).astype(np.uint8).tobytes().decode()


@pytest.mark.parametrize(
    ("losses", "finds"),
    [
        ((0.06, 0.06, 0.06, 0.06), 0.0),  # every first step loses the limit: four chances to be lucky in selection
        ((0.0, 0.0, 0.06, 0.12), 0.3),  # two that cost nothing, then a step to the limit
        ((0.03, 0.03, 0.03, 0.03), 0.1),  # the second step reaches the limit
        ((-0.02, 0.01, 0.07, 0.0), 0.3),  # one removal helps, one is bad by itself
    ],
)
def test_a_certified_removal_loses_less_than_the_limit_in_all_but_five_per_cent_of_models(losses, finds):
    violations, found = 0, 0
    for seed in range(MODELS):
        model = Simulated(losses, seed)
        removal, searches = model.certified()
        violations += len(removal) > 0 and model.loss(removal) >= LIMIT - 1e-12
        found += len(removal) > 0
        assert len(removal) <= searches <= len(removal) + 1  # no search beyond the step that fails
    assert violations / MODELS <= 0.05
    assert found / MODELS >= finds


def test_certifying_on_the_items_that_selected_would_break_the_guarantee():
    """What the third slice is for: the best of many on some items looks better on the same items than it is."""

    class Peeking(Simulated):
        def __init__(self, losses, seed):
            super().__init__(losses, seed)
            self.right[:] = True

        def answers(self, removal):
            lost = max(0, round(self.judged[removal] * self.right.size))
            return "0" * lost + "1" * (self.right.size - lost)

    losses = (0.06,) * 12
    violations = sum(len(Peeking(losses, seed).certified()[0]) > 0 for seed in range(200))
    assert violations / 200 > 0.3


def test_a_path_that_can_go_no_further_ends_and_one_that_cannot_begin_is_refused():
    model = Simulated((0.0, 0.0, 0.0), seed=1)

    def look(count):
        if count > 1:
            raise RefusedError("one layer has to stay")
        return model.look(count)

    path, found = walk(look, (1, 2, 3), as_text(model.right), lambda removal: as_text(model.right), LIMIT, CONFIDENCE)
    assert (len(path), found.certified) == (1, 1)
    even = (SearchResult(tuple(range(count)), (), (), None) for count in (2, 4))  # whole periods only

    def pairs(count):
        if count % 2:
            raise RefusedError("one layer of a period")
        return next(even)

    path, found = walk(pairs, (1, 2, 3, 4), "1" * 200, lambda removal: "1" * 200, LIMIT, CONFIDENCE)
    assert (len(path), found.certified) == (2, 2)
    with pytest.raises(RefusedError, match="one layer has to stay"):
        walk(look, (2, 3), "1", lambda removal: "1", LIMIT, CONFIDENCE)
