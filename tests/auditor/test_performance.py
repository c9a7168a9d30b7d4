"""Text and generation: the parts of the audit that multiple choice cannot see."""

import numpy as np
import pytest
import torch

import audit_tiny as tiny
from layerprune.auditor.generation import Continued, faults, health, repeated_share, surprise, write
from layerprune.auditor.performance import cache_bytes_per_token, read_text, text_loss, windows_of
from layerprune.errors import UsageError
from layerprune.models.generation import can_be_batched
from layerprune.models.model import LoadedModel

PROSE = "It was a bright cold day in spring, and all the clocks of the small town struck the hour together. " * 40


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = tiny.base_model(folder / "base")
    pruned = tiny.pruned_by_hand(base, folder / "pruned", 3)
    return LoadedModel.load(str(base)), LoadedModel.load(str(pruned))


@torch.no_grad()
def by_hand(loaded, window):
    logits = loaded.model(torch.tensor([window])).logits[0, :-1].double()
    return torch.log(torch.softmax(logits, -1))


def test_text_loss_is_perplexity_and_kl_as_textbooks_write_them(subjects):
    base, pruned = subjects
    windows = windows_of(PROSE, base, window=64, most=5)
    assert len(windows) == 5
    assert all(len(window) == 65 and window[0] == 256 for window in windows)
    found = text_loss(base, pruned, windows, "prose")
    before = [-np.mean([float(row[t]) for row, t in zip(by_hand(base, w), w[1:], strict=True)]) for w in windows]
    after = [-np.mean([float(row[t]) for row, t in zip(by_hand(pruned, w), w[1:], strict=True)]) for w in windows]
    kl = [torch.nn.functional.kl_div(by_hand(pruned, w), by_hand(base, w), log_target=True, reduction="batchmean")
          for w in windows]  # fmt: skip
    assert found.base_nats == pytest.approx(np.mean(before), rel=1e-5)
    assert found.nats == pytest.approx(np.mean(after), rel=1e-5)
    assert found.difference == pytest.approx(found.nats - found.base_nats)
    assert found.kl == pytest.approx(np.mean([float(value) for value in kl]), rel=1e-4)
    assert found.interval[0] <= found.difference <= found.interval[1]
    assert found.tokens == 5 * 64


def test_a_model_beside_itself_has_lost_nothing(subjects):
    base, _ = subjects
    found = text_loss(base, base, windows_of(PROSE, base, window=64, most=3), "prose")
    assert (found.difference, found.kl, found.top1_agreement) == (0, pytest.approx(0, abs=1e-7), 1)
    assert found.interval == (0, 0)


def test_too_little_text_is_refused(subjects):
    with pytest.raises(UsageError, match=r"the text has \d+ tokens"):
        windows_of("Too short.", subjects[0])


def test_text_is_read_from_jsonl_and_faults_are_named(tmp_path):
    good, bad = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_text('{"text": "one", "source": "x"}\n\n{"text": "two"}\n')
    bad.write_text('{"content": "one"}\n')
    assert read_text(good) == "one\n\ntwo"
    with pytest.raises(UsageError, match="a field 'text'"):
        read_text(bad)
    with pytest.raises(UsageError, match="cannot read"):
        read_text(tmp_path / "missing.txt")


def test_writing_is_greedy_decoding_step_by_step_without_a_cache(subjects):
    base, _ = subjects
    (text,) = write(base, ["Explain this."])
    ids = list(text.prompt_ids)
    assert base.tokenizer.decode(ids) == "Explain this.\n"
    for token in text.ids:
        with torch.no_grad():
            assert int(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()) == token
        ids.append(token)
    assert text.text == base.tokenizer.decode(text.ids)


def test_prompts_side_by_side_are_continued_as_each_alone(subjects):
    base, _ = subjects
    prompts = ["Explain this.", "A much longer question that needs more tokens?", "Hm"]
    assert can_be_batched(base, [base.tokenizer(prompt)["input_ids"] for prompt in prompts])
    assert write(base, prompts) == [write(base, [prompt])[0] for prompt in prompts]


def test_a_model_that_looks_at_padding_is_asked_one_prompt_at_a_time(subjects, monkeypatch):
    base, _ = subjects
    prompts = ["Explain this.", "A much longer question that needs more tokens?"]
    alone = [write(base, [prompt])[0] for prompt in prompts]
    forward = base.model.forward

    def blind(*args, attention_mask=None, position_ids=None, **kwargs):  # as a model without masks would
        return forward(*args, **kwargs)

    monkeypatch.setattr(base.model, "forward", blind)
    assert not can_be_batched(base, [base.tokenizer(prompt)["input_ids"] for prompt in prompts])
    assert write(base, prompts) == alone


