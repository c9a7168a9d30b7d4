"""A random tiny llama with a byte tokenizer, questions it answers well by construction, and a folder pruned from it."""

from __future__ import annotations

import hashlib
import json
import random
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import audit_samples as samples
from layerprune.artifacts import Audit, FileEntry, ModelRef, Receipt, TaskData
from layerprune.checkpoint import Checkpoint, locate, location

DEPTH = 6
WORDS = ("red fox", "old oak", "blue sky", "tin can", "wet dog", "big map", "ice cap", "sun hat")
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    train: {folder}/{name}-train.jsonl
    test: {folder}/{name}-test.jsonl
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


def base_model(folder: Path) -> Path:
    """A six-layer llama of 32 dimensions whose layers matter: their weights are large for a random model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.25,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate(letters)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)
    return folder


@torch.no_grad()
def model_and_task(folder: Path, train: int) -> Path:
    """Lay a base model and its task ``toy`` with ``train`` items to choose by into ``folder``."""
    base_model(folder / "base")
    eval_set(folder / "base", folder / "tasks", "toy", train=train, test=2)
    return folder


def eval_set(base: Path, folder: Path, name: str = "toy", test: int = 60, train: int = 20, known: float = 0.85) -> Path:
    """Write a task whose gold answer is the base model's own favourite in a share ``known`` of the items."""
    weights = hashlib.sha256((Path(base) / "model.safetensors").read_bytes()).hexdigest()
    rng = random.Random(name)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("test", test)):
        asked = [(f"{split} {name} {number}:", tuple(rng.sample(WORDS, 4)), rng.random()) for number in range(count)]
        lines = []
        for question, choices, luck in asked:
            best = _favourite(weights, str(base), question, choices)
            gold = best if luck < known else (best + 1) % 4
            lines.append(json.dumps({"question": question, "choices": choices, "gold": gold}))
        (folder / f"{name}-{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder))
    return folder


_favourites: dict[tuple[str, str, tuple[str, ...]], int] = {}  # of the same weights, in all the tests of a process


@torch.no_grad()
def _favourite(weights: str, base: str, question: str, choices: tuple[str, ...]) -> int:
    """Return which choice the model finds likeliest, asked plainly, one after another."""
    known = (weights, question, choices)
    if known not in _favourites:
        model, tokenizer = _loaded(weights, base)
        scores = []
        for choice in choices:
            prompt = tokenizer(question, return_tensors="pt").input_ids
            answer = tokenizer(" " + choice, return_tensors="pt").input_ids
            logs = model(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
            scores.append(float(logs.gather(1, answer[0][:, None]).sum()))
        _favourites[known] = scores.index(max(scores))
    return _favourites[known]


@cache
def _loaded(weights: str, base: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    return AutoModelForCausalLM.from_pretrained(base), PreTrainedTokenizerFast.from_pretrained(base)


def pruned_by_hand(base: Path, out: Path, layer: int) -> Path:
    """The obvious way to remove one layer of a llama, independent of layerprune's export."""
    model = AutoModelForCausalLM.from_pretrained(base)
    state = {}
    for key, tensor in model.state_dict().items():
        parts = key.split(".")
        if parts[:2] == ["model", "layers"]:
            if int(parts[2]) == layer:
                continue
            parts[2] = str(int(parts[2]) - (int(parts[2]) > layer))
        state[".".join(parts)] = tensor
    config = LlamaConfig.from_pretrained(base)
    config.num_hidden_layers = DEPTH - 1
    smaller = LlamaForCausalLM(config)
    smaller.load_state_dict(state)
    smaller.save_pretrained(out)
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(out)
    return out


def reference(folder: Path) -> ModelRef:
    checkpoint = Checkpoint.open(folder)
    return location.reference(
        locate(str(folder)),
        checkpoint,
        model_type="llama",
        layers=json.loads((folder / "config.json").read_text())["num_hidden_layers"],
        parameters=checkpoint.parameters,
    )


def exported(base: Path, out: Path, layer: int = 3, seen: tuple[TaskData, ...] = ()) -> Path:
    """A folder as export leaves it: pruned weights, plan and receipt."""
    pruned_by_hand(base, out, layer)
    files = {
        path.name: FileEntry(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), bytes=path.stat().st_size)
        for path in out.iterdir()
    }
    plan = samples.plan(model=reference(base), removal=(layer,), order=(layer,), ranking=(), data=seen)
    plan.save(out / "layerprune" / "plan.json")
    before, after = Checkpoint.open(base).nbytes, Checkpoint.open(out).nbytes
    result = reference(out).model_copy(update={"id": out.name})
    receipt = samples.receipt(plan, result=result, bytes_before=before, bytes_after=after, files=files)
    receipt.save(out / "layerprune" / "receipt.json")
    return out


def audited(folder: Path, test: int) -> Path:
    """A base, its task of ``test`` items in ``tasks`` and an audited folder ``out`` whose receipt names its files."""
    from layerprune.auditor import audit

    base = base_model(folder / "base")
    eval_set(base, folder / "tasks", test=test)
    out = with_files(exported(base, folder / "out"))
    audit(out, ["toy"], include_path=[folder / "tasks"], generation=False)
    return out


def with_files(out: Path) -> Path:
    """Have the receipt name the files of an exported folder, and renew its card."""
    from layerprune.report.card import write_card

    path = out / "layerprune" / Receipt.filename
    files = {
        file.name: FileEntry(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), bytes=file.stat().st_size)
        for file in out.iterdir()
        if file.is_file()
    }
    Receipt.load(path).model_copy(update={"files": files}).save(path)
    write_card(out)
    return out


def rewrite(out: Path, **changes: object) -> None:
    """Change fields of an audit, and renew what is made from it."""
    from layerprune.report.card import write_card
    from layerprune.report.page import write_report

    path = out / "layerprune" / Audit.filename
    Audit.load(path).model_copy(update=changes).save(path)
    write_card(out)  # the forger is careful
    write_report(out)
