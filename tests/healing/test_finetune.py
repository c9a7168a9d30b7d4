"""The methods that train: which weights they train, towards what, and what is published."""

import gc
import json
import signal
import weakref
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

import audit_tiny
import heal_tiny
from families import FAMILIES
from layerprune.auditor.verification import verify
from layerprune.checkpoint import Checkpoint
from layerprune.data.corpus import build_corpus
from layerprune.errors import LayerpruneError, UsageError
from layerprune.healing.base import Cut, cuts
from layerprune.healing.distill import Distill, DistillationLoss
from layerprune.healing.finetune import Lora, Seams, final_norm, head_weights, in_mlp, projections, seams
from layerprune.healing.healer import heal
from layerprune.healing.losses import Head, NextToken
from layerprune.healing.training import Training, make_trainable, train
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.util import SILENT
from metric_tiny import subject_of

WINDOW = 16


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base that has learned the prose, and what is left of it without layers 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    prose = heal_tiny.prose(folder / "prose.txt", documents=40, words=40)
    audit_tiny.base_model(folder / "base")
    base = LoadedModel.load(str(folder / "base"), dtype="float32")
    make_trainable(base.model, {name for name, _ in base.model.named_parameters()})
    corpus = build_corpus(str(prose), base.tokenizer, window=WINDOW)
    schooling = Training(steps=40, lr=0.01, precision="float32", warmup=4, measures=1)
    train(base.model, NextToken(), corpus, schooling, folder / "schooling")
    base.model.save_pretrained(folder / "base")
    heal_tiny.pruned(folder, 2, 4)
    return folder


def healed(home, method, out, progress=SILENT, checkpoint=None, **changed):
    given = {"corpus": str(home / "prose.txt"), "window": WINDOW, "dtype": "float32"}
    return heal(checkpoint or home / "pruned-2-4", out, method=method, progress=progress, **{**given, **changed})


def tensors(folder):
    return {name: value for file in Checkpoint.open(folder).files for name, value in load_file(file).items()}


def changed(home, folder):
    """Names of the tensors that differ from the unhealed checkpoint's; all have its names, shapes and dtypes."""
    old, new = tensors(home / "pruned-2-4"), tensors(folder)
    assert {name: (value.dtype, value.shape) for name, value in old.items()} == {
        name: (value.dtype, value.shape) for name, value in new.items()
    }
    return {name for name in old if not torch.equal(old[name], new[name])}