def test_surprise_is_the_mean_negative_log_likelihood(subjects):
    base, _ = subjects
    text = Continued((1, 2, 3), (4, 5), "x", ended=False)
    logs = by_hand(base, [1, 2, 3, 4, 5])
    assert surprise(base, text) == pytest.approx(-float(logs[2][4] + logs[3][5]) / 2, rel=1e-5)
    assert surprise(base, Continued((1,), (), "", ended=True)) is None


def text(ids=tuple(range(40)), words="All is well with this sentence.", ended=False):
    return Continued((1, 2), tuple(ids), words, ended)


@pytest.mark.parametrize(
    ("given", "nats", "expected"),
    [
        (text(), 1.0, ()),
        (text(ended=True), 1.0, ()),
        (text(ids=(), words="", ended=True), None, ("empty",)),
        (text(words=" \n \n"), 0.1, ("empty",)),
        (text(ids=(7, 8), ended=True), 1.0, ("early stop",)),
        (text(ids=(7, 8), ended=False), 1.0, ()),  # cut off by us, not by the model
        (text(ids=(5, 6, 7) * 13), 0.1, ("repeats",)),
        (text(words="some \N{REPLACEMENT CHARACTER} text"), 1.0, ("broken",)),
        (text(words="cut off \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}"), 1.0, ()),
        (text(words="bell \x07 rings"), 1.0, ("broken",)),
        (text(), 9.0, ("unlikely",)),
        (text(ids=(5,) * 40, words="\x00", ended=False), 9.0, ("repeats", "broken", "unlikely")),
    ],
)
def test_each_fault_is_found_and_sound_texts_have_none(given, nats, expected):
    assert faults(given, nats) == expected


def test_a_text_that_goes_round_in_circles_from_the_middle_on_repeats():
    circles = (*range(20), *(30, 31, 32, 33, 34, 35) * 4)  # the second half says one thing four times
    assert repeated_share(circles) == pytest.approx(15 / 41)
    assert faults(text(ids=circles), 1.0) == ("repeats",)
    once = (*range(30), *range(20, 28), *range(40, 50))  # a phrase that comes back once
    assert faults(text(ids=once), 1.0) == ()


def test_a_text_that_ends_long_before_the_bases_is_cut_short():
    short = text(ids=range(12), ended=True)
    assert faults(short, 1.0, expected=48) == ("early stop",)
    assert faults(short, 1.0, expected=30) == ()
    assert faults(text(ids=range(12), ended=False), 1.0, expected=48) == ()


def test_repeated_share_counts_windows_seen_before():
    assert repeated_share((1, 2, 3, 4, 5)) == 0
    assert repeated_share((1,) * 8) == pytest.approx(4 / 5)  # five windows, one of its own
    assert repeated_share((1, 2, 3)) == 0


def test_health_compares_pair_by_pair():
    prompts = ["a", "b", "c", "d"]
    sound = [Continued((1, 2), tuple(range(10, 30)), "fine", False) for _ in prompts]
    loops = [Continued((1, 2), (10, 11, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9), "loop", False)] * 3 + [sound[3]]

    class Judge:
        device = "cpu"

        @staticmethod
        def model(input_ids, use_cache):
            likely = 4.0 * torch.nn.functional.one_hot(input_ids.roll(-1, 1), 40)  # ln(e^4 + 39) - 4 = 0.54 nats
            return type("Output", (), {"logits": likely})

    found = health(Judge, prompts, sound, loops)
    assert (found.faulty, found.base_faulty, found.healthy) == (3, 0, False)
    assert [c.shared_tokens for c in found.continuations] == [2, 2, 2, 20]
    assert found.agreement == pytest.approx((3 * 2 / 20 + 1) / 4)
    assert health(Judge, prompts, loops, loops).healthy  # no worse than the base is healthy, and the count is shown
    assert health(Judge, prompts, sound, sound).agreement == 1


def test_text_asks_for_no_more_tokens_than_the_model_reads(subjects):
    base, _ = subjects
    assert base.positions == 128
    assert {len(window) for window in windows_of(PROSE, base)} == {128}  # its head included


def test_the_cache_of_one_more_token(subjects):
    base, pruned = subjects
    assert cache_bytes_per_token(base) == 6 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, float32
    assert cache_bytes_per_token(pruned) == 5 * 2 * 2 * 8 * 4
