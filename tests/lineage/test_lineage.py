"""The sentences about matches that are given: no file is read here."""

import math

import pytest

from layerprune.lineage import LayerMatch, Lineage, OutsideMatch
from layerprune.lineage.lineage import few, in_words, listing, percentage, spans


def lineage(matches, depth=8, outside=(), **more):
    given = {
        "base": "base", "model_type": "llama", "base_type": "llama", "tied": False, "base_tied": False,
        "tokenizer": (),
    }  # fmt: skip
    return Lineage(base_layers=tuple(range(depth)), layers=tuple(matches), outside=tuple(outside), **given | more)


def order(*bases):
    return [LayerMatch(at, base, "equal") for at, base in enumerate(bases)]


@pytest.mark.parametrize(
    ("bases", "said"),
    [
        ((0, 1, 2, 3, 4, 5, 6, 7), ()),
        ((0, 1, 2, 7), ("layers 3-6 of the base are gone",)),
        ((1, 2, 3, 4, 5, 6, 7), ("layer 0 of the base is gone",)),
        ((0, 6, 2, 3, 4, 5, 1, 7), ("layers 1 and 6 have changed places",)),
        ((1, 0, 2, 4, 3, 5, 6, 7), ("layers 0 and 1 have changed places", "layers 3 and 4 have changed places")),
        ((0, 2, 3, 1, 4, 5, 6, 7), ("layers 1-3 stand in another order: 2, 3, 1",)),
        ((0, 7, 3, 4, 5, 1), ("layers 2 and 6 of the base are gone", "layers 1 and 7 have changed places")),
        ((0, 1, 1, 2, 3, 4, 5, 6, 7), ("layers 1 and 2 of this checkpoint are both the base's layer 1",)),
        ((0, 1, 1, 1, 4, 5, 6, 7),
         ("layers 2 and 3 of the base are gone", "layers 1, 2 and 3 of this checkpoint are all the base's layer 1")),
        ((0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7),
         ("layers 2-5 and 6-9 of this checkpoint are both the base's layers 2-5",)),
    ],
)  # fmt: skip
def test_where_layers_went(bases, said):
    found = lineage(order(*bases)).sentences
    assert found[:-1] == said
    assert found[-1].endswith("is the base's, untouched")


RANDOM = "random?"


@pytest.mark.parametrize(
    ("bases", "said"),
    [
        ((0, 1, None, 3, 4, 5, 6, 7), ["layer 2 matches no layer of the base (random?)"]),
        ((None, None, 2, 3, 4, 5, 6, None), ["layers 0, 1 and 7 match no layer of the base (random?)"]),
        ((0, 1, 4, 5, None, 7),
         ["layers 2 and 3 of the base are gone",
          "layer 4 of this checkpoint, in the place of the base's layer 6, matches no layer of the base (random?)"]),
        ((0, 1, 2, None, 3, 4, 5, 6, 7), ["layer 3 of this checkpoint matches no layer of the base (random?)"]),
        ((0, None, 7),
         ["layers 1-6 of the base are gone", "layer 1 of this checkpoint matches no layer of the base (random?)"]),
        ((None,) * 8, ["no layer is one of the base's (another model?)"]),
        ((0, 5, None, 3, 4, 1, 6, 7),
         ["layer 2 of the base is gone", "layers 1 and 5 have changed places",
          "layer 2 of this checkpoint matches no layer of the base (random?)"]),
    ],
)  # fmt: skip
def test_layers_that_are_not_the_base_s(bases, said):
    matches = [
        LayerMatch(at, base, "unmatched" if base is None else "equal", note=RANDOM if base is None else "")
        for at, base in enumerate(bases)
    ]
    found = [text for text in lineage(matches).sentences if "untouched" not in text]
    assert found == said


def test_a_stack_that_is_turned_round_is_told_as_a_whole():
    found = lineage(order(*range(11, -1, -1)), depth=12).sentences
    assert found[0] == "the layers of the base stand in another order: 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0"


def test_changes_of_about_one_size_are_told_together():
    changed = {2: 0.002, 3: 0.0021, 4: 0.0039, 6: 0.3}
    matches = [LayerMatch(at, at, "changed" if at in changed else "equal", changed.get(at, 0.0)) for at in range(8)]
    assert lineage(matches).sentences == (
        "layers 2-4 were changed by 0.2 to 0.39 %", "layer 6 was changed by 30 %", "layers 0, 1, 5 and 7 are untouched",
    )  # fmt: skip


def test_what_is_no_number_is_no_figure():
    matches = [LayerMatch(0, 0, "changed", math.nan), LayerMatch(1, 1, "changed", math.inf)]
    assert lineage(matches, depth=2).sentences == (
        "layer 0 was changed in a way that is no number (packed weights, NaN or infinity)",
        "layer 1 was changed where the base is zero",
    )


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (OutsideMatch("lm_head.weight", "head", "changed", 0.031), "the head differs by 3.1 %"),
        (OutsideMatch("embed.weight", "embeddings", "changed", 0.002), "the embeddings differ by 0.2 %"),
        (OutsideMatch("embed.weight", "embeddings", "missing"), "the embeddings of the base are gone"),
        (OutsideMatch("embed.weight", "embeddings", "packed"), "the embeddings cannot be compared: quantised"),
        (
            OutsideMatch("embed.weight", "embeddings", "reshaped", 0.1, (12, 4), (10, 4)),
            "the embeddings are resized to 12 tokens, the base's have 10; the rows that both have differ by 10 %",
        ),
        (
            OutsideMatch("lm_head.weight", "head", "reshaped", 0.0, (12, 8), (10, 4)),
            "the head has another shape: [12, 8], the base's [10, 4]",
        ),
        (
            OutsideMatch("lm_head.weight", "head", "rounded", 0.002, note="BF16 F32"),
            "the head is stored in bfloat16 (the base in float32), equal after rounding",
        ),
        (OutsideMatch("norm.weight", "", "changed", 0.001), "norm.weight (0.1 %) outside the layers differs"),
        (OutsideMatch("norm.weight", "", "missing"), "norm.weight outside the layers of the base is gone"),
        (OutsideMatch("norm.bias", "", "added"), "norm.bias outside the layers is not the base's"),
    ],
)
def test_what_is_outside_the_layers(part, said):
    assert lineage(order(*range(8)), outside=[part]).sentences[1:] == (said,)


def test_numbers_in_words():
    assert spans([0, 1, 2, 5, 6, 9]) == "0-2, 5, 6, 9"
    assert (in_words([3]), in_words([4, 22]), in_words([1, 3, 4, 5, 12])) == (
        "layer 3", "layers 4 and 22", "layers 1, 3-5 and 12",
    )  # fmt: skip
    assert listing(["a", "b", "c"]) == "a, b and c"
    assert few(["a", "b", "c", "d", "e", "f"]) == "a, b, c, d and 2 more"
    assert [percentage(x) for x in (0.0, 1e-7, 0.0023, 0.10, 1.4142)] == [
        "0 %", "less than 0.001 %", "0.23 %", "10 %", "141 %",
    ]  # fmt: skip