# Base layers 0, 1, 3 and 5 are the pruned model's 0 to 3: the cuts are after its layers 1 and 2.
@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("partial:layers=1,lr=0.003,steps=4,patience=9", ("layers.3.", "lm_head", "model.norm")),
        ("partial:layers=2,head=false,lr=0.003,steps=4,patience=9", ("layers.2.", "layers.3.")),
        ("seams:lr=0.003,steps=4,patience=9", ("layers.1.", "layers.2.", "layers.3.")),
        ("distill:lr=0.003,steps=4,patience=9", ("layers.", "model.norm")),
        ("distill:train=seams,lr=0.003,steps=4,patience=9", ("layers.1.", "layers.2.", "layers.3.")),
        ("distill:train=all,weight=0.5,temperature=2,match=1,lr=0.003,steps=4,patience=9", ("",)),
        ("lora:lr=0.003,steps=4,patience=9,rank=4", ("_proj.weight",)),
    ],
)
def test_what_is_trained_is_what_changes_and_it_helps(home, tmp_path, method, trained):
    log = healed(home, method, tmp_path / "healed")
    every = tensors(home / "pruned-2-4")
    assert changed(home, tmp_path / "healed") == {n for n in every if any(part in n for part in trained)}
    assert log.heldout.after < log.heldout.before
    assert log.curve[-1].heldout < log.curve[0].heldout
    assert log.tokens == 4 * log.method.options["batch"] * WINDOW
    assert log.found["steps"] == 4
    assert (log.dtype, log.device) == ("float32", "cpu")
    assert verify(tmp_path / "healed", base=str(home / "base")).ok
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_the_adapter_on_the_unhealed_checkpoint_is_the_merged_model(home, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    healed(home, "lora:lr=0.003,steps=4,patience=9,rank=4", tmp_path / "healed")
    adapter = tmp_path / "healed" / "adapter"
    ids = torch.arange(3, 40)[None]
    unhealed = AutoModelForCausalLM.from_pretrained(home / "pruned-2-4")
    with torch.no_grad():
        before = unhealed(ids).logits
        adapted = PeftModel.from_pretrained(unhealed, adapter).eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")(ids).logits
    assert (merged - before).abs().max() > 100 * (merged - adapted).abs().max()
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert named_base(adapter) == "pruned-2-4"  # a name, no path of this machine
    assert not [file for file in adapter.iterdir() if str(home).encode() in file.read_bytes()]
    modules = json.loads((adapter / "adapter_config.json").read_text())["target_modules"]
    assert len(modules) > 2
    assert modules == sorted(modules)  # a set's order is that of one process: heal.json holds the file's hash


def named_base(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_a_log_says_where_adapters_went_on_the_attention_alone(home, tmp_path, monkeypatch):
    assert not healed(home, "lora:steps=1,rank=2", tmp_path / "all").notes
    every = projections
    monkeypatch.setattr(
        "layerprune.healing.finetune.projections", lambda loaded: tuple(t for t in every(loaded) if "attn" in t)
    )
    (note,) = healed(home, "lora:steps=1,rank=2", tmp_path / "some").notes
    assert note.startswith("adapters went on the attention alone: ")


def test_an_adapter_on_a_healed_checkpoint_says_so(home, tmp_path):
    healed(home, "rescale", tmp_path / "once")
    healed(home, "lora:steps=1,rank=2", tmp_path / "twice", checkpoint=tmp_path / "once")
    assert named_base(tmp_path / "twice" / "adapter") == "once"


@pytest.mark.parametrize("kind", FAMILIES)
def test_places_are_found_in_every_family(kind):
    loaded = subject_of(kind)
    targets = projections(loaded)
    for layer in range(len(loaded.layers)):
        mine = [target for target in targets if f".{layer}." in target]
        assert mine, f"layer {layer} has no linear map"
    assert not [target for target in targets if "lm_head" in target or "embed" in target]
    assert len(final_norm(loaded)) in (1, 2)
    shapes = {tuple(loaded.model.get_parameter(name).shape) for name in head_weights(loaded)}
    assert tuple(loaded.model.get_output_embeddings().weight.shape) in shapes


@pytest.mark.parametrize("kind", FAMILIES)
def test_peft_takes_the_targets_of_every_family(kind):
    loaded = subject_of(kind)
    targets = projections(loaded)
    ids = torch.arange(3, 20)[None]
    before = loaded.model(ids).logits
    adapted = Lora(rank=2).adapted(loaded, targets, "x", seed=0)
    assert torch.equal(loaded.model(ids).logits, before)  # fresh adapters change nothing
    found = {name.split(".lora_A")[0] for name, _ in adapted.get_base_model().named_parameters() if ".lora_A" in name}
    assert found == set(targets)


@pytest.mark.parametrize(("kind", "there"), [("llama", True), ("gpt2", True), ("mixtral", False), ("qwen2_moe", False)])
def test_whether_adapters_go_on_the_mlp_is_known(kind, there):
    loaded = subject_of(kind)
    assert in_mlp(projections(loaded)) is there


def test_cuts_and_seams():
    assert cuts(Removal.of(2, 4), 6) == (Cut(1, 3), Cut(2, 5))
    assert cuts(Removal.of(0, 1), 6) == (Cut(-1, 2),)
    assert cuts(Removal.of(5), 6) == (Cut(4, 6),)
    assert cuts(Removal(()), 6) == ()
    assert seams(Removal.of(2, 4), 6, 1) == (1, 2, 3)
    assert seams(Removal.of(3), 8, 2) == (1, 2, 3, 4)
    assert seams(Removal.of(0), 6, 1) == (0,)
    assert seams(Removal.of(5), 6, 1) == (4,)


def test_a_kept_teacher_teaches_what_a_present_one_does(home, tmp_path):
    one = healed(home, "distill:lr=0.003,steps=4,patience=9", tmp_path / "asked")
    method = "distill:lr=0.003,steps=4,patience=9,keep=99999"  # the whole vocabulary
    other = healed(home, method, tmp_path / "kept")
    few = healed(home, "distill:lr=0.003,steps=4,patience=9,keep=4", tmp_path / "few")
    losses = [[point.loss for point in log.curve[1:]] for log in (one, other, few)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2][0] < losses[0][0]  # what the top tokens do not tell apart is not asked of the student
    assert other.tokens == one.tokens + one.corpus.windows * WINDOW  # the teacher's own reading


def test_an_intact_student_has_nothing_to_learn(home, tmp_path):
    """Taught by itself, KL and distance are zero, and stay so."""
    teacher, student = (LoadedModel.load(str(home / "base"), dtype="float32") for _ in range(2))
    windows = build_corpus(str(home / "prose.txt"), teacher.tokenizer, window=WINDOW).train.first(3)
    ids, counted = torch.tensor(windows.ids), torch.tensor(windows.counted)[:, 1:]
    labels = ids[:, 1:][counted]

    def loss(goal, without=()):
        of_logits = goal.prepare(torch.arange(3), ids, counted, labels)
        with student.without(Removal.of(*without)) if without else torch.enable_grad():
            hidden = Head(student.model).hidden(ids)[:, :-1][counted]
        return float(Head(student.model).loss(hidden, of_logits) + goal.auxiliary_loss(counted)) / len(labels)

    with pytest.raises(UsageError, match="leave match out"):
        DistillationLoss(Distill(match=1.0), teacher, student, (Cut(-1, 1),))
    places = (Cut(1, 2), Cut(3, 4))
    assert loss(DistillationLoss(Distill(match=1.0), teacher, student, places)) == pytest.approx(0, abs=1e-5)
    assert loss(DistillationLoss(Distill(), teacher, student), without=(2,)) > 1e-3
    assert loss(DistillationLoss(Distill(match=1.0), teacher, student, places), without=(2,)) == pytest.approx(
        loss(DistillationLoss(Distill(), teacher, student), without=(2,)) + distance(teacher, ids, counted),
        rel=1e-4,
    )
    mixed = loss(DistillationLoss(Distill(weight=0.25), teacher, student), without=(2,))
    parts = [loss(goal, without=(2,)) for goal in (DistillationLoss(Distill(), teacher, student), NextToken())]
    assert mixed == pytest.approx(0.25 * parts[0] + 0.75 * parts[1], rel=1e-5)


def test_a_goal_that_looks_at_the_teachers_layers_lets_it_go(home):
    teacher, student = (LoadedModel.load(str(home / "base")) for _ in range(2))
    gone = weakref.ref(teacher.model)
    goal = DistillationLoss(Distill(match=1.0), teacher, student, (Cut(1, 2),))
    gc.disable()  # by count alone, before a collector comes by
    try:
        del goal, teacher
        assert gone() is None
    finally:
        gc.enable()


def distance(loaded, ids, counted):
    """Relative squared distance at the cut after layer 3 when layer 2 is gone, half of it: the other cut has none."""
    with torch.no_grad():
        whole = loaded.model(ids, output_hidden_states=True, use_cache=False).hidden_states[4][:, :-1][counted]
        with loaded.without(Removal.of(2)):
            cut = loaded.model(ids, output_hidden_states=True, use_cache=False).hidden_states[4][:, :-1][counted]
    return float(((whole - cut).norm(dim=-1) / whole.norm(dim=-1)).pow(2).mean()) / 2


def test_bfloat16_trains_float32_weights(home, tmp_path):
    log = healed(home, "distill:lr=0.003,steps=4,patience=9", tmp_path / "healed", dtype="bfloat16")
    assert log.dtype == "bfloat16"
    assert log.heldout.after < log.heldout.before
    assert changed(home, tmp_path / "healed")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lora(rank=0), "rank is 0 and has to be from 1 to 10,000"),
        (lambda: Seams(width=0), "width is 0 and has to be from 1 to 10,000"),
        (lambda: Distill(weight=1.5), "weight is 1.5 and has to be from 0 to 1"),
        (lambda: Distill(lr=0), "lr is 0 and has to be from 1e-09 to 10.0"),
        (lambda: Distill(steps=0), "steps is 0 and has to be from 1 to 10,000,000"),
    ],
)
def test_impossible_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("method", "changed", "message"),
    [
        ("partial:layers=9", {}, "the last 9 layers were asked for and the model has 4"),
        ("lora", {"dtype": "float16"}, "gradients do not fit float16"),
        ("seams", {"corpus": None}, "seams reads text"),
    ],
)
def test_faults_are_told_before_anything_is_written(home, tmp_path, method, changed, message):
    with pytest.raises(UsageError, match=message):
        healed(home, method, tmp_path / "healed", **changed)
    assert not (tmp_path / "healed").exists()


