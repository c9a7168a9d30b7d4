"""Specs are parsed by the dataclass they build, written back shortest, and refused in one line."""

import dataclasses
from typing import Literal

import pytest

from layerprune import registry
from layerprune.errors import RegistryError, UsageError
from layerprune.registry import Registry


@dataclasses.dataclass(frozen=True)
class Sample:
    """Every kind of option there is."""

    tokens: Literal["all", "last"] = dataclasses.field(default="all", metadata={"help": "which tokens count"})
    windows: int = 16
    scale: float = 1.0
    center: bool = False
    limit: int | None = None

    def __post_init__(self):
        if self.windows < 1:
            raise ValueError(f"windows must be at least 1, got {self.windows}")


@dataclasses.dataclass(frozen=True)
class Needy:
    """An option without a default."""

    path: str


REGISTRY = Registry(
    "sample",
    "layerprune.test-samples",
    "builtins:object",
    {name: f"{__name__}:{target}" for name, target in (("sample", "Sample"), ("needy", "Needy"), ("plain", "Plain"))},
)


class Plain:
    """Not a dataclass."""


def test_an_option_of_each_type_is_parsed():
    entry, sample = registry.build(REGISTRY, "sample:tokens=last, windows=32,scale=0.5,center=yes,limit=7")
    assert sample == Sample("last", 32, 0.5, True, 7)
    assert entry.name == "sample"
    assert registry.build(REGISTRY, "sample:limit=none")[1] == Sample()
    assert registry.build(REGISTRY, "needy:path=a=b")[1] == Needy("a=b")


def test_defaults_are_left_out():
    assert registry.spec_of("sample", Sample()) == "sample"
    spec = registry.spec_of("sample", Sample(windows=4, center=True))
    assert spec == "sample:windows=4,center=true"
    assert registry.build(REGISTRY, spec)[1] == Sample(windows=4, center=True)


def test_provenance_names_every_option():
    assert registry.options_of(Sample()) == {
        "tokens": "all", "windows": 16, "scale": 1.0, "center": False, "limit": None,
    }  # fmt: skip


def test_help_is_derived_from_the_fields():
    options = {option.name: option for option in registry.declared_options(REGISTRY.get("sample"))}
    assert options["tokens"].type == "'all' | 'last'"
    assert options["tokens"].help == "which tokens count"
    assert options["limit"].type == "int | none"
    assert options["center"].default == "false"
    assert registry.declared_options(REGISTRY.get("needy"))[0].default == "needed"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sample:token=last", "no option 'token'. Did you mean 'tokens'?"),
        ("sample:tokens=first", "one of 'all' | 'last'; got 'first'"),
        ("sample:windows=many", "takes int; got 'many'"),
        ("sample:limit=some", "takes int | none; got 'some'"),
        ("sample:center=maybe", "takes bool; got 'maybe'"),
        ("sample:windows", "write sample:option=value"),
        ("sample:", "write sample:option=value"),
        ("sample:windows=1,windows=2", "given twice"),
        ("sample:windows=0", "at least 1, got 0"),
        ("needy", "needs the option 'path'"),
    ],
)
def test_a_faulty_spec_is_refused_in_one_line(spec, message):
    with pytest.raises(UsageError) as raised:
        registry.build(REGISTRY, spec)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_not_a_dataclass_is_refused_by_owner():
    with pytest.raises(RegistryError, match=r"of layerprune .* is not a dataclass"):
        registry.build(REGISTRY, "plain")


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(RegistryError, match=r"unknown sample 'sampel'\. Did you mean 'sample'"):
        registry.build(REGISTRY, "sampel:windows=2")
