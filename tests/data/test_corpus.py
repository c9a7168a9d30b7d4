"""Text for healing: every way to give it, packed without padding, without what audits ask, a tenth held out."""

import json
import re

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import heal_tiny
from layerprune.auditor.performance import read_text
from layerprune.data.corpus import (
    IGNORED,
    Passage,
    TextDocument,
    build_corpus,
    chat_passage,
    find_overlap,
    pack,
    read_documents,
)
from layerprune.errors import UsageError

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character, so that a test can count."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "<s>"])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    fast.chat_template = TEMPLATE
    return fast


def test_windows_are_full_and_hold_the_text_in_order(tokenizer):
    passages = [Passage.of_text(tokenizer(text)["input_ids"], 256) for text in ("one two", "three")]
    windows = pack(passages, 4)
    assert windows.ids.shape == (3, 4)  # <s>one two<s>three is 14 tokens
    assert tokenizer.decode(windows.ids.reshape(-1)) == "<s>one two<s>thr"
    assert windows.counted.reshape(-1).tolist() == [False, *[True] * 7, False, *[True] * 3]
    assert (windows.labels == np.where(windows.counted, windows.ids, IGNORED)).all()


def test_windows_in_which_nothing_counts_are_left_out():
    ids = tuple(range(8))
    windows = pack([Passage(ids, (False,) * 4 + (True,) + (False,) * 3)], 4)
    assert len(windows) == 0  # the one counted token heads its window: nothing predicts it
    assert pack([Passage(ids, (False,) * 5 + (True,) + (False,) * 2)], 4).ids.tolist() == [[4, 5, 6, 7]]


def test_loss_of_a_chat_is_on_answers_only(tokenizer):
    asked = ("system", "be kind"), ("user", "hi?"), ("assistant", "hello"), ("user", "bye"), ("assistant", "so long")
    passage = chat_passage(tokenizer, asked)
    text = tokenizer.decode(passage.ids)
    assert text.startswith("<|system|>be kind<|end|>\n<|user|>hi?<|end|>\n<|assistant|>hello<|end|>\n")
    said = "".join(letter if counted else " " for letter, counted in zip(text, passage.counted, strict=True))
    assert re.findall(r"[^ ](?:.|\n)*?\n", said) == ["hello<|end|>\n", "so long<|end|>\n"]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (TEMPLATE, (("assistant", "hello"),), "a chat begins with the assistant"),
        ("{{ messages | length }}", (("user", "a"), ("assistant", "b"), ("user", "c")), "rewrites earlier messages"),
        ("{{ raise_exception('no system') }}", (("user", "a"), ("assistant", "b")), "not take this chat.*no system"),
        (None, (("user", "a"), ("assistant", "b")), "does not take this chat"),
    ],
)
def test_a_template_that_cannot_mark_answers_is_refused(tokenizer, monkeypatch, template, messages, message):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UsageError, match=message):
        chat_passage(tokenizer, messages)


