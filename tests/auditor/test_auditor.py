"""The audit of a tiny checkpoint, from its folder to its card."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import audit_samples as samples
import audit_tiny as tiny
from layerprune.artifacts import PRUNED, Audit, Plan, TaskData
from layerprune.auditor import audit
from layerprune.auditor.verification import verify
from layerprune.errors import DocumentError, TaskError, UsageError


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def tasks(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tiny.eval_set(base, folder, "toy")
    return tiny.eval_set(base, folder, "noise", test=40, known=0.0)


@pytest.fixture
def out(base, tmp_path):
    return tiny.exported(base, tmp_path / "smaller")


def run(folder, tasks, names=("toy",), generation=False, **options):
    return audit(folder, list(names), include_path=[tasks], generation=generation, **options)


def seen(marks, task="toy"):
    return (
        TaskData(
            task=task,
            split="train",
            items=len(marks),
            fingerprints=tuple(marks),
            num_fewshot=0,
            metric="acc",
            chance=0.25,
        ),
    )


@torch.no_grad()
def answers_by_hand(folder, tasks, name="toy"):
    """lm-eval's accuracy written out: the choice with the largest sum of log-probabilities, item by item."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    correct = ""
    for line in (tasks / f"{name}-test.jsonl").read_text().splitlines():
        doc = json.loads(line)
        prompt = tokenizer(doc["question"], return_tensors="pt").input_ids
        sums = []
        for choice in doc["choices"]:
            answer = tokenizer(" " + choice, return_tensors="pt").input_ids
            logs = model(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
            sums.append(float(logs.gather(1, answer[0][:, None]).sum()))
        correct += str(int(sums.index(max(sums)) == doc["gold"]))
    return correct


def test_outcomes_are_those_of_plain_transformers_on_both_folders(base, out, tasks):
    result = run(out, tasks)
    task = result.tasks[0]
    assert task.base_outcomes.correct == answers_by_hand(base, tasks)
    assert task.models[PRUNED].outcomes.correct == answers_by_hand(out, tasks)
    assert task.informative
    assert task.models[PRUNED].difference < 0  # the items were chosen to suit the base
    assert result.overall[PRUNED].items == 60
    assert "17 % of layers removed (1 of 6); accuracy −" in result.verdict
    assert "on 60 unseen items" in result.verdict


def test_the_folder_holds_the_audit_and_a_card_that_shows_it(out, tasks):
    result = run(out, tasks)
    assert Audit.load(out / "layerprune" / "audit.json") == result
    assert result.verdict in (out / "README.md").read_text(encoding="utf-8")
    AutoModelForCausalLM.from_pretrained(out)  # and it still loads


def test_no_item_is_shared_with_the_plan_and_the_removed_are_counted(base, tasks, tmp_path, out):
    every = run(out, tasks).tasks[0].data.fingerprints
    plan_saw = every[5:25]
    again = tiny.exported(base, tmp_path / "again", seen=seen((*plan_saw, "0123456789abcdef")))
    task = run(again, tasks).tasks[0]
    assert task.excluded == 20
    assert task.data.fingerprints == every[:5] + every[25:]
    assert not set(task.data.fingerprints) & set(plan_saw)


def test_items_that_only_a_compared_plan_has_seen_are_left_out_too(base, tasks, out):
    every = run(out, tasks).tasks[0].data.fingerprints
    other = samples.plan(model=tiny.reference(base), removal=(1,), order=(1,), data=seen(every[:7]))
    result = run(out, tasks, compare={"other": other})
    assert not set(result.tasks[0].data.fingerprints) & set(every[:7])
    assert result.tasks[0].excluded == 7


def test_a_plan_that_has_seen_everything_leaves_nothing_to_audit(base, tasks, tmp_path, out):
    every = run(out, tasks).tasks[0].data.fingerprints
    again = tiny.exported(base, tmp_path / "again", seen=seen(every))
    with pytest.raises(TaskError, match="no items left"):
        run(again, tasks)
    assert not (again / "layerprune" / "audit.json").exists()


def test_a_compared_plan_gets_what_its_own_export_would_get(base, tasks, tmp_path, out):
    other = tiny.exported(base, tmp_path / "other", layer=1)
    from layerprune.artifacts import Plan

    plan = Plan.load(other / "layerprune" / "plan.json")
    result = run(out, tasks, compare={"layer one": plan})
    as_removal = result.tasks[0].models["layer one"].outcomes
    as_folder = run(other, tasks).tasks[0].models[PRUNED].outcomes
    assert as_removal.correct == as_folder.correct
    assert as_removal.gold_probability == pytest.approx(as_folder.gold_probability, abs=2e-5)
    assert result.compared["layer one"].removal == (1,)
    assert "layer one" in (out / "README.md").read_text()


def test_a_task_at_chance_is_marked_and_left_out(out, tasks):
    result = run(out, tasks, names=("toy", "noise"))
    informative = {task.data.task: task.informative for task in result.tasks}
    assert informative == {"toy": True, "noise": False}
    assert result.overall[PRUNED].items == 60
    assert "noise left out (base at chance)" in result.verdict


def test_the_plans_tasks_are_the_default_and_a_limit_holds(base, tasks, tmp_path):
    folder = tiny.exported(base, tmp_path / "smaller", seen=seen(["0123456789abcdef"]))
    result = audit(folder, include_path=[tasks], limit=10, generation=False)
    assert [(task.data.task, task.data.items) for task in result.tasks] == [("toy", 10)]


def test_the_same_audit_twice_is_the_same_document(out, tasks):
    assert run(out, tasks).canonical_json() == run(out, tasks).canonical_json()


def test_a_base_that_moved_is_found_with_base(base, tasks, out, tmp_path):
    moved = shutil.copytree(base, tmp_path / "moved")
    assert run(out, tasks, base=str(moved)).base.id == "base"
    assert json.loads((out / "layerprune" / "locator.json").read_text()).popitem()[1] == str(moved)


def tamper_weights(out):
    path = out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40
    path.write_bytes(data)


def tamper_plan(out):
    path = out / "layerprune" / "plan.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def remove_receipt(out):
    (out / "layerprune" / "receipt.json").unlink()


def change_config(out):
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.3}))


