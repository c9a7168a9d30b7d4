"""A removal in other tools' forms and back: what is written, what is read, and what is refused in one line."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from cli_tiny import done, last_line, refused
from families import make_plan, save_tiny
from layerprune.architecture import load_config, read_architecture
from layerprune.artifacts import Plan, Receipt
from layerprune.checkpoint import Checkpoint
from layerprune.checkpoint.location import Folder
from layerprune.errors import DocumentError, RefusedError, UsageError
from layerprune.exporter import export, interchange, translated
from layerprune.removal import Removal, parse_layers

DEPTH = 6  # of the tiny models
REMOVALS = [(0,), (5,), (2, 3), (0, 5), (1, 3, 5), (0, 1, 2, 3, 4), (1, 2, 4)]
PLAIN = ("llama", "gpt_neox", "gpt2")  # nothing in their configs is said of single layers
# as mergekit's README writes a passthrough merge, with the layers of one model only
WRITTEN = """\
slices:
- sources:
  - model: org/base
    layer_range: [0, 2]
- sources:
  - layer_range:
    - 3
    - 4
    model: org/base
- sources:
  - model: "org/base"
    layer_range: [4, 6]
merge_method: passthrough
dtype: float32
"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models by type, each made when a test first asks for it."""

    class Bases(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = save_tiny(name, tmp_path_factory.mktemp(name) / "base")
            return self[name]

    return Bases()


def as_form(base: Path, layers: tuple[int, ...], form: str) -> str:
    return translated(make_plan(base, Removal.of(*layers)), form)


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("layers", REMOVALS, ids=str)
def test_a_removal_goes_to_mergekit_and_back(
    bases: dict[str, Path], family: str, layers: tuple[int, ...], tmp_path: Path
) -> None:
    file = tmp_path / "passthrough.yaml"
    file.write_text(as_form(bases[family], layers, "mergekit"))
    slices = yaml.safe_load(file.read_text())["slices"]
    ranges = [one["sources"][0]["layer_range"] for one in slices]
    kept = [layer for start, end in ranges for layer in range(start, end)]
    assert kept == [layer for layer in range(DEPTH) if layer not in layers]
    assert all(end < start for (_, end), (start, _) in pairwise(ranges))  # runs as long as can be
    assert interchange.read_mergekit(file).removal(DEPTH).layers == layers


@pytest.mark.parametrize("family", PLAIN)
@pytest.mark.parametrize("layers", REMOVALS, ids=str)
def test_a_removal_goes_to_lists_and_back(bases: dict[str, Path], family: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(as_form(bases[family], layers, "list"), DEPTH) == set(layers)
    option, _, listed = as_form(bases[family], layers, "llama-quantize").partition(" ")
    assert option == "--prune-layers"
    assert [int(layer) for layer in listed.split(",")] == list(layers)
    option, *numbers = as_form(bases[family], layers, "minitron").split(" ")
    assert option == "--drop_layers"
    assert [int(number) - 1 for number in numbers] == list(layers)  # theirs count from 1


def test_what_mergekit_is_told_of_the_model(bases: dict[str, Path], tmp_path: Path) -> None:
    said = yaml.safe_load(as_form(bases["llama"], (1,), "mergekit"))
    assert {one["sources"][0]["model"] for one in said["slices"]} == {str(bases["llama"])}
    assert said["merge_method"] == "passthrough"
    assert said["dtype"] == "float32"
    checkpoint = Checkpoint.open(bases["llama"])
    on_hub = interchange.write_mergekit(Removal.of(1), DEPTH, Folder(bases["llama"], "org/it", "abc"), checkpoint)
    assert yaml.safe_load(on_hub)["slices"][0]["sources"][0]["model"] == "org/it@abc"
    odd = tmp_path / "a+b@c: d"  # mergekit would read a LoRA and a revision
    file = tmp_path / "odd.yaml"
    file.write_text(interchange.write_mergekit(Removal.of(1), DEPTH, Folder(odd, odd.name, None), checkpoint))
    assert yaml.safe_load(file.read_text())["slices"][0]["sources"][0]["model"] == {"model": {"path": str(odd)}}
    assert interchange.read_mergekit(file).model == str(odd)


def test_weights_of_two_dtypes_are_not_cast(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    base = save_tiny("llama", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.bfloat16)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert "dtype" not in yaml.safe_load(as_form(base, (1,), "mergekit"))


# What another tool would get wrong.


@pytest.mark.parametrize(
    ("family", "layers", "form", "said"),
    [
        ("smollm3", (1,), "mergekit", "no_rope_layers of this smollm3 model would be another"),
        ("mixtral", (1,), "mergekit", "leave out the experts' weights of such models as this mixtral one"),
        ("deepseek_v3", (4,), "mergekit", "leave out the experts' weights of such models as this deepseek_v3 one"),
        ("deepseek_v3", (0,), "minitron", "first_k_dense_replace of this deepseek_v3 model would be another"),
        ("gemma3_text", (1,), "mergekit", "layer_types of this gemma3_text model would be another"),
        ("smollm3", (1,), "minitron", "no_rope_layers of this smollm3 model would be another"),
        ("smollm3", (1,), "llama-quantize", "no_rope_layers of this smollm3 model would be another"),
        ("gemma2", (1,), "llama-quantize", "layer_types of this gemma2 model would be another"),
        ("gemma2", (1,), "minitron", "layer_types of this gemma2 model would be another"),
        ("gemma3n_text", (0,), "llama-quantize", "hold a slice for each layer, which llama-quantize does not cut"),
        ("minicpm3", (1,), "mergekit", "scale_depth of this minicpm3 model would be another"),
    ],
)
def test_what_a_tool_would_get_wrong_is_refused(
    bases: dict[str, Path], family: str, layers: tuple[int, ...], form: str, said: str
) -> None:
    with pytest.raises(RefusedError) as error:
        as_form(bases[family], layers, form)
    assert said in str(error.value)
    assert f"--as {form}: " in str(error.value)
    assert "\n" not in str(error.value)
    assert as_form(bases[family], layers, "list") == str(layers[0])  # which says nothing of a tool


def test_what_the_first_entries_say_of_the_layers_that_are_left_is_not_refused(bases: dict[str, Path]) -> None:
    """A whole period of Gemma 2, a sliding and a full layer: readers go by the same period after it."""
    architecture = read_architecture(load_config(str(bases["gemma2"])))
    assert architecture.left_behind(Removal.of(2, 3)) == {"layer_types": True}
    assert architecture.left_behind(Removal.of(2)) == {"layer_types": False}
    assert as_form(bases["gemma2"], (2, 3), "llama-quantize") == "--prune-layers 2,3"
    assert as_form(bases["gemma2"], (2, 3), "minitron") == "--drop_layers 3 4"


def test_a_list_that_keeps_its_length_is_told_of(bases: dict[str, Path]) -> None:
    result = done("export", bases["qwen3"], "--remove", "1,2", "--as", "mergekit")
    assert "warning: mergekit sets the depth in the config, and changes no other field: layer_types" in result.stderr
    assert "the first 4 entries hold" in result.stderr
    assert yaml.safe_load(result.stdout)["merge_method"] == "passthrough"  # nothing else is printed
    assert "warning" not in done("export", bases["qwen3"], "--remove", "1,2", "--as", "llama-quantize").stderr


def test_the_base_has_to_be_the_plans(bases: dict[str, Path], tmp_path: Path) -> None:
    plan = make_plan(bases["llama"], Removal.of(1))
    other = save_tiny("llama", tmp_path / "other", seed=1)
    with pytest.raises(DocumentError, match="the plan is for base with weights"):
        translated(plan, "mergekit", base=str(other))


# The command line: from a plan.json or named layers, printed and nowhere written.


def test_a_plan_is_printed_for_other_tools(bases: dict[str, Path], tmp_path: Path) -> None:
    make_plan(bases["llama"], Removal.of(1, 4)).save(tmp_path / "plan.json")
    before = sorted(tmp_path.rglob("*"))
    assert done("export", tmp_path, "--as", "llama-quantize").stdout == "--prune-layers 1,4\n"
    assert done("export", tmp_path / "plan.json", "--as", "list").stdout == "1,4\n"
    assert done("export", tmp_path, "--as", "minitron", "--base", bases["llama"]).stdout == "--drop_layers 2 5\n"
    assert sorted(tmp_path.rglob("*")) == before
    out = tmp_path / "out"
    assert "prints the removal and writes nothing: -o" in refused("export", tmp_path, "--as", "list", "-o", out)
    unused = refused("export", tmp_path, "--as", "list", "--max-shard-size", "1GB")
    assert "writes nothing: --max-shard-size" in unused
    assert "say where the smaller model goes with -o DIR" in refused("export", tmp_path)
    assert "'gguf' is not one of mergekit, minitron" in refused("export", tmp_path, "--as", "gguf")
    assert sorted(tmp_path.rglob("*")) == before


# Reading theirs.


def test_a_handwritten_file_says_what_goes(tmp_path: Path) -> None:
    (tmp_path / "it.yml").write_text(WRITTEN)
    found = interchange.read_mergekit(tmp_path / "it.yml")
    assert (found.model, found.revision, found.dtype) == ("org/base", None, "float32")
    assert found.kept == (0, 1, 3, 4, 5)
    assert found.removal(6).layers == (2,)
    assert found.removal(8).layers == (2, 6, 7)
    with pytest.raises(UsageError, match="layer_range goes to 6, and the model has 5 layers"):
        found.removal(5)


@pytest.mark.parametrize(
    "name",
    [
        "org/base@v1",
        {"path": "org/base", "revision": "v1"},
        {"model": {"path": "org/base", "revision": "v1"}},
        {"model": "org/base@v1"},
    ],
)
def test_models_are_named_as_mergekit_reads_them(name: object, tmp_path: Path) -> None:
    content = {"slices": [{"sources": [{"model": name, "layer_range": [0, 2]}]}], "merge_method": "passthrough"}
    (tmp_path / "it.yaml").write_text(yaml.safe_dump(content))
    found = interchange.read_mergekit(tmp_path / "it.yaml")
    assert (found.model, found.revision) == ("org/base", "v1")
    assert found.revision_of("org/base", None) == "v1"
    assert found.revision_of("org/other", None) is None
    assert found.revision_of("org/base", "v1") == "v1"
    with pytest.raises(UsageError, match=r"--revision v2: .* is of org/base@v1"):
        found.revision_of("org/base", "v2")


def slices(*ranges: object, model: object = "org/base", **more: object) -> str:
    sources = [{"sources": [{"model": model, "layer_range": one}]} for one in ranges]
    return yaml.safe_dump({"slices": sources, "merge_method": "passthrough", **more})


OURS, TWO = {"model": "org/base", "layer_range": [0, 2]}, {"model": "a/b", "layer_range": [3, 5]}
REFUSED = {
    "another method": (slices([0, 2]).replace("passthrough", "slerp"), "merge_method is 'slerp'"),
    "no method": ("slices: []", "merge_method is None"),
    "repeated": (slices([0, 4], [2, 6]), "slices has layer 2 twice"),
    "repeated later": (slices([0, 4], [4, 6], [0, 4]), "slices has layer 0 twice"),
    "reordered": (slices([3, 6], [0, 2]), "slices has layer 0 behind 5"),
    "several models": (
        yaml.safe_dump({"slices": [{"sources": [OURS]}, {"sources": [TWO]}], "merge_method": "passthrough"}),
        "it joins 2 models: org/base, a/b",
    ),
    "two sources": (
        yaml.safe_dump({"slices": [{"sources": [TWO, TWO]}], "merge_method": "passthrough"}),
        "slices[0] has 2 sources",
    ),
    "scale": (
        yaml.safe_dump({"slices": [{"sources": [TWO | {"parameters": {"scale": 0}}]}], "merge_method": "passthrough"}),
        "slices[0] has parameters",
    ),
    "residual weight": (
        yaml.safe_dump({"slices": [{"sources": [TWO], "residual_weight": 0.5}], "merge_method": "passthrough"}),
        "slices[0] has residual_weight",
    ),
    "parameters of all": (slices([0, 2], parameters={"scale": 2}), "parameters is given"),
    "another base": (slices([0, 2], base_model="a/b"), "it joins 2 models"),
    "another revision": (slices([0, 2], base_model="org/base@v2"), "it joins 2 models"),
    "models": ("models: [{model: a/b}]\nmerge_method: passthrough", "models is given"),
    "another tokenizer": (slices([0, 2], tokenizer_source="a/b"), "tokenizer_source is 'a/b'"),
    "LoRA": (slices([0, 2], model="org/base+lora"), "model is 'org/base+lora'"),
    "no model": (slices([0, 2], model=None), "model is None"),
    "empty range": (slices([2, 2]), "layer_range of slices[0] is [2, 2]"),
    "negative": (slices([-2, 2]), "layer_range of slices[0] is [-2, 2]"),
    "no numbers": (slices(["0", 2]), "layer_range of slices[0] is ['0', 2]"),
    "yes": (slices([False, 2]), "layer_range of slices[0] is [False, 2]"),
    "endless": (slices([0, 10**12]), "layer_range of slices[0] is [0, 1000000000000]"),
    "no list": ("slices: 3\nmerge_method: passthrough", "slices is not a list"),
    "no slices": ("merge_method: passthrough", "slices is not a list"),
    "a list": ("- 3", "it is not a mapping"),
    "a key twice": (slices([0, 2]) + "merge_method: passthrough\n", "the key 'merge_method' occurs twice"),
    "no YAML": ("slices: [", "is no YAML that can be read"),
    "no dtype": (slices([0, 2], dtype=16), "dtype is 16"),
    "beyond the model": (slices([0, 2], [3, 9]), "layer_range goes to 9, and the model has 6 layers"),
    "nothing goes": (slices([0, 3], [3, 6]), "all 6 layers of the model are kept: nothing goes"),
}


@pytest.mark.parametrize(("content", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_removal_is_refused(bases: dict[str, Path], content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text(content)
    line = last_line("export", bases["llama"], "--remove", tmp_path / "it.yaml", "-o", tmp_path / "out")
    assert said in line
    assert line.startswith(f"--remove {tmp_path / 'it.yaml'}")
    assert [path.name for path in tmp_path.iterdir()] == ["it.yaml"]


def test_a_file_that_is_not_there_is_told_of(bases: dict[str, Path], tmp_path: Path) -> None:
    said = refused("export", bases["llama"], "--remove", tmp_path / "it.yaml", "-o", tmp_path / "out")
    assert "it.yaml cannot be read: No such file or directory" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", PLAIN)
def test_layers_given_by_a_file_a_list_and_a_plan_leave_the_same_weights(
    bases: dict[str, Path], family: str, tmp_path: Path
) -> None:
    base, layers = bases[family], (1, 2, 4)
    (tmp_path / "it.yaml").write_text(as_form(base, layers, "mergekit"))
    done("export", base, "--remove", tmp_path / "it.yaml", "-o", tmp_path / "file")
    done("export", base, "--remove", "1-2,4", "-o", tmp_path / "list")
    export(make_plan(base, Removal.of(*layers)), tmp_path / "plan")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("file", "list", "plan")]
    assert weights[0] == weights[1] == weights[2]
    assert len(weights[0]) < (base / "model.safetensors").stat().st_size
    given, planned = (Receipt.load(tmp_path / name / "layerprune" / "receipt.json") for name in ("file", "plan"))
    assert "the layers were given (--remove 1,2,4): nothing was measured" in given.notes
    assert not any("nothing was measured" in note for note in planned.notes)
    plan = Plan.load(tmp_path / "file" / "layerprune" / "plan.json")
    assert (plan.metric, plan.data, plan.removal, plan.seen) == (None, (), layers, frozenset())
    assert str(tmp_path) not in plan.model_dump_json()  # documents hold no path


def test_what_of_the_file_is_not_followed_is_told(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "it.yaml").write_text(WRITTEN.replace("float32", "bfloat16"))
    result = done("export", bases["llama"], "--remove", tmp_path / "it.yaml", "--as", "list")
    assert result.stdout == "2\n"
    assert f"names the model org/base: what it leaves out is removed from {bases['llama']}" in result.stderr
    assert "dtype bfloat16 is not applied" in result.stderr
    copy = shutil.copytree(bases["llama"], tmp_path / "copy")
    (tmp_path / "own.yaml").write_text(as_form(copy, (2,), "mergekit"))
    quiet = done("export", copy, "--remove", tmp_path / "own.yaml", "--as", "list")
    assert quiet.stdout == "2\n"
    assert "names the model" not in quiet.stderr
    assert "dtype" not in quiet.stderr


def test_a_removal_that_the_model_does_not_bear_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="layer 2 of a gemma3n_text model has to stay"):
        as_form(bases["gemma3n_text"], (2,), "mergekit")
