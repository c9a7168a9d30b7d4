"""What an audit says of writing: the base's own answers read by the smaller model, against plain forwards."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedTokenizerFast

import audit_tiny as tiny
from layerprune.artifacts import PRUNED, Audit, Plan
from layerprune.auditor import audit
from layerprune.auditor.generation import PROMPTS
from layerprune.auditor.verification import verify
from layerprune.cli.checkpoint import audited
from layerprune.models import generation
from layerprune.stats import bootstrap_interval

NEW = 6
FEW = PROMPTS[:3]
WRITING = """task: writing
dataset_path: json
dataset_kwargs:
  data_files: {{ train: {folder}/train.jsonl, test: {folder}/test.jsonl }}
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{ until: ["Z"], max_gen_toks: {new} }}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@torch.no_grad()
def written_by(model, tokenizer, question, new=NEW):
    """Greedy decoding written out, a whole forward a token, up to the end of text."""
    prompt = tokenizer(question, return_tensors="pt").input_ids
    ids = prompt
    while ids.shape[1] < prompt.shape[1] + new:
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == 257:
            break
    return prompt[0].tolist(), ids[0, prompt.shape[1] :].tolist()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, a task of choices and a task of writing whose answers are the base's own, and an audited folder."""
    folder = tmp_path_factory.mktemp("written")
    base = tiny.base_model(folder / "base")
    tiny.eval_set(base, folder / "tasks", test=20)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), PreTrainedTokenizerFast.from_pretrained(base)
    for split, count in (("train", 4), ("test", 12)):
        rows = [{"question": f"{split} {number}: " + "and " * (number % 3)} for number in range(count)]
        for row in rows:
            row["answer"] = tokenizer.decode(written_by(model, tokenizer, row["question"])[1], skip_special_tokens=True)
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "tasks" / "writing.yaml").write_text(WRITING.format(folder=folder, new=NEW))
    tiny.exported(base, folder / "smaller")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("layerprune.auditor.measurement.PROMPTS", FEW)
        patch.setattr("layerprune.auditor.generation.NEW_TOKENS", NEW)
        written = counted(patch)
        plan = Plan.load(folder / "smaller" / "layerprune" / "plan.json")
        other = plan.model_copy(update={"removal": (1, 4)})
        audit(
            folder / "smaller", ["toy", "writing"], include_path=[folder / "tasks"], layerwise=False, dtype="float32",
            compare={"other": other},
        )  # fmt: skip
    (folder / "written.json").write_text(json.dumps(written))
    return folder


def counted(patch):
    """Count the task's texts that are written, by whether all layers were there."""
    counts, write = [], GenerationMixin.generate

    def counting(model, *args, **options):
        if "stopping_criteria" in options:  # as lm-eval asks; the sample texts end at their length alone
            counts.extend(model.config.num_hidden_layers for _ in options["input_ids"])
        return write(model, *args, **options)

    patch.setattr(GenerationMixin, "generate", counting)
    return counts


@pytest.fixture
def found(made):
    return Audit.load(made / "smaller" / "layerprune" / "audit.json")


@torch.no_grad()
def read_by(model, prompt, answer):
    logs = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    asked = torch.tensor(answer)
    return float(logs.gather(1, asked[:, None]).mean()), float((logs.argmax(-1) == asked).double().mean())


def without(base, *layers):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers = torch.nn.ModuleList(
        layer for number, layer in enumerate(model.model.layers) if number not in layers
    )
    return model


def test_own_answers_are_what_greedy_decoding_and_plain_forwards_give(made, found):
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(made / "base")
    smaller, other = AutoModelForCausalLM.from_pretrained(made / "smaller"), without(made / "base", 1, 4)
    eval_set = [json.loads(line)["question"] for line in (made / "test.jsonl").read_text().splitlines()]
    asked = {"writing": eval_set, "sample prompts": [prompt + "\n" for prompt in FEW]}
    assert [one.task for one in found.own_answers] == list(asked)
    for one in found.own_answers:
        texts = [written_by(base, tokenizer, question) for question in asked[one.task]]
        if one.task == "sample prompts":  # read up to the mark that ends a text, which a task's answer holds
            texts = [(prompt, answer[:-1] if answer[-1] == 257 else answer) for prompt, answer in texts]
        texts = sorted((prompt, answer) for prompt, answer in texts if answer)
        assert one.tokens == sum(len(answer) for _, answer in texts)
        own = [read_by(base, *text) for text in texts]
        for label, model in ((PRUNED, smaller), ("other", other)):
            read = [read_by(model, *text) for text in texts]
            lost = [before[0] - after[0] for before, after in zip(own, read, strict=True)]
            assert one.models[label].nats == pytest.approx(sum(lost) / len(lost), abs=2e-3)
            assert one.models[label].agreed == pytest.approx(sum(share for _, share in read) / len(read), abs=1e-4)
            assert sorted(one.models[label].outcomes.agreed) == pytest.approx(sorted(s for _, s in read), abs=1e-4)
        assert one.base_outcomes.agreed == (1.0,) * len(texts)
        low, high = bootstrap_interval([one.models[PRUNED].outcomes.agreed])
        assert one.models[PRUNED].agreed_interval == pytest.approx((low, high))


