"""Names to implementations: built-ins, entry points of other distributions, and clashes between them."""

import pytest

from layerprune.errors import RegistryError
from layerprune.registry import Registry

GROUP = "layerprune.test-things"


@pytest.fixture
def distribution(tmp_path, monkeypatch):
    """Return a function that installs a tiny distribution: one module and one entry point."""

    def install(name, entry, target, source=""):
        info = tmp_path / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry} = {target}\n")
        if source:
            (tmp_path / f"{target.partition(':')[0]}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def registry(**builtin):
    return Registry("thing", GROUP, "layerprune.removal:Removal", builtin)


def test_a_built_in_is_loaded_when_asked_for_and_not_before():
    things = registry(good="layerprune.removal:Removal", broken="layerprune.nowhere:Thing")
    assert list(things.entries()) == ["broken", "good"]
    assert things.get("good").load().__name__ == "Removal"
    with pytest.raises(RegistryError, match=r"'broken' of layerprune .* cannot be loaded from layerprune.nowhere"):
        things.get("broken").load()


def test_a_distribution_adds_a_name(distribution):
    source = "from layerprune.removal import Removal\nclass Theirs(Removal):\n    pass\n"
    distribution("other-things", "theirs", "their_module:Theirs", source)
    entry = registry(ours="layerprune.removal:Removal").get("theirs")
    assert entry.owner == "other-things 1.2"
    assert entry.load().__name__ == "Theirs"


def test_what_is_not_of_its_kind_is_named_with_the_class_to_subclass(distribution):
    distribution("other-things", "theirs", "number_module:THING", "THING = 41 + 1\n")
    with pytest.raises(RegistryError) as raised:
        registry().get("theirs").load()
    said = "'theirs' of other-things 1.2, number_module:THING, is no subclass of layerprune.removal:Removal"
    assert str(raised.value) == said


def test_two_owners_of_one_name_are_both_named(distribution):
    distribution("other-things", "ours", "their_module:THING")
    with pytest.raises(RegistryError, match=r"the thing 'ours': layerprune .* and other-things 1.2; uninstall"):
        registry(ours="layerprune.removal:Removal").entries()


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(RegistryError) as raised:
        registry(cosine="a:b", ablation="c:d").get("cosin")
    assert str(raised.value) == "unknown thing 'cosin'. Did you mean 'cosine'? Known: ablation, cosine"


def test_a_name_that_is_like_nothing_gets_no_suggestion():
    with pytest.raises(RegistryError, match=r"unknown thing 'zzz'. Known: cosine"):
        registry(cosine="a:b").get("zzz")
