"""What is no causal language model, or not the one its config describes: one sentence, the same from every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_tiny import done, refused
from families import make_plan, save_tiny, tiny_config, tiny_model, types
from layerprune.architecture import Architecture, check_weights, load_config, read_architecture
from layerprune.architecture.architecture import sees_ahead
from layerprune.checkpoint import Checkpoint
from layerprune.errors import LayerpruneError, ModelError, RefusedError
from layerprune.exporter import export
from layerprune.inspection import inspect_model
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal


def edited(folder: Path, **changes: object) -> Path:
    """Change fields of a folder's config.json; None takes one away."""
    file = folder / "config.json"
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def rewritten(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without(folder: Path, *parts: str) -> Path:
    kept = {name: value for name, value in weights(folder).items() if not any(part in name for part in parts)}
    return rewritten(folder, kept)


def added(folder: Path, **tensors: torch.Tensor) -> Path:
    return rewritten(folder, {**weights(folder), **{name.replace("__", "."): value for name, value in tensors.items()}})


def stale_depth(folder: Path) -> Path:
    """The folder of a model whose last layers were deleted in memory, without a change of its config."""
    return without(save_tiny("llama", folder), ".layers.4.", ".layers.5.")


def headless_embedder(folder: Path) -> Path:
    tiny_model("mistral").model.save_pretrained(folder)  # type: ignore[union-attr, operator]
    return folder


def reward_model(folder: Path) -> Path:
    base = save_tiny("llama", folder, tie_word_embeddings=True)
    return edited(added(base, score__weight=torch.ones(1, 32)), architectures=["LlamaForSequenceClassification"])


def encoder(folder: Path) -> Path:
    from transformers import BertForMaskedLM

    BertForMaskedLM(tiny_config("bert", is_decoder=False)).save_pretrained(folder)
    return folder


def value_head(folder: Path) -> Path:
    base = save_tiny("llama", folder)
    return added(base, v_head__summary__weight=torch.ones(1, 32), v_head__summary__bias=torch.ones(1))


def foreign_shapes(folder: Path) -> Path:
    return edited(save_tiny("llama", folder), vocab_size=104)


def hole(folder: Path) -> Path:
    return without(save_tiny("llama", folder), ".layers.2.")


def deeper(folder: Path) -> Path:
    return edited(save_tiny("qwen3", folder), num_hidden_layers=4, layer_types=["full_attention"] * 4)


def incomplete(folder: Path) -> Path:
    return without(save_tiny("llama", folder), "layers.3.mlp.up_proj")


def other_model(folder: Path) -> Path:
    base = save_tiny("gpt2", folder)
    tiny_config("llama").save_pretrained(base)
    return base


def unknown_quantisation(folder: Path) -> Path:
    return edited(save_tiny("llama", folder), quantization_config={"quant_method": "exl2", "bits": 4})


def bidirectional(folder: Path) -> Path:
    return save_tiny("gemma3_text", folder, use_bidirectional_attention=True)


def both_ways(folder: Path) -> Path:
    return edited(save_tiny("llama", folder), is_causal=False)


UNSUITABLE = {
    stale_depth: "config.json says num_hidden_layers is 6, and the weights hold 4 layers (0 to 3): set "
    "num_hidden_layers to 4",
    headless_embedder: "has no language-model head (lm_head.weight): MistralModel, as config.json names it",
    reward_model: "LlamaForSequenceClassification, a model for sequence classification and its weights hold "
    "score.weight [1, 32]",
    encoder: "this bert model is not causal: changing the last token moves the logits of earlier ones (is_decoder is "
    "False)",
    value_head: "its weights hold v_head.summary.weight [1, 32], a head that is not a language model's",
    foreign_shapes: "makes lm_head.weight [104, 32] and the file holds [96, 32] (2 tensors differ): take the "
    "config.json that belongs to these weights, or set vocab_size to 96",
    hole: "the weights hold nothing of layers 2 of the 6",
    deeper: "num_hidden_layers is 4, and the weights hold layers up to 5, which transformers would leave out in "
    "silence: set num_hidden_layers to 6",
    incomplete: "lacks 1 of its weights, model.layers.3.mlp.up_proj.weight for one",
    other_model: "is named as those of a LlamaForCausalLM are",
    unknown_quantisation: "quantised by 'exl2', which this transformers does not read",
    bidirectional: "this gemma3_text model is not causal",
    both_ways: "this llama model is not causal: changing the last token moves the logits of earlier ones (is_causal is "
    "False)",
}  # fmt: skip


@pytest.mark.parametrize("make", UNSUITABLE, ids=lambda make: make.__name__)
def test_inspect_loading_and_export_refuse_with_the_same_sentence(make, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    said = refused("inspect", folder)
    assert UNSUITABLE[make] in said
    with pytest.raises(LayerpruneError) as loading:
        LoadedModel.load(str(folder), device="cpu")
    assert str(loading.value) == said
    plan = make_plan(save_tiny("llama", tmp_path / "fine"), Removal.of(2))
    model = plan.model.model_copy(update={"parameters": Checkpoint.open(folder).parameters})
    with pytest.raises(LayerpruneError) as exporting:
        export(plan.model_copy(update={"model": model}), tmp_path / "out", base=str(folder))
    assert str(exporting.value) == said
    assert not (tmp_path / "out").exists()


def test_what_it_advises_works(tmp_path: Path) -> None:
    """A stale depth, once it is set as the sentence says, is an ordinary model."""
    assert inspect_model(str(edited(stale_depth(tmp_path / "a"), num_hidden_layers=4))).architecture.depth == 4
    types_of_six = ["full_attention"] * 6
    deep = edited(deeper(tmp_path / "b"), num_hidden_layers=6, layer_types=types_of_six)
    assert inspect_model(str(deep)).architecture.depth == 6
    assert inspect_model(str(edited(foreign_shapes(tmp_path / "c"), vocab_size=96))).removable == 6
    tied = edited(headless_embedder(tmp_path / "d"), tie_word_embeddings=True)
    found = inspect_model(str(tied))
    assert [text for text in found.remarks if "names MistralModel, a base or embedding model" in text]


def test_a_list_of_every_layer_is_to_be_cut_with_the_depth(tmp_path: Path) -> None:
    folder = without(save_tiny("qwen3", tmp_path / "model"), ".layers.5.")
    assert "set num_hidden_layers to 5 and cut layer_types to the layers that are there" in refused("inspect", folder)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gemma3"])
@pytest.mark.parametrize(
    ("depth", "layers", "wanted"),
    [
        (4, 6, "set num_hidden_layers to 6"),
        (8, 6, "set num_hidden_layers to 6"),
        (5, 5, "give layer_types one entry for each"),
        (4, 5, "set num_hidden_layers to 5 and give layer_types one entry for each"),
    ],
)
def test_a_depth_that_its_own_lists_contradict_is_set_by_the_weights(
    kind: str, depth: int, layers: int, wanted: str, tmp_path: Path
) -> None:
    """Its config class refuses such a config before the weights are looked at."""
    whole = without(save_tiny(kind, tmp_path / "model"), *[f"model.layers.{gone}." for gone in range(layers, 6)])
    content = json.loads((whole / "config.json").read_text())
    fields = content.get("text_config", content)
    fields["num_hidden_layers"] = depth
    (whole / "config.json").write_text(json.dumps(content))
    said = refused("inspect", whole)
    assert said.endswith(f"; the weights hold {layers} layers: {wanted}")
    with pytest.raises(ModelError) as loading:
        LoadedModel.load(str(whole), device="cpu")
    assert str(loading.value) == said
    fields.update(num_hidden_layers=layers, layer_types=fields["layer_types"][:layers])
    (whole / "config.json").write_text(json.dumps(content))
    assert inspect_model(str(whole)).architecture.depth == layers


def test_an_encoder_type_that_is_a_decoder_can_be_pruned(tmp_path: Path) -> None:
    """The type is not what is refused: with is_decoder it is causal, though its architecture may be another's name."""
    folder = edited(save_tiny("bert", tmp_path / "model"), architectures=["BertForMaskedLM"])
    assert inspect_model(str(folder)).removable == 6
    assert LoadedModel.load(str(with_tokenizer(folder)), device="cpu").architecture.depth == 6


def with_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<s>").save_pretrained(folder)
    return folder


def test_a_loaded_model_that_sees_ahead_is_refused_though_no_tiny_one_could_be_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Configs that suit no tiny model are tried on the model itself, and inspect says that this is still to come."""
    from layerprune.architecture import architecture

    def unsuitable(*args: object) -> None:
        raise ValueError("no tiny one")

    architecture.TRIED.clear()
    monkeypatch.setattr(architecture, "twin_config", unsuitable)
    folder = with_tokenizer(both_ways(tmp_path / "model"))
    said = done("inspect", folder).stdout
    assert "could not be tried on a tiny model, and is tried when it is loaded (no tiny one)" in said
    with pytest.raises(RefusedError, match="this llama model is not causal"):
        LoadedModel.load(str(folder), device="cpu")
    architecture.TRIED.clear()


def test_trying_leaves_the_random_numbers_of_others_alone() -> None:
    from layerprune.architecture import architecture

    architecture.TRIED.clear()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    read_architecture(tiny_config("llama"))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("model_type", ["llama", "mamba2", "deepseek_v3", "gpt2"])
def test_causal_types_do_not_see_ahead(model_type: str) -> None:
    assert not sees_ahead(tiny_model(model_type))


@pytest.mark.parametrize(("model_type", "flags"), [("bert", {"is_decoder": False}), ("xlnet", {}), ("cpmant", {})])
def test_types_that_read_both_ways_see_ahead(model_type: str, flags: dict[str, object]) -> None:
    assert sees_ahead(tiny_model(model_type, **flags))


def test_a_twin_of_long_rope_can_be_tried() -> None:
    """Its factors are one per frequency of a head, which a tiny head has fewer of."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_theta": 10000.0}  # fmt: skip
    from transformers import Phi3Config

    config = Phi3Config(num_hidden_layers=2, pad_token_id=0, rope_parameters=rope)
    assert read_architecture(config).untried == ""


def shapes(model_type: str, **changes: object) -> tuple[dict[str, tuple[int, ...]], object, Architecture]:
    config = tiny_config(model_type, **changes)
    found = {name: tuple(value.shape) for name, value in tiny_model(model_type, **changes).state_dict().items()}
    return found, config, read_architecture(config)


def test_a_multi_token_prediction_head_is_no_layer_too_many() -> None:
    disk, config, architecture = shapes("deepseek_v3", num_nextn_predict_layers=1)
    head = {"model.layers.6.eh_proj.weight": (32, 64), "model.layers.6.mlp.gate_proj.weight": (48, 32)}
    check_weights("it", {**disk, **head}, config, architecture)
    layer = {"model.layers.6.mlp.gate_proj.weight": (48, 32), "model.layers.7.mlp.gate_proj.weight": (48, 32)}
    with pytest.raises(RefusedError, match="hold layers up to 7"):
        check_weights("it", {**disk, **layer}, config, architecture)


def test_packed_weights_stand_for_those_they_replace() -> None:
    disk, config, architecture = shapes("llama")
    packed = {name.replace(".weight", ".qweight"): (4, side[0]) for name, side in disk.items() if "_proj" in name}
    plain = {name: side for name, side in disk.items() if "_proj" not in name}
    config.quantization_config = {"quant_method": "gptq", "bits": 4}  # type: ignore[attr-defined]
    check_weights("it", {**plain, **packed}, config, architecture)
    less = {name: side for name, side in packed.items() if ".layers.5." not in name}
    kept = {name: side for name, side in plain.items() if ".layers.5." not in name}
    with pytest.raises(RefusedError, match=r"the weights hold 5 layers \(0 to 4\)"):
        check_weights("it", {**kept, **less}, config, architecture)


def test_a_head_of_any_name_with_a_few_outputs_is_no_language_model() -> None:
    disk, config, architecture = shapes("llama")
    with pytest.raises(RefusedError, match=r"its weights hold quality\.out\.weight \[3, 32\]"):
        check_weights("it", {**disk, "quality.out.weight": (3, 32)}, config, architecture)
    said = check_weights("it", {**disk, "vision.patch.weight": (32, 48)}, config, architecture)
    (remark,) = said
    assert remark.startswith("a LlamaForCausalLM does not read 1 of its tensors, vision.patch.weight for one")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter, not a model; merge it into its base"),
        (["config.json", "adapter_config.json", "adapter_model.safetensors"], "holds an adapter, not a model; merge"),
        (["config.json", "pytorch_model.bin"], "only pytorch_model.bin; pickles are never read, convert it first"),
        (["config.json", "tf_model.h5"], "only TensorFlow's tf_model.h5; load it with transformers and save it"),
        (["config.json", "flax_model.msgpack"], "only Flax's flax_model.msgpack"),
        (["model-Q4_K_M.gguf"], "only model-Q4_K_M.gguf; take the model that it was made from"),
        (["config.json", "model-Q4_K_M.gguf"], "only model-Q4_K_M.gguf; take the model that it was made from"),
        (["model_index.json", "unet/config.json"], "is a diffusers pipeline (model_index.json)"),
        (["modules.json", "0_Transformer/config.json", "1_Pooling/config.json"], "alone is in 0_Transformer"),
        (["config.json", "model-00001-of-00002.safetensors"], "holds model-00001-of-00002.safetensors and no model."),
        (["params.json", "consolidated.safetensors"], "vendor's own format (consolidated.safetensors)"),
        (["notes.txt"], "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)  # fmt: skip
def test_folders_of_another_kind_say_what_they_are(files: list[str], says: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    if "config.json" in files:
        tiny_config("llama").save_pretrained(folder)
    assert says in refused("inspect", folder)
    with pytest.raises(ModelError) as error:
        LoadedModel.load(str(folder))
    assert str(error.value) == refused("inspect", folder)


def test_an_adapter_beside_whole_weights_is_refused(tmp_path: Path) -> None:
    """transformers would load the adapter's base and the adapter, and export copy the weights that lie there."""
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    assert "adapter_config.json beside whole weights" in refused("inspect", folder)


def test_weight_files_that_no_index_names_are_said(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "model")
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "remark: no index names consolidated.safetensors" in done("inspect", folder).stdout


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("llava", "'llava' is a vision-language model (LlavaForConditionalGeneration)"),
        ("qwen2_vl", "'qwen2_vl' is a vision-language model"),
        ("mistral3", "'mistral3' is a vision-language model"),
        ("t5", "'t5' is an encoder-decoder (T5ForConditionalGeneration)"),
        ("wav2vec2", "'wav2vec2' is a speech model"),
        ("distilbert", "'distilbert' is an encoder"),
        ("vit", "'vit' is a vision model"),
    ],
)
def test_types_without_a_causal_lm_get_one_plain_line(model_type: str, says: str, tmp_path: Path) -> None:
    from transformers import CONFIG_MAPPING

    assert model_type not in types()
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path / "model")
    rewritten(tmp_path / "model", {"w": torch.ones(1)})
    said = refused("inspect", tmp_path / "model")
    assert says in said
    assert "layers are removed from causal language models only" in said
    assert load_config(str(tmp_path / "model")).model_type == model_type