def write(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_every_form_of_a_corpus_is_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    expected = TextDocument(messages=(("user", "a"), ("assistant", "b")))
    (tmp_path / "a.txt").write_text("first\nstill first\n\n\nsecond\n")
    write(tmp_path / "b.jsonl", {"text": "t"}, {"messages": chat}, {"prompt": "a", "completion": "b"},
          {"prompt": chat[:1], "completion": chat[1:]})  # fmt: skip
    pyarrow.parquet.write_table(pyarrow.table({"text": ["p", "q"], "source": ["x", "y"]}), tmp_path / "c.parquet")
    (tmp_path / "notes.csv").write_text("not read")
    assert [d.text for d in read_documents(str(tmp_path / "a.txt"))[1]] == ["first\nstill first", "second"]
    assert read_documents(str(tmp_path / "b.jsonl")) == ("b.jsonl", [TextDocument(text="t"), *[expected] * 3])
    assert [d.text for d in read_documents(str(tmp_path / "c.parquet"))[1]] == ["p", "q"]
    name, everything = read_documents(str(tmp_path))
    assert name == tmp_path.name
    assert len(everything) == 8


def test_line_separators_inside_json_strings_end_no_record(tmp_path):
    text = "one\u2028two\u2029three\u0085four"
    record = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_bytes(f"{record}\r\n\n{record}\n".encode())
    assert [document.text for document in read_documents(str(tmp_path / "a.jsonl"))[1]] == [text, text]
    assert read_text(tmp_path / "a.jsonl") == f"{text}\n\n{text}"


def test_a_hub_dataset_is_asked_for_by_name_and_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or [{"text": "t"}])
    assert read_documents("owner/name") == ("owner/name", [TextDocument(text="t")])
    read_documents("owner/name:test[:10]")
    assert asked == [("owner/name", "train"), ("owner/name", "test[:10]")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"content": "x"}, "record 2 has the keys content; expected 'text', 'messages', or 'prompt' and 'completion'"),
        (["x"], "record 2 is a list; expected an object"),
        ({"messages": [{"role": "user"}]}, "record 2: messages are objects with role and content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "record 2: no message has the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": [1]}]}, "record 2: a message's content is not text"),
    ],
)
def test_a_faulty_record_is_named(tmp_path, record, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        read_documents(str(write(tmp_path / "x.jsonl", {"text": "fine"}, record)))


def test_faulty_sources_are_named(tmp_path):
    (tmp_path / "x.jsonl").write_text("{")
    (tmp_path / "x.parquet").write_text("no")
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    for source, message in (
        ("x.jsonl", "cannot read the corpus"), ("x.parquet", "cannot read the corpus"), ("x.csv", "is none of .txt"),
        ("empty", "holds no text"), ("none.txt", "does not exist; give a file"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            read_documents(str(tmp_path / source))


SENTENCE = "the old clock in the tower struck nine while rain fell on every empty street below"


def test_items_are_found_by_thirteen_words_whatever_their_case_and_punctuation():
    words = SENTENCE.split()
    documents = [
        TextDocument(text=f"Yesterday, {SENTENCE.title().replace(' ', ', ')}."),
        TextDocument(text=" ".join(words[:12]) + " and then " + " ".join(words[12:])),  # twelve in a row, not thirteen
        TextDocument(messages=(("user", "what?"), ("assistant", f"{SENTENCE}!"))),
    ]
    overlap, holders = find_overlap(documents, {"toy": ("test", {"mark": SENTENCE, "other": "x " * 20})})
    assert holders == {0, 2}
    assert overlap["toy"].found == ("mark",)
    assert (overlap["toy"].items, overlap["toy"].unlooked, overlap["toy"].split) == (2, 0, "test")


def test_short_items_are_found_whole_and_very_short_ones_not_looked_for():
    items = {"nine": "a cat sat on the mat and was happy", "seven": "a cat sat on the mat and"}
    texts = ("Once a cat sat on the mat and was happy there", "a cat sat on the mat and")
    documents = [TextDocument(text=text) for text in texts]
    overlap, holders = find_overlap(documents, {"toy": ("test", items)})
    assert holders == {0}
    assert (overlap["toy"].found, overlap["toy"].unlooked) == (("nine",), 1)


def test_a_corpus_depends_on_its_documents_and_not_on_their_order(tmp_path, tokenizer):
    lines = heal_tiny.prose(tmp_path / "a.txt").read_text().strip().split("\n\n")
    (tmp_path / "b.txt").write_text("\n\n".join(reversed([*lines, lines[0]])))  # a repeated document counts once
    first, second = (build_corpus(str(tmp_path / name), tokenizer, window=64) for name in ("a.txt", "b.txt"))
    assert (first.train.ids == second.train.ids).all()
    assert first.ref.model_copy(update={"source": "b.txt"}) == second.ref
    other = build_corpus(str(tmp_path / "a.txt"), tokenizer, window=64, seed=1)
    assert other.ref.fingerprint != first.ref.fingerprint  # another order to read in
    assert other.ref.heldout_documents == first.ref.heldout_documents


def test_held_out_documents_are_in_no_other_window(tmp_path, tokenizer):
    lines = heal_tiny.prose(tmp_path / "a.txt").read_text().strip().split("\n\n")
    corpus = build_corpus(str(tmp_path / "a.txt"), tokenizer, window=64)
    train, heldout = (tokenizer.decode(part.ids.reshape(-1)) for part in (corpus.train, corpus.heldout))
    assert corpus.ref.documents + corpus.ref.heldout_documents == len(lines)
    assert 1 <= corpus.ref.heldout_documents <= 15
    assert sum(line in train for line in lines) >= corpus.ref.documents - 1  # the last one may be cut
    assert not [line for line in lines if line in train and line in heldout]
    assert (corpus.ref.windows, corpus.ref.counted) == (len(corpus.train), int(corpus.train.counted.sum()))


def test_documents_that_hold_an_audit_item_are_not_read(tmp_path, tokenizer):
    lines = heal_tiny.prose(tmp_path / "a.txt").read_text().strip().split("\n\n")
    plain = build_corpus(str(tmp_path / "a.txt"), tokenizer, window=64)
    (tmp_path / "b.txt").write_text("\n\n".join([*lines, f"Note: {SENTENCE}"]))
    found = build_corpus(str(tmp_path / "b.txt"), tokenizer, window=64, items={"toy": ("test", {"mark": SENTENCE})})
    assert (found.train.ids == plain.train.ids).all()
    assert found.ref.dropped_documents == 1
    assert found.ref.overlap["toy"].found == ("mark",)


def test_too_little_text_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a few words")
    with pytest.raises(UsageError, match=r"has \d+ tokens, not one full window; give more text or a smaller window"):
        build_corpus(str(tmp_path / "a.txt"), tokenizer, window=64)


def test_the_corpus_of_the_package_is_varied_and_fills_windows(tokenizer):
    name, documents = read_documents("builtin")
    texts = [document.text for document in documents]
    assert name == "builtin"
    assert 30_000 < sum(map(len, texts)) < 60_000
    assert len(set(texts)) == len(texts) > 40
    words = re.findall(r"[a-z]+", " ".join(texts).lower())
    assert len(set(words)) > 1500
    corpus = build_corpus("builtin", tokenizer, window=512)
    assert len(corpus.heldout) >= 4


def test_the_corpus_of_the_package_comes_with_its_licence():
    from importlib.resources import files

    assert "Apache-2.0" in (files("layerprune") / "data" / "prose.LICENSE.txt").read_text()