def test_the_base_writes_each_answer_once(made):
    """Once for the accuracy, and what it wrote is read; the other plan's text is written by the base without layers."""
    written = json.loads((made / "written.json").read_text())
    assert sorted(written) == [4] * 12 + [5] * 12 + [6] * 12


def test_the_first_sentence_tells_choices_from_writing(made, found):
    first, choice, accuracy, agreed, sound = found.verdict.split("; ")
    assert first == "17 % of layers removed (1 of 6)"
    assert choice.startswith("choice accuracy −")
    assert choice.endswith("on 20 unseen items")
    assert accuracy.startswith("accuracy of written answers −")
    assert accuracy.endswith("on 12 unseen items")
    [writing, samples] = found.own_answers
    assert agreed.startswith(f"agrees with {100 * writing.models[PRUNED].agreed:.1f} % (95 % CI ")
    assert " of the tokens the base wrote on 12 unseen prompts of writing and " in agreed
    assert f" and {100 * samples.models[PRUNED].agreed:.1f} % (95 % CI " in agreed
    assert agreed.endswith("sample prompts")
    assert "sample texts are" in sound
    assert [task.written for task in found.tasks] == [False, True]
    card = (made / "smaller" / "README.md").read_text(encoding="utf-8")
    assert found.verdict in card
    assert f"| writing | 12 | {writing.tokens} | {100 * writing.models[PRUNED].agreed:.1f} % (" in card
    page = (made / "smaller" / "report.html").read_text(encoding="utf-8")
    assert "What the base wrote to unseen prompts, read token by token" in page
    table = list(audited(found))[1]
    assert list(table.columns[0].cells) == ["writing", "writing", "sample prompts", "sample prompts"]


@pytest.mark.parametrize("change", ["agreed", "nats", "outcomes", "length"])
def test_a_prettier_agreement_is_found(made, tmp_path, change):
    out = shutil.copytree(made / "smaller", tmp_path / "out")
    path = out / "layerprune" / "audit.json"
    content = json.loads(path.read_text())
    own = content["own_answers"][0]["models"][PRUNED]
    if change == "length":
        own["outcomes"] = {**own["outcomes"], "correct": "1", "answer": [-0.1], "agreed": [1.0]}
    elif change == "outcomes":
        own["outcomes"]["agreed"][0] = 0.123
    else:
        own[change] = 0.99
    path.write_text(json.dumps(content))
    said = "audit: what is kept of the base's own answers to writing does not follow from their outcomes"
    assert said in verify(out).problems
    assert not any("own answers" in problem for problem in verify(made / "smaller").problems)


def test_one_written_task_alone_is_still_looked_at(made, tmp_path):
    out = tiny.exported(made / "base", tmp_path / "smaller")
    options = {"include_path": [made / "tasks"], "layerwise": False, "generation": False}
    alone = audit(out, ["writing"], limit=1, **options)
    assert "not looked at" not in alone.verdict
    assert "accuracy of written answers" in alone.verdict
    assert alone.own_answers == ()
    assert "not looked at: generated text" in audit(out, ["toy"], limit=4, **options).verdict


def test_a_single_answer_has_no_interval(made, tmp_path, monkeypatch):
    monkeypatch.setattr("layerprune.auditor.measurement.PROMPTS", FEW[:1])
    out = tiny.exported(made / "base", tmp_path / "smaller")
    found = audit(out, ["writing"], limit=1, include_path=[made / "tasks"], layerwise=False)
    assert {one.models[PRUNED].agreed_interval for one in found.own_answers} == {None}
    assert "of the tokens the base wrote on 1 unseen prompt of writing" in found.verdict
    assert not any("own answers" in problem for problem in verify(out).problems)


def test_what_is_sampled_is_not_kept(made):
    from layerprune.data.tasks import load_eval_set
    from layerprune.models.model import LoadedModel

    loaded = LoadedModel.load(str(made / "base"))
    task = load_eval_set(["writing"], loaded.encoder, use="selection", include_path=[made / "tasks"]).tasks["writing"]
    instances = [item.queries[0].generation for item in task.items]
    for instance in instances:
        instance.args[1].update(do_sample=True, temperature=1.0)
    generation.generate(loaded, instances, memory=2**30)
    assert loaded.encoder.kept == {}
    generation.generate(loaded, instances, memory=2**30, greedy=True)
    assert len(loaded.encoder.kept) == len(instances)
