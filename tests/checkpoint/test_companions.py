"""What is carried along beside the weights: by purpose, whole or not at all, the same by export, heal and push."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
from pathlib import Path

import pytest
import transformers
from safetensors.torch import save_file
from torch import ones

import audit_tiny
import hub_standin
from families import make_plan, save_tiny
from layerprune.architecture import LayerMap
from layerprune.artifacts import HealLog, Receipt
from layerprune.auditor.verification import verify
from layerprune.checkpoint import locate
from layerprune.checkpoint.companions import companions, is_companion, is_licence
from layerprune.checkpoint.writer import entry_of
from layerprune.errors import CheckpointError, UsageError
from layerprune.exporter import export
from layerprune.exporter.contents import prune_generation
from layerprune.healing import HEALERS
from layerprune.healing.healer import heal
from layerprune.hub import push
from layerprune.removal import Removal
from layerprune.report.card import write_card
from layerprune.util import Silent

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.base.modules.dense.Dense"},
    {"idx": 3, "name": "3", "path": "3_Normalize", "type": "sentence_transformers.models.Normalize"},
]
STRANGERS = (
    "secrets.json", "token.txt", "params.json", "genai_config.json", ".env", "notes.txt", "requirements.txt",
    "handler.py", "credentials.json", "wandb/run.json", "all_results.json", "configuration.json", "recipe.yaml",
    "2_Dense/secrets.json", "backup.codes", ".hidden.jinja", ".LICENSE", "tokenizer.model.bak", "tokens.json",
)  # fmt: skip


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def put(folder: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def embedder(folder: Path) -> Path:
    """Lay a sentence-transformers pipeline around a model."""
    put(folder, "1_Pooling/config.json", "2_Dense/config.json", "config_sentence_transformers.json")
    put(folder, "sentence_bert_config.json", text='{"max_seq_length": 128}')
    put(folder, "modules.json", text=json.dumps(MODULES))
    save_file({"linear.weight": ones(4, 4)}, folder / "2_Dense" / "model.safetensors")
    return folder


PIPELINE = {
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
    "2_Dense/config.json", "2_Dense/model.safetensors",
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return audit_tiny.base_model(tmp_path / "base")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def exported(base: Path, *layers: int) -> tuple[Receipt, Heard, Path]:
    heard, out = Heard(), base.parent / "out"
    return export(make_plan(base, Removal.of(*layers)), out, progress=heard), heard, out


def test_export_heal_and_push_carry_the_same(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Scaling")
    wanted = {"MODEL_LICENSE", "tokenizer.model", "chat_template.jinja", "preprocessor_config.json", *PIPELINE}
    put(base, *wanted - PIPELINE, *STRANGERS)
    embedder(base)
    receipt, heard, out = exported(base, 1, 3)
    assert wanted < set(receipt.files)
    assert not {*STRANGERS} & files(out)
    assert {*receipt.dropped_files} == {*STRANGERS}
    (line,) = [line for line in heard.said if line.startswith("left out")]
    assert all(name in line for name in STRANGERS)
    healed = tmp_path / "healed"
    heal(out, healed, method="scaling")
    assert files(healed) == files(out) | {"layerprune/heal.json"}
    kept = {"layerprune/locator.json"}  # of this machine alone
    for folder in (out, healed):
        assert verify(folder).problems == ()
        sent = push(folder, "me/x", dry_run=True, allow_unaudited=True).files
        assert {*sent} == files(folder) - kept


def older(base: Path, names: tuple[str, ...]) -> Path:
    """Return an exported folder whose export carried along more than it does today."""
    out = audit_tiny.exported(base, base.parent / "older")
    put(out, *names, text='{"token": "hf_mine"}')
    path = out / "layerprune" / "receipt.json"
    receipt = Receipt.load(path)
    receipt.model_copy(update={"files": receipt.files | {name: entry_of(out / name) for name in names}}).save(path)
    write_card(out)
    assert verify(out).problems == ()
    return out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    from huggingface_hub import constants

    server = hub_standin.Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", hub_standin.TOKEN)
    yield server
    server.shutdown()
    server.server_close()


def test_files_that_have_no_part_in_a_model_stop_a_push(hub: hub_standin.Hub, base: Path) -> None:
    out = older(base, ("secrets.json", "token.txt", "params.json"))
    why = "left out, not known as part of a model: params.json, secrets.json, token.txt: they have no part in a model"
    with pytest.raises(UsageError, match=f"{why}; export again, nothing was sent"):
        push(out, "me/x", allow_unaudited=True, wait=lambda _: None)
    assert not hub.seen


def test_what_an_older_export_carried_is_not_healed_along(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Scaling")
    heard = Heard()
    heal(older(base, ("secrets.json",)), tmp_path / "healed", method="scaling", progress=heard)
    assert "left out, not known as part of a model: secrets.json" in heard.said
    assert "secrets.json" not in HealLog.load(tmp_path / "healed/layerprune/heal.json").files
    assert verify(tmp_path / "healed").problems == ()


def vocabularies() -> set[str]:
    """Every file name that a tokenizer class of transformers loads: the literals of its VOCAB_FILES_NAMES."""
    found: set[str] = set()
    for path in Path(inspect.getfile(transformers)).parent.rglob("tokenization_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [ast.unparse(target).lower() for target in getattr(node, "targets", [])]
            if "vocab_files_names" in names and isinstance(node.value, ast.Dict):  # type: ignore[attr-defined]
                values = node.value.values  # type: ignore[attr-defined]
                found |= {value.value for value in values if isinstance(value, ast.Constant)}
    return found


def test_every_tokenizer_of_transformers_keeps_its_files() -> None:
    names = vocabularies()
    assert {"spiece.model", "merges.txt", "vocab.json", "sentencepiece.bpe.model"} < names
    assert [name for name in sorted(names) if not is_companion(name)] == []


@pytest.mark.parametrize(
    "name",
    ["source.spm", "bpe.codes", "qwen.tiktoken", "tekken.json", "vocab.bpe", "tokenizer.model.v3", "added_tokens.json",
     "special_tokens_map.json", "chat_template.json", "additional_chat_templates/rag.jinja",
     "video_preprocessor_config.json", "quantize_config.json", "hf_quant_config.json", "generation_config.json"],
)  # fmt: skip
def test_what_belongs_to_a_model(name: str) -> None:
    assert is_companion(name)


@pytest.mark.parametrize(
    "name",
    ["License.md", "license", "LICENCE", "MODEL_LICENSE", "UNLICENSE", "Notice.md", "NOTICE.txt", "COPYING",
     "USE_POLICY.md", "LICENSE.MIT", "LICENSE-CODE", "LICENSE-2.0", "Llama-3.1-License.pdf", "Third_Party_Notices.txt",
     "COPYING.LESSER", "Acceptable-Use-Policy.txt", "copyright", "LICENSE.model", "ThirdPartyNotices.txt", "EULA.md"],
)  # fmt: skip
def test_licences_by_any_name(name: str) -> None:
    assert is_licence(name)
    assert is_companion(name)


@pytest.mark.parametrize(
    "name",
    ["license.json", "license.py", "license_key.txt", ".license", "onnx/LICENSE", "noticeable.md", "LICENSE.bin"],
)
def test_what_is_no_licence(name: str) -> None:
    assert not is_licence(name)


def test_licences_come_along_and_stand_in_the_card(base: Path) -> None:
    put(base, "License.md", "MODEL_LICENSE", "Notice.md", "USE_POLICY.md", text="terms")
    base.joinpath("README.md").write_bytes(b"\xef\xbb\xbf---\nlicense: other\nlicense_name: mine\n---\nIts card.\n")
    receipt, _, out = exported(base, 2)
    assert {"License.md", "MODEL_LICENSE", "Notice.md", "USE_POLICY.md"} < set(receipt.files)
    card = (out / "README.md").read_text()
    assert "license: other\nlicense_name: mine\n" in card
    assert all(f"[{name}]({name})" in card for name in ("License.md", "MODEL_LICENSE", "Notice.md", "USE_POLICY.md"))


def test_two_names_of_one_file(base: Path) -> None:
    put(base, "LICENSE", "license")
    with pytest.raises(CheckpointError, match=r"holds LICENSE and license, which are one file on systems"):
        exported(base, 2)


def test_the_model_s_own_code_is_what_its_configs_name_and_import(tmp_path: Path) -> None:
    named = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "org/x--m.M"}
    put(tmp_path, "config.json", text=json.dumps({"auto_map": named}))
    put(tmp_path, "tokenizer_config.json", text='{"auto_map": {"AutoTokenizer": ["tokenization_own.Own", null]}}')
    code = "import os\nfrom .helpers import x\nfrom . import more\nfrom .sub.deep import y"
    put(tmp_path, "configuration_own.py", text=code)
    put(tmp_path, "helpers.py", text="try:\n    from .last import z\nexcept ImportError:\n    z = None\n")
    put(tmp_path, "more.py", "last.py", "tokenization_own.py", "sub/deep.py", "upload.py", "m.py", "os.py", text="")
    names = files(tmp_path)
    carried = set(companions(tmp_path, names, ()).carried) - {"tokenizer_config.json"}
    assert carried == {"configuration_own.py", "helpers.py", "more.py", "last.py", "tokenization_own.py", "sub/deep.py"}
    put(tmp_path, "helpers.py", text="def (")
    with pytest.raises(CheckpointError, match=r"helpers\.py cannot be read as the model's own code"):
        companions(tmp_path, names, ())


def test_params_json_of_another_vendor_is_left(tmp_path: Path) -> None:
    base = save_tiny("mistral", tmp_path / "base")
    put(base, "params.json", text='{"n_layers": 6}')
    receipt, heard, out = exported(base, 2, 3)
    assert receipt.dropped_files == ("params.json",)
    assert heard.said == ["left out, not known as part of a model: params.json"]
    assert not (out / "params.json").exists()


def module(path: str, kind: str) -> list[dict[str, object]]:
    return [MODULES[0], {"idx": 1, "name": "1", "path": path, "type": kind}]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (module("1", "sentence_transformers.models.WeightedLayerPooling"), "not known to fit a shallower model"),
        (module("", "custom_st.Transformer"), "not known to fit a shallower model"),
        (module("0_Transformer", "sentence_transformers.models.Transformer"), "not known to fit a shallower model"),
        (module("../elsewhere", "sentence_transformers.models.Pooling"), "is not a path inside the folder"),
        (module("/etc", "sentence_transformers.models.Pooling"), "is not a path inside the folder"),
        (module("9_Pooling", "sentence_transformers.models.Pooling"), "9_Pooling/config.json is not there"),
        ({"modules": []}, "it is not a list of modules"),
    ],
)
def test_a_pipeline_that_is_not_carried_whole_is_not_carried(base: Path, content: object, why: str) -> None:
    embedder(base)
    put(base, "modules.json", text=json.dumps(content))
    receipt, heard, _ = exported(base, 2)
    assert not PIPELINE & set(receipt.files)
    (line,) = [line for line in heard.said if line.startswith("modules.json and its modules are left out")]
    assert why in line
    assert "the result is no sentence-transformers model" in line


@pytest.mark.parametrize("change", ["pickle", "link", "layers"])
def test_a_pipeline_with_one_part_amiss(base: Path, tmp_path: Path, change: str) -> None:
    embedder(base)
    if change == "pickle":
        (base / "2_Dense" / "model.safetensors").rename(base / "2_Dense" / "pytorch_model.bin")
    elif change == "link":
        shutil.move(base / "1_Pooling", tmp_path / "elsewhere")
        (base / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    else:
        put(base, "sentence_bert_config.json", text='{"model_args": {"num_hidden_layers": 6}}')
    receipt, heard, out = exported(base, 2)
    assert not PIPELINE & files(out)
    assert any("modules.json and its modules are left out" in line for line in heard.said)
    assert {*receipt.dropped_files} >= {"modules.json", "sentence_bert_config.json"}


def test_a_changed_module_is_found(base: Path) -> None:
    """Its weights are not the checkpoint's own, whose fingerprint is compared."""
    from layerprune.auditor.inputs import ExportedFolder, check_folder
    from layerprune.errors import DocumentError

    _, _, out = exported(embedder(base), 2)
    save_file({"linear.weight": ones(4, 4) * 2}, out / "2_Dense" / "model.safetensors")
    with pytest.raises(DocumentError, match=r"2_Dense/model\.safetensors is not the file export wrote"):
        check_folder(ExportedFolder.read(out))


