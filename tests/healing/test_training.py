"""The training loop against plain training, its stops and starts, its faults, and several processes."""

import signal
import subprocess
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkout import SUPPORT
from families import FAMILIES
from heal_training import options_of, plain_training, text_loss, text_of, trainee, weights_of
from layerprune.errors import DocumentError, TrainingError, UsageError
from layerprune.healing.base import HealContext
from layerprune.healing.losses import Head, NextToken, Top, cross_entropy, divergence, divergence_from_top
from layerprune.healing.training import check_processes, main_process_first, on_own_device, order, train

HERE = SUPPORT


class Notes:
    """A progress that remembers what was said and can act on it."""

    def __init__(self, act=None):
        self.said, self.act, self.tasks = [], act, []

    def task(self, description, total, unit=""):
        self.tasks.append((description, total, unit))
        return nullcontext(lambda amount=1: self.act and self.act())

    def note(self, message):
        self.said.append(message)


def close(one, other, tolerance=2e-5):
    for name, weight in one.items():
        assert torch.allclose(weight, other[name], atol=tolerance), name


def test_it_trains_as_plain_training_does(tmp_path):
    text, options = text_of(), options_of(decay=0.1, patience=9)
    slow, fast = trainee(), trainee()
    picks = [order(len(text.train), options.batch, step, options.seed) for step in range(options.steps)]
    losses = plain_training(slow, text, options, picks)
    standing = train(fast, NextToken(), text, options, tmp_path)
    close(weights_of(slow), weights_of(fast))
    means = [sum(losses[i : i + 2]) / 2 for i in (0, 2, 4)]
    assert [point.loss for point in standing.curve[1:]] == pytest.approx(means, rel=1e-5)
    assert standing.curve[0].loss is None
    assert standing.curve[-1].heldout == pytest.approx(text_loss(slow, text.heldout), rel=1e-5)
    assert standing.curve[-1].heldout < standing.curve[0].heldout - 0.1
    assert standing.tokens == 6 * 4 * 16


