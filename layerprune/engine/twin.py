"""A tiny random model in float64 with the layers of a subject: there a wrong path cannot pass for rounding.

Masks, positions, windows and what layers hand each other do not depend on sizes or weights. So they are tested where a
right path agrees to the last digits; on the real weights in half precision rounding would hide a small error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from layerprune.anatomy.tiny import LENGTHS, VOCABULARY, twin_config, with_noise
from layerprune.errors import ModelError, one_line
from layerprune.subject import Subject
from layerprune.tasks.items import Request

FIRST_TOKEN = 3  # of the twin's vocabulary: padding, beginning and end have the numbers below
OTHER_DEPTHS = ("num_hidden_layers", "num_layers", "depth", "encoder_layers")  # of a vision or audio tower


class NoTwin(ModelError):
    """A model of which no tiny one can be built, or whose tiny one does not run."""


def twin_of(subject: Subject) -> Subject:
    """Return a tiny float64 model of the subject's class, with its layers and the lengths it distinguishes.

    On the CPU, with the attention implementation of the subject. Raises ``NoTwin`` where it cannot be built.
    """
    kind, config = type(subject.model), subject.model.config
    path = subject.anatomy.path if config.get_text_config(decoder=True) is not config else ()
    try:
        small = twin_config(config, path, keep=LENGTHS)
        for name in set(small.sub_configs) - set(path):  # vision and audio towers, which see nothing here
            tower = getattr(small, name)
            for depth in OTHER_DEPTHS:
                if isinstance(getattr(tower, depth, None), int):
                    setattr(tower, depth, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind._from_config(
                small, dtype=torch.float64, attn_implementation=config._attn_implementation,
                experts_implementation="eager",  # grouped products of experts know no float64
            )  # fmt: skip
            return Subject(with_noise(model), subject.tokenizer, subject.anatomy, subject.ref)
    except Exception as error:  # strict config classes and modelling code raise what they like
        raise NoTwin(f"no tiny {config.model_type} could be built: {one_line(error)}") from error


def renamed(requests: Sequence[Request]) -> list[Request]:
    """Return the requests in the twin's small vocabulary: the same lengths, the same tokens in common.

    Tokens are numbered as they appear, so that answers that part do so still.
    """
    numbers: dict[int, int] = {}
    room = VOCABULARY - FIRST_TOKEN
    return [
        Request(tuple(FIRST_TOKEN + numbers.setdefault(t, len(numbers)) % room for t in request.tokens), request.scored)
        for request in requests
    ]
