"""The one sentence at the top: what was removed, what it cost, on how many items, and whether it still writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from layerprune.documents import PRUNED, AuditedTask, Generation, Overall, Units
from layerprune.report import words


def verdict(
    removal: Units,
    depth: int,
    tasks: Sequence[AuditedTask],
    overall: Mapping[str, Overall],
    generation: Generation | None = None,
    unlooked: Sequence[str] = (),
) -> str:
    """Return the verdict; the accuracy in it is the mean over the informative tasks.

    ``unlooked`` are the tasks whose items nobody looked for in the text that healed: they may have been seen.
    """
    share = f"{100 * len(removal) / depth:.0f} % of layers removed ({len(removal)} of {depth})"
    return "; ".join([share, _accuracy(tasks, overall.get(PRUNED), unlooked), *_writing(generation)])


def _accuracy(tasks: Sequence[AuditedTask], found: Overall | None, unlooked: Sequence[str]) -> str:
    uninformative = [task.data.task for task in tasks if not task.informative]
    if found is None:
        return f"what that cost is not known: the base model is not above chance on {words.listed(uninformative)}"
    met = [task for task in unlooked if task not in uninformative]
    said = (
        f"accuracy {words.points(found.difference)} points "
        f"(95 % CI {words.points_interval(found.interval)}) on {found.items:,} "
        + (f"items, those of {words.listed(met)} perhaps met in healing" if met else "unseen items")
    )
    if uninformative:
        said += f", {words.listed(uninformative)} left out (base at chance)"
    return said


def _writing(generation: Generation | None) -> list[str]:
    if generation is None:
        return ["not looked at: generated text"]
    if generation.healthy:
        return [f"{generation.prompts - generation.faulty} of {generation.prompts} sample texts are sound"]
    return [
        f"it no longer writes reliably: {generation.faulty} of {generation.prompts} sample texts are faulty "
        f"(base: {generation.base_faulty})"
    ]
