"""No two adjacent, or one contiguous run: every search obeys or refuses, and what is promised to fit fits."""

import itertools

import pytest

from layerprune.errors import RefusedError, UsageError
from layerprune.registry import build
from layerprune.removal import Removal
from layerprune.search import SEARCHES, AnyShape, Constraints, Contiguous, NoAdjacent
from table_judge import TableJudge, others


def find(name, judge, constraints, drop, seed=0):
    asked = others(TableJudge(seed + 100), own=TableJudge(seed))
    return build(SEARCHES, name)[1].find(judge, constraints, drop, seed=seed, others=asked)


def touching(units):
    """The definition, said another way: one layer ends where another begins."""
    return any(a + 1 in units for a in units)


def in_one_run(units):
    return all(b - a == 1 for a, b in itertools.pairwise(sorted(units)))


def test_a_shape_refuses_what_its_definition_excludes():
    for count in (1, 2, 3):
        for chosen in itertools.combinations(range(6), count):
            removal = Removal.of(*chosen)
            assert bool(NoAdjacent().refusal(removal)) == touching(chosen)
            assert bool(Contiguous().refusal(removal)) == (not in_one_run(chosen))


def stood_at(units, shape, *, below):
    """Nothing, and all removals of up to two layers that keep the shape and are smaller than ``below``."""
    for count in range(min(3, below)):
        for chosen in itertools.combinations(units, count):
            if not shape.refusal(Removal.of(*chosen)):
                yield set(chosen)


def open_layers(constraints, removed, drop):
    """The layers that may go next; none where the constraints refuse all."""
    try:
        return {move[0] for move in constraints.open_moves(Removal.of(*removed), drop)}
    except RefusedError:
        return set()


@pytest.mark.parametrize("shape", [NoAdjacent(), Contiguous(), AnyShape()])
@pytest.mark.parametrize("units", [tuple(range(6)), (0, 1, 3, 4, 5)])
def test_what_can_still_be_reached_is_known_before_a_step_is_taken(shape, units):
    """Brute force: a move is open exactly when some allowed removal of the wanted size contains it."""
    constraints = Constraints(6, units=units, shape=shape)
    for drop in range(1, 6):
        allowed = []
        for chosen in itertools.combinations(units, drop):
            if not shape.refusal(Removal.of(*chosen)):
                allowed.append(set(chosen))
        assert (drop in constraints.counts()) == bool(allowed)
        if not allowed:
            with pytest.raises(UsageError, match="may go"):
                constraints.require(drop)
            continue
        constraints.require(drop)
        for removed in stood_at(units, shape, below=drop):
            within = [units_ for units_ in allowed if removed <= units_]
            following = open_layers(constraints, removed, drop)
            # a step must keep the shape itself: a run is built from its inside outwards
            expected = {
                unit for units_ in within for unit in units_ - removed if not shape.refusal(Removal.of(unit, *removed))
            }
            assert following == expected


@pytest.mark.parametrize("name", list(SEARCHES.entries()))
@pytest.mark.parametrize(("shape", "broken"), [(NoAdjacent(), touching), (Contiguous(), lambda u: not in_one_run(u))])
def test_every_search_obeys_or_refuses(name, shape, broken):
    for seed, drop in itertools.product(range(3), (1, 2, 3)):
        constraints = Constraints(9, protect=frozenset({2}), shape=shape)
        judge = TableJudge(seed)
        if name == "blocks" and isinstance(shape, NoAdjacent) and drop > 1:
            with pytest.raises(RefusedError, match="no two adjacent ones may go"):
                find(name, judge, constraints, drop, seed)
            continue
        found = find(name, judge, constraints, drop, seed)
        assert len(found.removal) == drop
        assert not broken(found.removal.layers)
        assert 2 not in found.removal


def test_what_no_removal_fits_is_refused_with_how_many_would():
    with pytest.raises(UsageError, match=r"cannot remove 4 of 6 layers: at most 3 may go with no two adjacent$"):
        Constraints(6, shape=NoAdjacent()).require(4)
    constraints = Constraints(9, protect=frozenset({3}), shape=Contiguous())
    with pytest.raises(UsageError, match=r"at most 5 may go in one contiguous run \(protected: 3\)"):
        constraints.require(6)
    assert constraints.counts() == (1, 2, 3, 4, 5)


def test_layers_that_go_together_are_one_step_of_a_run_and_too_close_for_no_adjacent():
    together = (frozenset({1, 2}),)
    run = Constraints(5, together=together, shape=Contiguous())
    assert run.counts() == (1, 2, 3, 4)
    assert set(run.open_moves(Removal.of(0), 3)) == {(1, 2)}
    apart = Constraints(5, together=together, shape=NoAdjacent())
    assert apart.counts() == (1, 2)
    assert (1, 2) not in apart.open_moves(Removal(()), 2)


def test_the_architecture_still_has_its_say():
    def check(removal):
        if 4 in removal:
            raise RefusedError("layer 4 produces what layer 5 reads")

    constraints = Constraints(6, shape=Contiguous(), check=check)
    assert find("greedy", TableJudge(score=sum), constraints, 3).removal.layers == (0, 1, 2)
    with pytest.raises(RefusedError, match=r"after 1 \(\{5\}\) none of the others may go; layer 4 produces"):
        find("greedy", TableJudge(score=lambda units: -sum(units)), constraints, 3)