@pytest.mark.parametrize("frozen", [("lm_head", "embed"), ("layers.0",)], ids=" ".join)
def test_frozen_weights_stay_as_they_are(tmp_path, frozen):
    model = trainee(frozen=frozen)
    before = weights_of(model)
    train(model, NextToken(), text_of(), options_of(steps=2), tmp_path)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == any(word in name for word in frozen), name


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_head_in_pieces_has_the_loss_and_gradient_of_whole_logits(kind, monkeypatch):
    model, text = trainee(kind), text_of(3)
    head = Head(model)
    monkeypatch.setattr("layerprune.healing.losses.PIECE_BYTES", 7 * 4 * head.vocabulary)  # 7 places a piece
    ids, counted = torch.tensor(text.train.ids), torch.tensor(text.train.counted)[:, 1:]
    head.check(ids)
    labels = ids[:, 1:][counted]
    whole = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[:, :-1][counted], labels, reduction="sum")
    names = [name for name, weight in model.named_parameters()]
    expected = torch.autograd.grad(whole, list(model.parameters()), allow_unused=True)
    grade = NextToken().prepare(None, ids, counted, labels)
    loss = head.loss(head.hidden(ids)[:, :-1][counted], grade)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    for name, one, other in zip(names, expected, found, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or torch.allclose(one, other, atol=1e-3, rtol=1e-3), name


def test_gradient_checkpointing_changes_no_weight(tmp_path):
    plain, recomputed = trainee(), trainee()
    train(plain, NextToken(), text_of(), options_of(steps=2), tmp_path / "plain")
    train(recomputed, NextToken(), text_of(), options_of(steps=2, recompute=True), tmp_path / "recomputed")
    close(weights_of(plain), weights_of(recomputed), 1e-6)


def test_every_window_comes_once_an_epoch():
    seen = [row for step in range(5) for row in order(10, 4, step, seed=3)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert order(10, 4, 1, seed=3) != order(10, 4, 1, seed=4)


def test_a_batch_that_cannot_be_shared_is_refused():
    accelerator = SimpleNamespace(num_processes=3, distributed_type="DistributedType.MULTI_CPU")
    with pytest.raises(UsageError, match="a batch of 4 windows cannot be shared by 3 processes"):
        check_processes(accelerator, options_of())
    accelerator.distributed_type = "DistributedType.FSDP"
    with pytest.raises(UsageError, match="data parallel and was launched as FSDP"):
        check_processes(accelerator, options_of())


def test_processes_wait_for_a_leader_that_works_for_hours(monkeypatch):
    """NCCL's own limit is 10 minutes, and what is first said of the processes is what holds."""
    made = []

    def state(**words):
        made.append(words)
        return SimpleNamespace(device="cpu", main_process_first=nullcontext)

    monkeypatch.setattr("accelerate.PartialState", state)
    monkeypatch.setenv("WORLD_SIZE", "2")
    case = HealContext(Path("unhealed"), SimpleNamespace(), SimpleNamespace(), Path("work"), "pruned", device="cpu")
    assert on_own_device(case).device == "cpu"
    with main_process_first():
        pass
    assert [words.get("timeout", timedelta(0)) > timedelta(days=1) for words in made] == [True, True]


def test_rate_rises_and_falls():
    rates = [options_of(steps=10, lr=1.0, warmup=2).rate(step) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_it_stops_early_and_keeps_the_best_weights(tmp_path):
    model, text = trainee(), text_of(4)
    options = options_of(steps=60, lr=5e-3, measures=30, warmup=0, patience=3)  # learns four windows by heart
    standing = train(model, NextToken(), text, options, tmp_path)
    assert standing.stopped
    assert standing.step < 60
    best = min(standing.curve, key=lambda point: point.heldout)
    assert best.step == standing.best_step < standing.step
    assert text_loss(model, text.heldout) == pytest.approx(best.heldout, rel=1e-5)


def test_an_interrupted_run_goes_on_and_ends_in_the_same_weights(tmp_path):
    text, whole = text_of(), trainee()
    options = options_of(measures=2)  # after step 3 and 6, not where it is cut off
    expected = train(whole, NextToken(), text, options, tmp_path / "whole")
    presses = iter([1, 0, 1, *[0] * 99])
    notes = Notes(lambda: next(presses) and signal.raise_signal(signal.SIGINT))
    for step in (2, 4):  # the step at hand is finished, and one more: all processes have to hear of it
        with pytest.raises(KeyboardInterrupt):
            train(trainee(), NextToken(), text, options, tmp_path / "cut", notes)
        assert f"stopped after step {step}; the same command goes on from there" in notes.said[-1]
    last = trainee()
    standing = train(last, NextToken(), text, options, tmp_path / "cut", notes)
    assert "going on from step 4 of 6" in notes.said
    assert notes.tasks[-1] == ("training", 2 * 4 * 16, "tokens")
    assert standing.curve == expected.curve
    for name, weight in whole.named_parameters():
        assert torch.equal(weight, last.get_parameter(name)), name


# In a process of its own, where nothing has started threads yet: it forks. One import of torch for all of it.
RUNS = """
import os, sys
sys.path.insert(0, {here!r})
from pathlib import Path
import torch
from accelerate import debug_launcher
from heal_training import options_of, text_of, trainee, weights_of
from layerprune.healing.losses import NextToken
from layerprune.healing.training import train

torch.set_num_threads(1)
replace = Path.replace

def run(folder):
    model = trainee()
    standing = train(model, NextToken(), text_of(), options_of(), Path(folder))
    if os.environ.get("RANK", "0") == "0":
        curve = [(point.loss, point.heldout) for point in standing.curve[1:]]
        torch.save((weights_of(model), curve, os.environ.get("WORLD_SIZE", "1")), folder + ".pt")

def killed(folder, moment):
    "Run in a child that is killed as a file is renamed into place; its exit status."
    child = os.fork()
    if not child:
        count = 0
        def killing(self, target):
            nonlocal count
            count += 1
            if count == moment:
                os.kill(os.getpid(), 9)
            return replace(self, target)
        Path.replace = killing
        run(folder)
        os._exit(0)
    return os.waitpid(child, 0)[1]

for moment in (6, 2, 0):  # one folder, killed twice: between the best weights and the state, and early
    print(killed("cut", moment))
debug_launcher(run, args=("two",), num_processes=2)  # what `accelerate launch --cpu --num_processes 2` sets up
run("one")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(weights, curve, processes) of the same run whole, cut off twice, and in two processes."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "run.py").write_text(RUNS.format(here=str(HERE)))
    done = subprocess.run([sys.executable, "run.py"], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [int(line) for line in done.stdout.split()] == [signal.SIGKILL, signal.SIGKILL, 0]
    return {name: torch.load(folder / f"{name}.pt") for name in ("one", "two", "cut")}


def test_kill_9_at_any_rename_and_the_same_weights_come_out(runs):
    (whole, curve, _), (cut, other, _) = runs["one"], runs["cut"]
    assert all(torch.equal(weight, cut[name]) for name, weight in whole.items())
    assert curve == other


def test_two_processes_have_the_loss_curve_of_one(runs):
    (one, alone, _), (two, shared, processes) = runs["one"], runs["two"]
    assert processes == "2"
    assert len(alone) == 3
    for mine, theirs in zip(alone, shared, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    close(one, two)


def test_a_run_with_other_settings_is_another_run(tmp_path):
    text = text_of()
    first = train(trainee(), NextToken(), text, options_of(steps=2), tmp_path)
    other = train(trainee(), NextToken(), text, options_of(steps=2, lr=1e-3), tmp_path)
    again = train(trainee(), NextToken(), text, options_of(steps=2), tmp_path)
    assert first.curve[-1].heldout != other.curve[-1].heldout
    assert again.curve == first.curve
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("where", ["loss", "held-out"])
def test_training_that_runs_away_is_stopped_and_the_best_weights_kept(tmp_path, where):
    model, text = trainee(), text_of()
    if where == "loss":
        options = options_of(lr=1e30, clip=1e30, warmup=0)
    else:
        options = options_of(lr=3.0, warmup=0, steps=3, measures=3)
    said = r"(the loss of step \d|the held-out loss is).*best weights so far, of step 0"
    with pytest.raises(TrainingError, match=said):
        train(model, NextToken(), text, options, tmp_path)
    [best] = tmp_path.glob("*/best.safetensors")
    from safetensors.torch import load_file

    close(load_file(best), weights_of(trainee()), 0)


def test_a_damaged_state_is_named(tmp_path):
    train(trainee(), NextToken(), text_of(), options_of(steps=2), tmp_path)
    [path] = tmp_path.glob("*/last.pt")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b'{"step": 1'):
        path.write_bytes(damaged)
        with pytest.raises(DocumentError, match=r"last.pt is damaged .* remove .* to begin anew"):
            train(trainee(), NextToken(), text_of(), options_of(steps=2), tmp_path)
    path.write_bytes(whole)
    torch.save({"state": {}, "weights": {}, "optimizer": {}}, path)
    with pytest.raises(DocumentError, match=r"last.pt is damaged \(it holds other weights\); remove"):
        train(trainee(), NextToken(), text_of(), options_of(steps=2), tmp_path)


def test_a_state_that_does_not_fit_into_memory_is_not_called_damaged(tmp_path, monkeypatch):
    train(trainee(), NextToken(), text_of(), options_of(steps=2), tmp_path)

    def full(self, moments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError):
        train(trainee(), NextToken(), text_of(), options_of(steps=2), tmp_path)


def rows_of(seed=0, places=9, vocabulary=31):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = 3 * torch.randn(2, places, vocabulary, generator=generator)
    return student.requires_grad_(), teacher, torch.randint(vocabulary, (places,), generator=generator)


def agree(found, expected, student):
    value, gradient = found
    [by_autograd] = torch.autograd.grad(expected, student)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(gradient, by_autograd, atol=1e-6)


def test_cross_entropy_is_that_of_torch():
    student, _, labels = rows_of()
    expected = torch.nn.functional.cross_entropy(student, labels, reduction="sum")
    agree(cross_entropy(student.detach().clone(), labels), expected, student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_that_of_torch(temperature):
    student, teacher, _ = rows_of()
    logs = [(each / temperature).log_softmax(-1) for each in (student, teacher)]
    expected = temperature**2 * torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True)
    agree(divergence(student.detach().clone(), teacher.clone(), temperature), expected, student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, 30])
def test_divergence_from_the_top_lumps_the_rest_together(temperature, k):
    student, teacher, _ = rows_of()
    top = Top.of(teacher, k, temperature)

    def lumped(logits):
        chances = (logits.double() / temperature).softmax(-1)
        return torch.cat([chances.gather(-1, top.tokens), 1 - chances.gather(-1, top.tokens).sum(-1, keepdim=True)], -1)

    expected = temperature**2 * (lumped(teacher) * (lumped(teacher) / lumped(student)).log()).sum()
    agree(divergence_from_top(student.detach().clone(), top, temperature), expected, student)


def test_divergence_from_the_whole_vocabulary_is_the_whole_divergence():
    student, teacher, _ = rows_of()
    whole = float(divergence(student.detach().clone(), teacher.clone(), 1.0)[0])
    top_of = {k: divergence_from_top(student.detach().clone(), Top.of(teacher, k, 1.0), 1.0)[0] for k in (9, 31)}
    assert float(top_of[31]) == pytest.approx(whole, rel=1e-5)
    assert float(top_of[9]) < whole


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("optimizer", {}, ""), ("optimizer", None, ""), ("optimizer", "x", ""), ("weights", [1], ""),
        ("state", {"step": -5}, ""), ("state", {"step": 3}, "it is of step 3"),
    ],
)  # fmt: skip
def test_a_state_with_another_part_is_called_damaged(tmp_path, part, value, said):
    train(trainee(), NextToken(), text_of(), options_of(steps=2), tmp_path)
    [path] = tmp_path.glob("*/last.pt")
    torch.save(torch.load(path) | {part: value}, path)
    with pytest.raises(DocumentError, match=rf"last.pt is damaged .*{said}.* to begin anew"):
        train(trainee(), NextToken(), text_of(), options_of(steps=2), tmp_path)


def test_damaged_best_weights_are_named(tmp_path):
    from safetensors.torch import save_file

    text, options = text_of(4), options_of(steps=60, lr=5e-3, measures=30, warmup=0, patience=3)
    train(trainee(), NextToken(), text, options, tmp_path)  # stops early: the best step is not the last
    [path] = tmp_path.glob("*/best.safetensors")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", None):
        path.write_bytes(damaged) if damaged is not None else save_file({"other": torch.zeros(2)}, path)
        with pytest.raises(DocumentError, match=r"best.safetensors is damaged .* remove .* to begin anew"):
            train(trainee(), NextToken(), text, options, tmp_path)
    path.unlink()
    with pytest.raises(DocumentError, match=r"best.safetensors is damaged"):
        train(trainee(), NextToken(), text, options, tmp_path)
