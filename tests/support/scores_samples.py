"""Recorded scores written out in full: the answers of six layers to two tasks, judged as a run judges them."""

from audit_samples import model_ref
from layerprune.artifacts import MEAN, BaseTask, MetricRef, Outcomes, Round, Scores, TaskData
from layerprune.scoring.aggregation import BaseOutcomes, judge

INTACT = {"toy": "11111111", "more": "00101111"}  # chance .25
WITHOUT = (  # layer by layer; nothing right of "more" is below chance
    {"toy": "01000100", "more": "00000000"},
    {"toy": "10001111", "more": "00101111"},
    {"toy": "10110010", "more": "00100001"},
    {"toy": "11010111", "more": "00101011"},
    {"toy": "10110011", "more": "00100111"},
    {"toy": "11110111", "more": "00100001"},
)


def scores() -> Scores:
    """Return scores of a one-shot search by the plain mean of both tasks."""
    base = {task: Outcomes(correct=bits) for task, bits in INTACT.items()}
    data = tuple(
        TaskData(
            task=task, split="train", items=8, fingerprints=tuple(f"{task}-{number}" for number in range(8)),
            num_fewshot=0, metric="acc", chance=0.25,
        )
        for task in INTACT
    )  # fmt: skip
    intact = BaseOutcomes.of(data, base, "accuracy", MEAN)
    own = [{task: Outcomes(correct=bits) for task, bits in layer.items()} for layer in WITHOUT]
    return Scores(
        model=model_ref(layers=6),
        metric=MetricRef(
            name="ablation", spec="ablation", options={"signal": "accuracy"}, unit="relevance", scope="any set",
            owner="layerprune",
        ),
        data=data,
        base={task: BaseTask(accuracy=answers.accuracy, gold_probability=None, p_value=0.01, outcomes=answers)
              for task, answers in base.items()},
        rounds=(Round(removed=(), candidates=tuple(judge(intact, (n,), answers) for n, answers in enumerate(own))),),
        seed=0,
        versions={},
    )  # fmt: skip