def change_tokenizer(out):
    path = out / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (tamper_weights, "not those export wrote"),
        (tamper_plan, "not the plan that was carried out"),
        (remove_receipt, "not an exported checkpoint"),
        (change_config, r"config\.json is not the file export wrote"),
        (change_tokenizer, r"tokenizer\.json is not the file export wrote"),
    ],
)
def test_a_folder_that_is_not_what_export_wrote_is_refused(out, tasks, damage, said):
    damage(out)
    with pytest.raises(DocumentError, match=said):
        run(out, tasks)
    assert not (out / "layerprune" / "audit.json").exists()


def test_a_base_that_tokenises_otherwise_is_refused(base, out, tasks, tmp_path):
    shutil.copytree(base, tmp_path / "other")
    change_tokenizer(tmp_path / "other")
    with pytest.raises(DocumentError, match="tokenizers of the base and the pruned folder differ"):
        run(out, tasks, base=str(tmp_path / "other"))


def test_a_card_that_cannot_be_read_is_refused_before_anything_is_measured(out, tasks, monkeypatch):
    def measured(*arguments):
        raise AssertionError("measured all the same")

    monkeypatch.setattr("layerprune.auditor.auditor.measure", measured)
    (out / "README.md").write_text("---\na: [1\n---\n")
    with pytest.raises(DocumentError, match=r"README\.md: the metadata between the --- lines is not YAML"):
        run(out, tasks)
    assert not (out / "layerprune" / "audit.json").exists()


def test_a_text_that_is_too_short_is_refused_before_anything_is_asked(out, tasks, tmp_path, monkeypatch):
    def asked(*arguments, **options):
        raise AssertionError("asked all the same")

    monkeypatch.setattr("layerprune.auditor.measurement.evaluate", asked)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(UsageError, match="at least 254 are needed"):
        run(out, tasks, text=tmp_path / "short.txt")


def test_another_base_is_refused(out, tasks, tmp_path):
    with pytest.raises(DocumentError, match="not the model this checkpoint was made from"):
        run(out, tasks, base=str(out))


def test_a_folder_that_does_not_exist_is_named(tasks, tmp_path):
    with pytest.raises(DocumentError, match=r"nowhere is not an exported checkpoint: it does not exist"):
        run(tmp_path / "nowhere", tasks)


def test_without_any_task_the_audit_asks_for_one(out):
    with pytest.raises(UsageError, match="--tasks"):
        audit(out)


@pytest.mark.parametrize("label", ["base", "pruned"])
def test_labels_of_the_audits_own_models_are_taken(base, out, tasks, label):
    plan = samples.plan(model=tiny.reference(base))
    with pytest.raises(UsageError, match="another label"):
        run(out, tasks, compare={label: plan})


def test_a_compared_plan_for_another_model_is_refused(out, tasks):
    with pytest.raises(DocumentError, match="is for another model"):
        run(out, tasks, compare={"foreign": samples.plan()})


def test_text_speed_and_writing_reach_the_document_and_the_card(out, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr("layerprune.auditor.measurement.PROMPTS", ("Say something.", "Say more."))
    text = tmp_path / "held-out.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    result = run(out, tasks, limit=8, generation=True, text=text, speed=True)
    assert result.generation.prompts == len(result.generation.continuations) == 2
    assert result.text.source.startswith("held-out.txt (sha256 ")
    assert result.speed.layers_kept == pytest.approx(5 / 6)
    assert result.cache_bytes_per_token == (6 * 2 * 2 * 8 * 4, 5 * 2 * 2 * 8 * 4)  # layers, k and v, heads, size, bytes
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "nats per token the base" in card
    assert "greedy continuations" in card
    assert "decode tokens/s" in card
    assert "KV cache per token" in card


def test_speeds_and_compared_plans_stand_in_card_and_report_as_a_reader_of_the_audit_finds_them(out, tasks, tmp_path):
    plan = Plan.load(out / "layerprune" / "plan.json")
    for name in ("zebra", "aardvark"):  # not in the order of their names
        plan.save(tmp_path / f"{name}.json")
    compared = {name: tmp_path / f"{name}.json" for name in ("zebra", "aardvark")}
    run(out, tasks, speed=True, compare=compared)
    assert verify(out).problems == ()
