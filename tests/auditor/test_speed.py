"""The clock: batch sizes, what has no room for one, and vLLM in place of transformers, by a stand-in for it."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import audit_tiny as tiny
from cli_tiny import done, last_line
from layerprune.artifacts import Audit, Speed
from layerprune.auditor import speed as clock
from layerprune.auditor.speed import time_both, time_vllm
from layerprune.auditor.verification import verify
from layerprune.config import AuditConfig, PlanConfig
from layerprune.errors import ModelError, UsageError
from layerprune.models.model import LoadedModel

FULL = torch.OutOfMemoryError("CUDA out of memory")
FIGURES = {"first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s"}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    return tiny.base_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def subjects(base_folder, tmp_path_factory):
    pruned = tiny.pruned_by_hand(base_folder, tmp_path_factory.mktemp("pruned") / "pruned", 3)
    return LoadedModel.load(str(base_folder)), LoadedModel.load(str(pruned))


@pytest.fixture(scope="module")
def tasks(base_folder, tmp_path_factory):
    return tiny.eval_set(base_folder, tmp_path_factory.mktemp("tasks"), "toy")


@pytest.fixture
def out(base_folder, tmp_path):
    return tiny.exported(base_folder, tmp_path / "smaller")


class Watched:
    """Forward passes of a model as (batch, tokens), in order; out of memory from so many sequences on."""

    def __init__(self, monkeypatch, *subjects, room=10**6, error=FULL):
        self.shapes = []
        for number, loaded in enumerate(subjects):
            forward = loaded.model.forward

            def watched(*args, number=number, forward=forward, logits_to_keep=0, **kwargs):
                rows, tokens = kwargs["input_ids"].shape
                self.shapes.append((number, rows, tokens, logits_to_keep))
                if rows >= room:
                    raise error
                return forward(*args, logits_to_keep=logits_to_keep, **kwargs)

            monkeypatch.setattr(loaded.model, "forward", watched)


def test_one_sequence_alone_unless_more_is_asked(subjects, monkeypatch):
    seen = Watched(monkeypatch, *subjects).shapes
    found = time_both(*subjects, repeats=3, prompt_tokens=32, new_tokens=4)
    assert set(found.base) == set(found.pruned) == FIGURES
    for measured in (*found.base.values(), *found.pruned.values()):
        assert 0 < measured.low <= measured.median <= measured.high
    assert found.layers_kept == pytest.approx(5 / 6)
    assert found.batches is None
    assert found.by_batch == ()
    run = [(32, 1), *[(1, 0)] * 4]  # a prompt whose last logits are asked for, and the new tokens one by one
    order = [0, 1, 1, 0, 0, 1, 1, 0]  # base and pruned, a warm-up each, then in turn
    assert seen == [(who, 1, tokens, last) for who in order for tokens, last in run]


def test_what_was_timed_is_named(subjects):
    found = time_both(*subjects, repeats=1, prompt_tokens=8, new_tokens=2)
    assert found.engine.startswith("transformers 5.")
    assert found.threads == torch.get_num_threads()
    assert found.device.startswith(f"cpu, {found.threads} thread")
    assert (found.dtype, found.prompt_tokens, found.new_tokens, found.repeats) == ("float32", 8, 2, 1)


def test_the_clock_asks_for_no_more_tokens_than_the_model_reads(subjects):
    assert subjects[0].positions == 128
    assert time_both(*subjects, repeats=1, new_tokens=4).prompt_tokens == 124


def test_larger_batches_hold_as_many_different_prompts(subjects, monkeypatch):
    seen = Watched(monkeypatch, *subjects).shapes
    found = time_both(*subjects, repeats=4, prompt_tokens=16, new_tokens=2, larger=(8, 32))
    assert [(batch.batch_size, batch.repeats) for batch in found.batches] == [(8, 3), (32, 3)]  # fewer, on a CPU
    prompts = [shape[:3] for shape in seen if shape[2] == 16]
    assert [prompts.count((1, size, 16)) for size in (1, 8, 32)] == [5, 4, 4]  # a warm-up more
    assert [batch.batch_size for batch in found.by_batch] == [1, 8, 32]
    assert {shape[1] for shape in seen} == {1, 8, 32}
    for batch in found.by_batch:
        assert batch.left_out is None
        for own in (batch.base, batch.pruned):
            assert set(own) == FIGURES
    assert Speed.model_validate_json(found.model_dump_json(), strict=True) == found


def test_rates_are_tokens_of_all_sequences_over_the_seconds_of_their_phase(subjects, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ticks)))  # each phase takes one second
    found = time_both(*subjects, repeats=1, prompt_tokens=16, new_tokens=2, larger=(8,))
    for batch in found.by_batch:
        assert batch.base["first_token_s"].median == 1
        assert batch.base["prefill_tokens_per_s"].median == 16 * batch.batch_size
        assert batch.pruned["decode_tokens_per_s"].median == 2 * batch.batch_size


@pytest.mark.parametrize("error", [FULL, MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")])
@pytest.mark.parametrize(("room", "left_out"), [(32, [32]), (8, [8, 32])])
def test_a_batch_without_room_is_left_out_and_said_so(subjects, monkeypatch, error, room, left_out):
    Watched(monkeypatch, subjects[1], room=room, error=error)  # the base alone would have the room
    found = time_both(*subjects, repeats=1, prompt_tokens=16, new_tokens=2, larger=(8, 32))
    assert [batch.batch_size for batch in found.batches if batch.left_out] == left_out
    assert {batch.left_out for batch in found.batches if batch.left_out} == {
        f"no room in memory for {left_out[0]} sequences"
    }
    assert all((batch.base is None) == (batch.left_out is not None) for batch in found.batches)


def test_main_memory_without_room_is_seen_before_it_is_full(subjects, monkeypatch):
    needed = 2 * 32 * (16 + 2) * subjects[0].cache_bytes
    monkeypatch.setattr(clock, "free_memory", lambda device: needed - 1)
    seen = Watched(monkeypatch, *subjects).shapes
    found = time_both(*subjects, repeats=1, prompt_tokens=16, new_tokens=2, larger=(8, 32))
    assert [batch.left_out is None for batch in found.batches] == [True, False]
    assert {shape[1] for shape in seen} == {1, 8}


def test_another_fault_is_no_lack_of_room(subjects, monkeypatch):
    Watched(monkeypatch, subjects[0], room=8, error=RuntimeError("an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        time_both(*subjects, repeats=1, prompt_tokens=16, new_tokens=2, larger=(8, 32))


def test_every_card_that_a_model_lies_on_is_waited_for_before_the_clock_is_read(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda card: events.append(str(card)))
    real = clock.time.perf_counter
    monkeypatch.setattr(clock.time, "perf_counter", lambda: events.append("read") or real())

    class Spread:
        """Layers on two cards, of which this machine has none: only where they lie is told."""

        device, dtype, positions, vocabulary = torch.device("cpu"), torch.float32, None, 10
        architecture = SimpleNamespace(depth=2)

        class Model:
            @staticmethod
            def parameters():
                return [SimpleNamespace(device=torch.device(place)) for place in ("cuda:1", "cpu", "cuda:0", "cuda:1")]

            @staticmethod
            def forward(input_ids, past_key_values=None, use_cache=True):  # it knows no logits_to_keep
                return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 10), past_key_values=None)

            __call__ = forward

        model = Model()

    time_both(Spread, Spread, repeats=1, prompt_tokens=4, new_tokens=2)
    assert events == ["cuda:0", "cuda:1", "read"] * 3 * 4  # three readings a run, two runs of each model


def audited(out, tasks, *words):
    return ["audit", out, "--tasks", "toy", "--include-path", tasks, "--limit", "8", "--no-generation", *words]


def test_an_audit_tells_of_every_batch_size_in_document_card_report_and_on_screen(out, tasks, monkeypatch):
    made = time_both

    def without_room(base, pruned, **options):
        Watched(monkeypatch, pruned, room=32)
        return made(base, pruned, **{**options, "repeats": 1, "prompt_tokens": 16, "new_tokens": 2})

    monkeypatch.setattr("layerprune.auditor.measurement.time_both", without_room)
    said = done(*audited(out, tasks, "--speed")).stdout
    found = Audit.load(out / "layerprune" / "audit.json").speed
    assert [(batch.batch_size, batch.left_out) for batch in found.by_batch] == [
        (1, None), (8, None), (32, "no room in memory for 32 sequences"),
    ]  # fmt: skip
    prefill = f"{found.batches[0].base['prefill_tokens_per_s'].median:.4g}"
    card, page = ((out / name).read_text(encoding="utf-8") for name in ("README.md", "report.html"))
    assert f"Measured by {found.engine} on cpu" in card
    assert f"| 8 | {prefill} |" in card
    assert "| 32 | left out: no room in memory for 32 sequences | | | |" in card
    assert f'<tr><th scope="row">8, prefill</th><td>{prefill} <span' in page
    assert '<tr><th scope="row">32</th><td colspan="3">left out: no room in memory for 32 sequences</td></tr>' in page
    assert f"batch size 8: tokens per s prefill {prefill} -> " in said
    assert "batch size 32: left out, no room in memory for 32 sequences" in said
    assert "--speed-engine" not in page
    assert verify(out).problems == ()


def test_an_audit_in_which_only_one_sequence_fits_says_so_of_all_others(out, tasks, monkeypatch):
    monkeypatch.setattr(clock, "free_memory", lambda device: 0)
    done(*audited(out, tasks, "--speed"))
    card = (out / "README.md").read_text(encoding="utf-8")
    for size in (8, 32):
        assert f"| {size} | left out: no room in memory for 8 sequences | | | |" in card
    assert "runs at the larger sizes" not in card
    assert verify(out).problems == ()


OLDER = {
    "device": "cpu, 1 thread", "dtype": "float32", "repeats": 7, "prompt_tokens": 256, "new_tokens": 32,
    "base": {name: {"median": 2.0, "low": 1.0, "high": 3.0} for name in sorted(FIGURES)},
    "pruned": {name: {"median": 4.0, "low": 3.0, "high": 5.0} for name in sorted(FIGURES)},
    "peak_bytes": None, "layers_kept": 0.5,
}  # fmt: skip


def test_a_speed_of_an_older_version_is_read_and_written_as_it_was():
    assert Speed.model_validate(OLDER).model_dump(mode="json") == OLDER
    newer = Speed.model_validate({**OLDER, "engine": "transformers 5.23.0", "batches": ()})
    assert newer.model_dump(mode="json") == {**OLDER, "engine": "transformers 5.23.0", "batches": []}


def test_an_audit_of_an_older_version_keeps_its_hash_card_and_report(out, tasks):
    done(*audited(out, tasks))
    path = out / "layerprune" / "audit.json"
    written = {**json.loads(path.read_text()), "speed": OLDER}
    path.write_text(json.dumps(written))
    as_hashed = json.dumps(written, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert Audit.load(path).canonical_json() == as_hashed


@pytest.mark.parametrize(
    ("batch", "fault"),
    [
        ({"batch_size": 8}, "batch size 8 has figures of both models, or says why it was left out"),
        ({"batch_size": 8, "base": OLDER["base"]}, "figures of both models"),
        ({"batch_size": 8, "base": OLDER["base"], "pruned": OLDER["base"], "left_out": "no"}, "figures of both models"),
        ({"batch_size": 8, "base": OLDER["base"], "pruned": OLDER["base"]}, "figures of both models"),
        ({"batch_size": 8, "base": {}, "pruned": OLDER["base"], "repeats": 3}, "prefill_tokens_per_s is missing"),
        ({"batch_size": 0, "left_out": "no"}, "greater than or equal to 1"),
    ],
)
def test_a_batch_is_measured_whole_or_says_why_not(batch, fault):
    with pytest.raises(ValueError, match=fault):
        Speed.model_validate({**OLDER, "batches": [batch]})


# vLLM: a stand-in with the classes and arguments that are called, which takes as long as its script says.


class FakeVllm(ModuleType):
    """Seconds of a run: one for each prompt's reading, and half a layer's for each token after the first."""

    __version__ = "0.33.0"

    def __init__(self, now, fail=None):
        super().__init__("vllm")
        self.__spec__ = ModuleSpec("vllm", None)
        self.loaded, self.asked = [], []
        module = self

        class SamplingParams:
            def __init__(self, *, temperature, max_tokens, ignore_eos):
                assert (temperature, ignore_eos) == (0.0, True)
                self.max_tokens = max_tokens

        class LLM:
            def __init__(self, *, model, max_model_len, gpu_memory_utilization, enable_prefix_caching, **options):
                if fail is not None:
                    raise fail
                assert gpu_memory_utilization <= 0.5  # two of them share the card
                assert not enable_prefix_caching  # or the second run would read nothing
                self.config = json.loads((Path(model) / "config.json").read_text())
                self.longest = max_model_len
                self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.bfloat16))
                module.loaded.append((model, options))

            def generate(self, prompts, params, *, use_tqdm):
                rows = [row["prompt_token_ids"] for row in prompts]
                assert all(0 <= token < self.config["vocab_size"] for row in rows for token in row)
                assert {len(row) + params.max_tokens for row in rows} <= set(range(self.longest + 1))
                depth = self.config["num_hidden_layers"]
                module.asked.append((depth, len(rows), params.max_tokens))
                now[0] += depth * (len(rows) + (params.max_tokens - 1) / 2)

        self.LLM, self.SamplingParams = LLM, SamplingParams


@pytest.fixture
def vllm(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    fake = FakeVllm(now)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return fake


def test_vllm_gives_the_throughput_of_each_batch(base_folder, out, vllm):
    found = time_vllm(base_folder, out, 5 / 6, repeats=2)
    assert (found.engine, found.dtype, found.threads, found.peak_bytes) == ("vllm 0.33.0", "bfloat16", None, None)
    assert (found.prompt_tokens, found.new_tokens) == (128 - 33, 32)
    assert [batch.batch_size for batch in found.by_batch] == [1, 8, 32]
    for batch in found.by_batch:
        for own, depth in ((batch.base, 6), (batch.pruned, 5)):
            assert own["first_token_s"].median == pytest.approx(depth * batch.batch_size)
            assert own["prefill_tokens_per_s"].median == pytest.approx(95 / depth)
            assert own["decode_tokens_per_s"].median == pytest.approx(batch.batch_size * 32 / (16 * depth))
    assert [asked[0] for asked in vllm.asked[:8]] == [6, 6, 5, 5, 5, 5, 6, 6]  # one token and all, models in turn
    assert {asked[2] for asked in vllm.asked} == {1, 33}


def test_an_audit_by_vllm_names_it_and_asks_its_tasks_as_ever(out, base_folder, tasks, vllm):
    words = audited(out, tasks, "--speed", "--speed-engine", "vllm", "--dtype", "float32")
    done(*words)
    audit = Audit.load(out / "layerprune" / "audit.json")
    assert audit.speed.engine == "vllm 0.33.0"
    assert audit.speed.layers_kept == pytest.approx(5 / 6)
    assert [model for model, _ in vllm.loaded] == [str(base_folder), str(out)]
    assert {options["dtype"] for _, options in vllm.loaded} == {"float32"}
    assert "by vllm 0.33.0 on" in (out / "README.md").read_text()
    again = "<span>--speed-engine</span> <span>vllm</span>"
    assert again in (out / "report.html").read_text()
    assert verify(out).problems == ()


def test_what_vllm_cannot_load_is_one_line_and_nothing_is_written(out, tasks, monkeypatch):
    fake = FakeVllm([0.0], fail=RuntimeError("Engine core initialization failed.\nSee root cause above."))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    said = last_line(*audited(out, tasks, "--speed", "--speed-engine", "vllm"))
    assert said.startswith("vLLM cannot time base and smaller: ")
    assert "Engine core initialization failed" in said
    assert not (out / "layerprune" / "audit.json").exists()


def test_a_clock_that_tells_no_time_of_decoding_is_refused(base_folder, out, vllm, monkeypatch):
    monkeypatch.setattr(clock.time, "perf_counter", iter(range(10**6)).__next__)
    with pytest.raises(ModelError, match="one token took as long as all of them"):
        time_vllm(base_folder, out, 5 / 6, repeats=1)


def test_without_vllm_one_line_says_how_to_install_it(out, tasks, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    before = sorted(path.name for path in out.rglob("*"))
    said = last_line(*audited(out, tasks, "--speed", "--speed-engine", "vllm"))
    assert said.startswith("--speed-engine vllm: vLLM is not installed; pip install 'layerprune[vllm]'")
    assert sorted(path.name for path in out.rglob("*")) == before


def test_an_engine_belongs_to_what_times_and_a_plan_is_timed_by_transformers(base_folder, tmp_path, vllm):
    with pytest.raises(UsageError, match="--speed-engine vllm belongs to --speed, which is not given"):
        AuditConfig(speed_engine="vllm")
    with pytest.raises(UsageError, match="belongs to --target-speedup, which is not given"):
        PlanConfig(model="", drop="1", speed_engine="vllm")
    words = ("--target-speedup", "1.2x", "--speed-engine", "vllm", "-o", tmp_path / "run")
    said = last_line("plan", base_folder, "--metric", "random", *words)
    assert said.startswith("--speed-engine vllm reads checkpoints, and a plan has written none yet")
    assert not (tmp_path / "run").exists()
    assert vllm.loaded == []
    with pytest.raises(UsageError, match="'sglang' is not one of transformers, vllm"):
        AuditConfig(speed=True, speed_engine="sglang")