class Pressing:
    """Presses Ctrl-C at the second step."""

    def __init__(self):
        self.steps, self.said = 0, []

    def task(self, description, total, unit=""):
        def advance(amount=1):
            self.steps += description == "training"
            if self.steps == 1:
                signal.raise_signal(signal.SIGINT)

        return nullcontext(advance)

    def note(self, message):
        self.said.append(message)


def test_a_run_that_was_cut_off_goes_on(home, tmp_path):
    method = "seams:lr=0.01,steps=6"
    whole = healed(home, method, tmp_path / "whole")
    pressing = Pressing()
    with pytest.raises(KeyboardInterrupt):
        healed(home, method, tmp_path / "cut", progress=pressing)
    assert not (tmp_path / "cut").exists()
    log = healed(home, method, tmp_path / "cut", progress=pressing)
    assert "going on from step 2 of 6" in pressing.said
    assert log.result.fingerprint == whole.result.fingerprint
    assert log.curve == whole.curve
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


@pytest.mark.parametrize(
    ("first", "removed", "second"),
    [
        ("lora:lr=0.01,steps=4,rank=2", (1, 3), "lora:lr=0.01,steps=4,rank=2"),
        ("partial:lr=0.01,steps=4,layers=1", (1, 3), "partial:lr=0.01,steps=4,layers=1"),
        ("lora:lr=0.01,steps=4,rank=2", (2, 4), "lora:lr=0.01,steps=4,rank=2,alpha=64"),
    ],
)
def test_a_run_never_goes_on_from_that_of_another_checkpoint_or_method(home, tmp_path, first, removed, second):
    """Fresh adapters and the last layers are the same in both checkpoints; the rest of the model is not."""
    with pytest.raises(KeyboardInterrupt):
        healed(home, first, tmp_path / "healed", progress=Pressing())
    other = heal_tiny.pruned(home, *removed)
    notes = Pressing()
    notes.steps = 2  # pressed already
    log = healed(home, second, tmp_path / "healed", notes, checkpoint=other)
    assert not [note for note in notes.said if "going on" in note]
    alone = healed(home, second, tmp_path / "alone", checkpoint=other)
    assert log.result.fingerprint == alone.result.fingerprint


