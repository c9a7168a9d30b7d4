"""The layout of requests that share their beginnings: nothing lost, nothing twice, nobody sees a stranger."""

from __future__ import annotations

import random

import numpy as np
import pytest

from layerprune.engine.trees import PACK_TOKENS, ROW_TOKENS, batches, chains, shared_length, tree_size, trees
from layerprune.tasks.items import Request


def questions(seed: int, count: int = 12, examples: int = 0) -> tuple[list[Request], list[list[int]]]:
    """Random questions of 2 to 5 answers; ``examples`` tokens stand before all of them."""
    rng = random.Random(seed)
    head = [rng.randrange(50) for _ in range(examples)]
    requests: list[Request] = []
    groups = []
    for _ in range(count):
        context = head + [rng.randrange(50) for _ in range(rng.randint(1, 30))]
        own = []
        for _ in range(rng.randint(2, 5)):
            answer = [rng.randrange(3) for _ in range(rng.randint(1, 8))]  # few symbols: answers share beginnings too
            own.append(len(requests))
            requests.append(Request((*context, *answer), len(answer)))
        groups.append(own)
    return requests, groups


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("examples", [0, 40])
def test_every_answer_token_is_read_after_exactly_its_own_prefix(seed, examples):
    requests, groups = questions(seed, examples=examples)
    seen = set()
    for row in trees(requests, groups):
        visible = row.visible()
        for target in row.targets:
            request = requests[target.request]
            seen.add(target.request)
            assert target.tokens.tolist() == list(request.tokens[-request.scored :])
            for offset, node in enumerate(target.nodes):
                prefix = np.flatnonzero(visible[node])
                expected = request.tokens[: len(request.tokens) - request.scored + offset]
                assert row.tokens[prefix].tolist() == list(expected)
                assert row.positions[prefix].tolist() == list(range(len(expected)))
    assert seen == set(range(len(requests)))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("examples", [0, 40])
def test_a_row_holds_each_node_of_the_prefix_tree_once(seed, examples):
    requests, groups = questions(seed, examples=examples)
    for row in trees(requests, groups):
        own = [requests[target.request].tokens[:-1] for target in row.targets]
        prefixes = {tokens[:stop] for tokens in own for stop in range(1, len(tokens) + 1)}
        assert row.length == len(prefixes) == tree_size(own)


def test_questions_with_the_same_examples_share_a_row():
    requests, groups = questions(1, count=6, examples=100)
    alone = sum(tree_size([requests[i].tokens[:-1] for i in group]) for group in groups)
    together = trees(requests, groups)
    assert len(together) == 1
    assert together[0].length == alone - 5 * 100


def test_short_trees_fill_rows_together_and_long_ones_stay_alone():
    requests, groups = questions(6, count=200)
    rows = trees(requests, groups)
    assert max(row.length for row in rows) <= PACK_TOKENS
    assert sum(row.length for row in rows) > 0.95 * PACK_TOKENS * (len(rows) - 1)  # hardly a place left free
    long, _ = questions(7, count=5)
    long = [Request((*range(100 * i, 100 * i + PACK_TOKENS), *r.tokens), r.scored) for i, r in enumerate(long)]
    assert len(trees(long, [[i] for i in range(len(long))])) == len(long)


def test_a_joint_row_does_not_outgrow_its_limit():
    requests, groups = questions(2, count=80, examples=200)
    rows = trees(requests, groups)
    assert 1 < len(rows) < 80
    assert all(row.length <= ROW_TOKENS for row in rows)


def test_chains_are_the_distinct_inputs():
    requests = [Request((1, 2, 3), 1), Request((1, 2, 4), 1), Request((1, 2, 3, 4), 2)]
    rows = chains(requests)
    assert [row.tokens.tolist() for row in rows] == [[1, 2], [1, 2, 3]]
    assert [sorted(t.request for t in row.targets) for row in rows] == [[0, 1], [2]]
    assert all(row.is_chain for row in rows)


@pytest.mark.parametrize("budget", [1, 64, 300, 10_000])
def test_batches_take_every_row_once_and_keep_to_the_budget(budget):
    requests, _ = questions(3, count=30)
    rows = chains(requests)
    made = list(batches(rows, budget))
    assert sorted(id(row) for batch in made for row in batch) == sorted(id(row) for row in rows)
    for batch in made:
        assert len(batch) == 1 or max(row.length for row in batch) * len(batch) <= budget


def test_a_fixed_batch_size_is_kept():
    requests, _ = questions(4, count=10)
    assert [len(batch) for batch in batches(chains(requests)[:10], 1, 4)] == [4, 4, 2]


def test_shared_length_by_halving_equals_counting():
    rng = random.Random(5)
    for _ in range(500):
        a = tuple(rng.randrange(2) for _ in range(rng.randint(0, 12)))
        b = tuple(rng.randrange(2) for _ in range(rng.randint(0, 12)))
        count = 0
        while count < min(len(a), len(b)) and a[count] == b[count]:
            count += 1
        assert shared_length(a, b) == count
