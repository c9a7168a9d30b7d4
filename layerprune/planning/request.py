"""What scoring and planning are asked: plain values, with their one default each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from layerprune.documents import Prompting
from layerprune.tasks import asked_prompting

# Items of each task that select when --limit does not say otherwise. One accuracy on 1,000 items has a standard error
# of 1.5 points; with a few hundred a search fits its items and not the model (measured on SmolLM2-135M).
DEFAULT_LIMIT = 1000


@dataclass(frozen=True)
class ScoreRequest:
    """What ``layerprune score`` is asked."""

    model: str
    metric: str = "ablation"
    tasks: tuple[str, ...] = ()
    include_path: tuple[Path, ...] = ()
    data_dir: Path | None = None
    limit: int = DEFAULT_LIMIT
    num_fewshot: int | None = None
    apply_chat_template: bool | str | None = None  # the tokenizer's template, or the name of one of several
    fewshot_as_multiturn: bool | None = None  # None: under a chat template
    system_instruction: str | None = None
    batch_size: int | str = "auto"
    memory: int | None = None  # bytes that evaluating may hold beside the weights; None: the engine's own default
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    revision: str | None = None
    trust_remote_code: bool = False
    protect: str | None = None
    racing: bool | None = None  # stop candidates that are clearly not next to go; None: where the objective allows it
    objective: str | None = None  # "mean", "worst", "weighted"; None: weighted where there are weights, else the mean
    weights: Mapping[str, float] | None = None  # by task; those not named count 1
    floor: Mapping[str, float] | None = None  # by task: share of accuracy above chance it must keep

    @property
    def prompting(self) -> Prompting:
        """How items become prompts; raises ``UsageError`` for options that contradict each other."""
        return asked_prompting(
            self.apply_chat_template, self.fewshot_as_multiturn, self.system_instruction, self.num_fewshot
        )
