"""The counterexample, measured: what cosine says of its layers, and what each is worth."""

from __future__ import annotations

from layerprune.documents.study import Counterexample
from layerprune.engine import Engine, Examiner
from layerprune.examples import counterexample, counting, subject_of
from layerprune.metrics.ablation import INTACT
from layerprune.metrics.base import Data
from layerprune.metrics.cosine import Cosine
from layerprune.removal import Removal

EPSILON = 1e-6


def counterexample_shown(epsilon: float = EPSILON) -> Counterexample:
    """Build the three-layer llama for this epsilon and ask it its task, intact and without each layer."""
    subject, questions = subject_of(counterexample(epsilon)), counting()
    layers = [Removal.of(layer) for layer in range(3)]
    scores = [candidate.score for candidate in Cosine().score(subject, layers, Data(questions=questions))]
    found = Examiner(Engine(subject), questions).outcomes([INTACT, *layers])
    accuracies = [outcomes["counting"].accuracy for outcomes in found.values()]
    return Counterexample(
        epsilon=epsilon,
        cosine=(scores[0], scores[1], scores[2]),
        accuracy=accuracies[0],
        accuracy_without=(accuracies[1], accuracies[2], accuracies[3]),
    )
