"""Every causal-LM type of transformers: exact, exact with a constraint, or refused; never silently wrong."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

import zoo
from checkout import ROOT
from families import types
from layerprune.architecture import read_architecture
from layerprune.architecture.tiny import tiny_config
from layerprune.errors import RefusedError
from layerprune.removal import Removal
from zoo import AS_DECODER, WORDS, Verdict, encodes, judge, main, render

PAGE = ROOT / "docs" / "ZOO.md"

# Types that need something of their own; tried at every change. The others run in the slow tier.
PARTICULAR = (
    "bart", "gemma3n_text", "gemma4", "gpt_neo", "hy_v4", "jamba", "minicpm3", "mllama", "nemotron_h",
    "recurrent_gemma", "rwkv", "zamba2", "zaya",
)  # fmt: skip


def recorded() -> dict[str, str]:
    """Return type and verdict of each row of the page."""
    return dict(re.findall(r"^\| `([\w.-]+)` \| ([^|]+) \|", PAGE.read_text(), re.M))


@pytest.mark.parametrize("model_type", PARTICULAR)
def test_particular_types(model_type: str, tmp_path: Path) -> None:
    verdict = judge(model_type, tmp_path)
    assert verdict.kind in ("exact", "constrained"), verdict.reason
    assert verdict.exported
    assert WORDS[verdict.kind] == recorded()[model_type]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", types())
def test_every_type(model_type: str, tmp_path: Path) -> None:
    verdict = judge(model_type, tmp_path)
    assert verdict.kind != "wrong", verdict.reason
    assert WORDS[verdict.kind] == recorded()[model_type], f"{verdict.reason}; renew docs/ZOO.md"


def test_page_has_every_type_and_enough_exact_ones() -> None:
    rows = recorded()
    assert rows.keys() == set(types())
    counts = Counter(rows.values())
    assert counts[WORDS["exact"]] + counts[WORDS["constrained"]] >= 175
    assert counts[WORDS["wrong"]] == 0


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("blt", "three transformers"),
        ("hrm_text", "two stacks"),
        ("inkling2_text", "n_layers_per_attn_res_block"),
        ("reformer", "reversible"),
        ("xlm", "parallel lists"),
        ("xlnet", "not causal: .*attn_type is 'bi'"),
        ("cpmant", "not causal"),
    ],
)
def test_refused_types_say_why(model_type: str, says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        read_architecture(tiny_config(model_type))


@pytest.mark.parametrize(
    ("model_type", "units", "says"),
    [
        ("jamba", (3,), "layers [0, 1, 2, 3] of a jamba model go together"),
        ("zamba2", (2,), "layer 2 of a zamba2 model has to stay"),
        ("gemma3n_text", (1,), "num_kv_shared_layers=3"),
        ("gemma4_text", (5,), "the last layer full attention"),
        ("diffllama", (2,), "only the last layers of a diffllama model can be removed"),
        ("olmo_hybrid", (3,), "one of layers [3] of a olmo_hybrid model has to stay"),
        ("rwkv", (0,), "layer 0 alone has pre_ln"),
        ("llama", range(6), "removing all 6 layers leaves no model"),
    ],
)
def test_constraints_are_known_from_the_config(model_type: str, units: tuple[int, ...], says: str) -> None:
    with pytest.raises(RefusedError, match=re.escape(says)):
        read_architecture(tiny_config(model_type)).check(Removal.of(*units))


def test_inverse_layer_scaling_lets_only_the_last_layers_go() -> None:
    architecture = read_architecture(tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True))
    architecture.check(Removal.of(4, 5))
    with pytest.raises(RefusedError, match="scale_attn_by_inverse_layer_idx"):
        architecture.check(Removal.of(4))


def test_an_encoder_type_is_exact_as_a_decoder_and_says_so(tmp_path: Path) -> None:
    verdict = judge("bert", tmp_path)
    assert (verdict.kind, verdict.reason, verdict.encoder) == ("exact", AS_DECODER, True)
    assert not encodes("llama")


def test_table_counts_what_it_shows() -> None:
    rows = [
        Verdict("b", "exact", "", (), 1e-6), Verdict("d", "constrained", "w | v", (), 0),
        Verdict("a", "refused", "x | y"), Verdict("c", "unavailable", "z"),
        Verdict("e", "exact", AS_DECODER, (), 0, encoder=True),
    ]  # fmt: skip
    page = render(rows)
    assert "Of 4 types that can be built, 3 are exact (1 with a constraint), 1 are refused, 0 are wrong. 1 of" in page
    assert "1 of them are exact as decoders (is_decoder true) and refused as the encoders they are published as" in page
    assert "| `a` | refused | x / y |  |\n| `b` | exact |  | 1e-06 |\n" in page
    assert "| `c` | cannot be built here | z |  |\n" in page
    assert "| `d` | exact, with a constraint | w / v | 0 |\n" in page


def test_the_page_of_the_types_asked_for_is_printed() -> None:
    result = CliRunner().invoke(main, ["--types", "llama,diffllama,hrm_text"])
    assert result.exit_code == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| `")]
    assert [row.split("|")[1].strip() for row in rows] == ["`diffllama`", "`hrm_text`", "`llama`"]
    assert [row.split("|")[2].strip() for row in rows] == ["exact, with a constraint", "refused", "exact"]
    assert "trying model types: 3/3 types" in result.stderr


def test_a_type_that_comes_out_wrong_ends_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "judge", lambda name, folder: Verdict(name, "wrong", "another model"))
    result = CliRunner().invoke(main, ["--types", "llama"])
    assert result.exit_code == 1
    assert "| `llama` | WRONG | another model |" in result.stdout


def test_an_unknown_type_is_refused_before_any_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "judge", lambda name, folder: pytest.fail(f"{name} was tried"))
    result = CliRunner().invoke(main, ["--types", "gpt2,lama"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "layerprune: transformers has no causal-LM type 'lama'. Did you mean 'llama'?\n"
