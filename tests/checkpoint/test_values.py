"""Values of tensors on disk against torch's: decoded, rounded and compared."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from layerprune.checkpoint import read_header
from layerprune.checkpoint.values import (
    CHUNK,
    NAMES,
    decode,
    difference,
    distance,
    first_rows,
    relative,
    round_to,
    sample,
    squares,
)

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.fixture
def stored(tmp_path):
    """Return a function that writes tensors to a file and returns them as they are on disk, by name."""

    def store(**tensors):
        file = tmp_path / f"{len([*tmp_path.iterdir()])}.safetensors"
        save_file(tensors, file)
        return {tensor.name: tensor for tensor in read_header(file).tensors}

    return store


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", NAMES)
def test_values_are_those_torch_reads(dtype):
    values = torch.cat([numbers(1000), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 65504.0])])
    values = values.to(DTYPES[dtype])
    raw = values.view(torch.uint8).numpy().tobytes()
    np.testing.assert_array_equal(decode(raw, dtype), values.to(torch.float64).numpy())


@pytest.mark.parametrize("dtype", NAMES)
def test_values_are_rounded_as_torch_rounds(dtype):
    edge = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 3.39e38, -3.4e38, 1e-40, math.inf, math.nan])
    values = torch.cat([numbers(5000).float() * 100, edge.float()])
    expected = values.to(DTYPES[dtype]).to(torch.float64).numpy()
    np.testing.assert_array_equal(round_to(values.numpy(), dtype).astype("f8"), expected)


@pytest.mark.parametrize("elements", [1, 7, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("dtypes", [("F32", "F32"), ("BF16", "F32"), ("F64", "F16"), ("BF16", "F16")])
def test_the_change_is_the_one_torch_computes(stored, elements, dtypes):
    base = numbers(elements).to(DTYPES[dtypes[1]])
    other = (base.double() + 0.1 * numbers(elements, seed=1)).to(DTYPES[dtypes[0]])
    found = stored(base=base)["base"], stored(other=other)["other"]
    one = difference(found[1], found[0])
    expected = (other.double() - base.double()).norm() / base.double().norm()
    assert one.kind == "changed"
    assert one.change == pytest.approx(float(expected), rel=1e-6)
    assert squares(found[0]) == pytest.approx(float(base.double().square().sum()), rel=1e-6)


def test_kinds_of_differences(stored):
    values = numbers(40, 20).float()
    there = stored(
        base=values, same=values.clone(), half=values.half(), bf=values.bfloat16(), wide=values.double(),
        wider=torch.cat([values, values]), packed=torch.zeros(40, 10, dtype=torch.uint8),
        packed_too=torch.zeros(40, 10, dtype=torch.uint8), other=torch.ones(40, 10, dtype=torch.uint8),
        float8=values.to(torch.float8_e4m3fn), zero=torch.zeros(40, 20), nan=values * math.nan,
    )  # fmt: skip
    base = there["base"]
    assert {name: difference(tensor, base).kind for name, tensor in there.items()} == {
        "base": "equal", "same": "equal", "half": "rounded", "bf": "rounded", "wide": "rounded", "wider": "reshaped",
        "packed": "packed", "packed_too": "packed", "other": "packed", "float8": "packed", "zero": "changed",
        "nan": "changed",
    }  # fmt: skip
    assert difference(there["packed"], there["packed_too"]).kind == "equal"
    assert difference(there["packed"], there["other"]).kind == "changed"
    assert math.isnan(difference(there["packed"], there["other"]).change)
    assert difference(base, there["half"]).kind == "rounded"
    assert difference(there["zero"], base).change == pytest.approx(1)
    assert math.isinf(difference(base, there["zero"]).change)
    assert math.isnan(difference(there["nan"], base).change)
    assert difference(first_rows(there["wider"], 40), base).kind == "equal"
    assert relative(0, 0) == 0


def test_samples_are_at_the_same_places_whatever_the_dtype(stored):
    values = numbers(300, 70).bfloat16()
    one, other = (stored(weight=values.to(dtype))["weight"] for dtype in (torch.bfloat16, torch.float32))
    np.testing.assert_array_equal(sample(one), sample(other))
    assert len(sample(one)) == 16 * 128
    assert {*sample(one)[[0, -1]].tolist()} == {float(values[0, 0]), float(values[-1, -1])}
    small = stored(weight=values[:2])["weight"]
    assert sample(small).tolist() == values[:2].flatten().float().tolist()


def test_unrelated_samples_are_a_norm_or_more_apart():
    one, other = numbers(2000).numpy(), numbers(2000, seed=1).numpy()
    assert distance(one, one.copy()) == 0
    for scale in (1e-3, 1.0, 1e3):
        assert distance(one, scale * other) > 0.95
    assert distance(one, 1.1 * one) == pytest.approx(0.1 / 1.1)
    assert distance(one, np.zeros_like(one)) == 1
    assert distance(np.zeros(3), np.zeros(3)) == 0
    assert distance(one, one * math.nan) == 1
    assert (distance(b"ab", b"ab"), distance(b"ab", b"ac")) == (0, 1)