def test_training_that_runs_away_leaves_its_best_weights(home, tmp_path):
    with pytest.raises(LayerpruneError, match=r"run away .* are kept in .*\.healed\.healing/training/.*/best"):
        healed(home, "seams:lr=10,steps=6,clip=1e6,warmup=0", tmp_path / "healed")
    assert list(tmp_path.glob(".healed.healing/training/*/best.safetensors"))
    assert not (tmp_path / "healed").exists()


@pytest.mark.slow
def test_accelerate_launch_on_two_processes_heals_as_one(home, tmp_path):
    """The command itself in two CPU processes: one folder, one log, the loss curve of a single process."""
    import subprocess
    import sys

    from layerprune.artifacts import HealLog

    method = "distill:lr=0.003,steps=4,patience=9,keep=20"
    alone = healed(home, method, tmp_path / "one")
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    asked = ["--method", method, "--corpus", str(home / "prose.txt"), "--window", str(WINDOW), "--dtype", "float32"]
    done = subprocess.run(
        [*launch, "--module", "layerprune", "heal", str(home / "pruned-2-4"), "-o", str(tmp_path / "two"), *asked],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 1
    shared = HealLog.load(tmp_path / "two" / "layerprune" / "heal.json")
    figures = [[p.heldout for p in log.curve] + [p.loss for p in log.curve[1:]] for log in (alone, shared)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    assert shared.tokens == alone.tokens
    assert verify(tmp_path / "two", base=str(home / "base")).ok
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