def test_a_pipeline_and_a_licence_come_from_the_hub_too(hub: hub_standin.Hub, base: Path) -> None:
    embedder(base)
    put(base, "License.md", "1_Pooling/secrets.json", "README.md", "more/config.json")
    hub.publish("me/base", base)
    assert PIPELINE | {"License.md", "README.md"} <= (there := files(locate("me/base").path))
    assert not {"1_Pooling/secrets.json", "more/config.json"} & there


def test_an_index_is_no_pattern(hub: hub_standin.Hub, tmp_path: Path) -> None:
    """Each file is fetched by its very name."""
    base = tmp_path / "base"
    put(base, "config.json")
    put(base, "private.safetensors", "model-a.safetensors", text="x")
    for name in ("*.safetensors", "model-[a].safetensors", "model-?.safetensors"):
        index = {"weight_map": {"a": name}}
        put(base, "model.safetensors.index.json", text=json.dumps(index))
        hub.publish("me/base", base)
        assert not {file for file in files(locate("me/base").path) if file.endswith(".safetensors")}
    put(base, "model.safetensors.index.json", text='{"weight_map": {"a": "training.pt"}}')
    hub.publish("me/other", base)
    with pytest.raises(CheckpointError, match=r"names 'training\.pt', which is no safetensors file"):
        locate("me/other")


