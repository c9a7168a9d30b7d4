"""The layout of requests that share their beginnings: nothing lost, nothing twice, nobody sees a stranger."""

from __future__ import annotations

import random

import numpy as np
import pytest

from layerprune.data.items import Request
from layerprune.scoring.prefix_tree import (
    BEGINNING_TOKENS,
    PACK_TOKENS,
    ROW_TOKENS,
    batches,
    beginnings,
    chains,
    shared_length,
    tree_size,
    trees,
    trees_after_beginnings,
)


def eval_set(seed: int, count: int = 12, examples: int = 0) -> tuple[list[Request], list[list[int]]]:
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
    requests, groups = eval_set(seed, examples=examples)
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
    requests, groups = eval_set(seed, examples=examples)
    for row in trees(requests, groups):
        own = [requests[target.request].tokens[:-1] for target in row.targets]
        prefixes = {tokens[:stop] for tokens in own for stop in range(1, len(tokens) + 1)}
        assert row.length == len(prefixes) == tree_size(own)


def test_questions_with_the_same_examples_share_a_row():
    requests, groups = eval_set(1, count=6, examples=100)
    alone = sum(tree_size([requests[i].tokens[:-1] for i in group]) for group in groups)
    together = trees(requests, groups)
    assert len(together) == 1
    assert together[0].length == alone - 5 * 100


def test_short_trees_fill_rows_together_and_long_ones_stay_alone():
    requests, groups = eval_set(6, count=200)
    rows = trees(requests, groups)
    assert max(row.length for row in rows) <= PACK_TOKENS
    assert sum(row.length for row in rows) > 0.95 * PACK_TOKENS * (len(rows) - 1)  # hardly a place left free
    long, _ = eval_set(7, count=5)
    long = [Request((*range(100 * i, 100 * i + PACK_TOKENS), *r.tokens), r.scored) for i, r in enumerate(long)]
    assert len(trees(long, [[i] for i in range(len(long))])) == len(long)


def test_a_joint_row_does_not_outgrow_its_limit():
    requests, groups = eval_set(2, count=80, examples=200)
    rows = trees(requests, groups)
    assert 1 < len(rows) < 80
    assert all(row.length <= ROW_TOKENS for row in rows)


@pytest.mark.parametrize("seed", range(20))
def test_rows_after_a_beginning_see_it_and_nothing_of_it_is_in_them(seed):
    requests, groups = eval_set(seed, examples=BEGINNING_TOKENS + seed)
    others, more = eval_set(100 + seed, count=4)  # begin with nothing in common
    more = [[i + len(requests) for i in group] for group in more]
    requests, groups = [*requests, *others], [*groups, *more]
    seen, kept = set(), 0
    for row in trees_after_beginnings(requests, groups):
        visible, before = row.visible(), len(row.beginning)
        kept += bool(before)
        for target in row.targets:
            request = requests[target.request]
            seen.add(target.request)
            assert target.tokens.tolist() == list(request.tokens[-request.scored :])
            for offset, node in enumerate(target.nodes):
                own = np.flatnonzero(visible[node])
                expected = request.tokens[: len(request.tokens) - request.scored + offset]
                assert [*row.beginning, *row.tokens[own]] == list(expected)
                assert row.positions[own].tolist() == list(range(before, len(expected)))
    assert kept
    assert seen == set(range(len(requests)))


def test_a_beginning_leaves_every_question_a_token_that_predicts_its_answer():
    head = tuple(range(BEGINNING_TOKENS + 1))
    requests = [Request((*head, answer), 1) for answer in range(5)]  # the whole context is shared
    [(shared, members)] = beginnings(requests, [[i] for i in range(5)])
    assert shared == len(head) - 1
    assert len(members) == 5


def test_few_questions_or_short_beginnings_are_not_worth_keeping():
    assert [shared for shared, _ in beginnings(*eval_set(1, count=2, examples=BEGINNING_TOKENS))] == [0]
    assert [shared for shared, _ in beginnings(*eval_set(1, count=9, examples=BEGINNING_TOKENS // 2))] == [0]


def test_a_batch_has_one_beginning():
    requests, groups = eval_set(8, count=9, examples=BEGINNING_TOKENS)
    others, more = eval_set(9, count=9, examples=BEGINNING_TOKENS + 9)
    groups += [[i + len(requests) for i in group] for group in more]
    rows = trees_after_beginnings([*requests, *others], groups)
    assert len({row.beginning for row in rows}) == 2
    for batch in batches(rows, 10_000):
        assert len({row.beginning for row in batch}) == 1


def test_chains_are_the_distinct_inputs():
    requests = [Request((1, 2, 3), 1), Request((1, 2, 4), 1), Request((1, 2, 3, 4), 2)]
    rows = chains(requests)
    assert [row.tokens.tolist() for row in rows] == [[1, 2], [1, 2, 3]]
    assert [sorted(t.request for t in row.targets) for row in rows] == [[0, 1], [2]]
    assert all(len(row.spans) == 1 for row in rows)


@pytest.mark.parametrize("budget", [1, 64, 300, 10_000])
def test_batches_take_every_row_once_and_keep_to_the_budget(budget):
    requests, _ = eval_set(3, count=30)
    rows = chains(requests)
    made = list(batches(rows, budget))
    assert sorted(id(row) for batch in made for row in batch) == sorted(id(row) for row in rows)
    for batch in made:
        assert len(batch) == 1 or max(row.length for row in batch) * len(batch) <= budget


def test_a_fixed_batch_size_is_kept():
    requests, _ = eval_set(4, count=10)
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
