"""Self-data distillation: what the base writes is what it says to each prompt alone, and it is what is trained on."""

import json

import pytest
import torch

import audit_tiny
import heal_tiny
from layerprune.data.corpus import TextDocument, build_corpus
from layerprune.errors import DocumentError, UsageError
from layerprune.exporter import export
from layerprune.healing import finetune
from layerprune.healing.distill import TeacherCache, rewrite_answers
from layerprune.healing.healer import heal
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import Journal

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CHATS = tuple(
    TextDocument(messages=chat)
    for chat in (
        (("user", "Where is the river?"), ("assistant", "There.")),
        (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And now?"), ("assistant", "Bye")),
        (("user", "A much longer question about stones and winter light"), ("assistant", "Yes")),
    )
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base that speaks in chats, a checkpoint pruned from it, and chats to heal with."""
    import families

    folder = tmp_path_factory.mktemp("answers")
    audit_tiny.base_model(folder / "base")
    config = json.loads((folder / "base" / "tokenizer_config.json").read_text())
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    export(families.make_plan(folder / "base", Removal.of(2)), folder / "pruned")
    words = heal_tiny.WORDS
    rows = [{"prompt": f"{a} {b}?", "completion": f"{b} {a} and {a}."} for a in words for b in words]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def base(home):
    return LoadedModel.load(str(home / "base"), dtype="float32")


def said(base, messages, most):
    """What the base says next, token by token, each prompt alone and without a cache."""
    turns = [{"role": role, "content": content} for role, content in messages]
    text = base.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + most and ids[-1] != base.tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return base.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_every_answer_is_what_the_base_says_to_its_prompt_alone(base, tmp_path):
    written = rewrite_answers([TextDocument(text="prose"), *CHATS], base, 6, tmp_path)
    assert [len(document.messages) for document in written] == [2, 5, 2]
    for old, new in zip(CHATS, written, strict=True):
        for place, (role, content) in enumerate(new.messages):
            expected = said(base, new.messages[:place], 6) if role == "assistant" else old.messages[place][1]
            assert content == expected


def test_it_goes_on_where_it_was_killed(base, tmp_path, monkeypatch):
    monkeypatch.setattr("layerprune.healing.distill.BATCH", 1)
    whole = rewrite_answers(CHATS, base, 6, tmp_path / "whole")
    appended, append = [], Journal.append

    def killed(self, entry):
        append(self, entry)
        appended.append(entry)
        if len(appended) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        rewrite_answers(CHATS, base, 6, tmp_path / "cut")
    assert rewrite_answers(CHATS, base, 6, tmp_path / "cut") == whole
    assert len(appended) == 3
    assert rewrite_answers(CHATS, base, 3, tmp_path / "cut") != whole  # other settings are not taken for these


def test_a_healing_reads_what_the_base_has_written(home, base, tmp_path, monkeypatch):
    read, real = [], finetune.train

    def train(model, goal, text, *rest):
        read.append(text)
        return real(model, goal, text, *rest)

    monkeypatch.setattr(finetune, "train", train)
    chats = str(home / "chats.jsonl")
    method = "distill:answers=base,answer_tokens=8,weight=0.5,steps=2,lr=0.001"
    log = heal(home / "pruned", tmp_path / "healed", method=method, corpus=chats, window=32, dtype="float32")
    corpus = build_corpus(chats, base.tokenizer, window=32)
    words = base.tokenizer.decode(read[0].train.ids.reshape(-1))
    for document in corpus.documents[10:15]:  # windows that hold questions alone are left out, the first may be one
        question = document.messages[0][1]
        assert f"<user>{question}\n<assistant>{said(base, document.messages[:1], 8)}\n" in words
        assert document.messages[1][1] not in words
    assert (read[0].heldout.ids == corpus.heldout.ids).all()  # what is held out stays as it is
    assert log.notes == (f"{log.corpus.documents} chats were answered by the base before they were read",)


def test_prose_asks_nothing(base, tmp_path):
    with pytest.raises(UsageError, match="the corpus holds none: give chats"):
        rewrite_answers([TextDocument(text="prose")], base, 6, tmp_path)


def test_damaged_files_of_what_the_base_said_are_named(tmp_path):
    kept = TeacherCache(tmp_path / "kept", 2, 1.0)
    kept.make_room(3, 4)
    rows, wanted = torch.tensor([0]), torch.ones(1, 4, dtype=torch.bool)
    assert kept.read(rows, wanted).tokens.shape == (4, 2)
    for content in (b"", b"x", b"\xff"):
        (tmp_path / "kept" / "done").write_bytes(content)
        with pytest.raises(DocumentError, match=r"done is damaged .* remove .*kept to ask the base anew"):
            assert kept.done
    for content in (b"", b"no table", (tmp_path / "kept" / "top.npy").read_bytes()[:150]):
        (tmp_path / "kept" / "top.npy").write_bytes(content)
        with pytest.raises(DocumentError, match=r"top\.npy is damaged .* remove .*kept to ask the base anew"):
            kept.read(rows, wanted)