def test_what_is_pushed_goes_by_its_name(hub: hub_standin.Hub, base: Path) -> None:
    out = older(base, ("LICENSE-[a].md",))
    push(out, "me/x", allow_unaudited=True, wait=lambda _: None)
    assert {*hub.repos["me/x"]["files"]} == files(out) - {"layerprune/locator.json"}


EXITS = [  # depth 6; removed, then fields before and after
    ((1, 2), {"assistant_early_exit": 5}, {"assistant_early_exit": 3}),
    ((5,), {"assistant_early_exit": 5}, {}),  # all five that are left
    ((0, 1), {"assistant_early_exit": 2}, {}),
    ((0, 1), {"assistant_early_exit": 3}, {"assistant_early_exit": 1}),
    ((3, 4), {"assistant_early_exit": 3}, {"assistant_early_exit": 3}),
    ((1, 2), {"assistant_early_exit": None}, {"assistant_early_exit": None}),
    ((1, 2), {"dola_layers": [0, 2, 3, 4]}, {"dola_layers": [0, 1, 2]}),
    ((1, 2), {"dola_layers": "high"}, {"dola_layers": "high"}),
    ((1, 2), {"alignment_heads": [[5, 1]], "skip_layers": [4], "layer_skip": 2}, {}),
    ((1, 2), {"cache_config": {"num_hidden_layers": 6, "nbits": 4}}, {"cache_config": {"nbits": 4}}),
    ((1, 2), {"top_k": 5, "eos_token_id": [4, 5]}, {"top_k": 5, "eos_token_id": [4, 5]}),
    ((), {"assistant_early_exit": 5, "skip_layers": [4]}, {"assistant_early_exit": 5, "skip_layers": [4]}),
]  # fmt: skip


@pytest.mark.parametrize(("units", "before", "after"), EXITS)
def test_layer_numbers_of_a_generation_config(
    units: tuple[int, ...], before: dict[str, object], after: dict[str, object]
) -> None:
    assert prune_generation(before, LayerMap.after(Removal.of(*units), 6)) == after


def test_an_early_exit_is_written_recorded_and_said(base: Path) -> None:
    path = base / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "assistant_early_exit": 5, "skip_layers": [1]}))
    receipt, heard, out = exported(base, 1, 2)
    content = json.loads((out / "generation_config.json").read_text())
    assert content["assistant_early_exit"] == 3
    assert "skip_layers" not in content
    change = receipt.config_changes["generation_config.json: assistant_early_exit"]
    assert (change.before, change.after) == (5, 3)
    assert "generation_config.json: assistant_early_exit 5 is 3 now" in heard.said
    assert "generation_config.json: skip_layers [1] is left out now" in heard.said
    assert verify(out).problems == ()
