"""Prefixes are what the tokens say, their owners hang on no plan, and every row is a prefix tree in
which each example reads whole.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_prefixes import begin_alike

from jaxre.data.packing import MAX_SHAPES, Plan, RowShape, plan_by_examples, plan_by_tokens
from jaxre.data.prefixes import Prefixes, find_prefixes, group_examples
from jaxre.data.rows import Rows, fill_rows
from jaxre.data.template import Encoded
from jaxre.data.tokens import TokenSet

ROW = 96


def examples_of(prompts: list[list[int]], answers: list[int]) -> TokenSet:
    """Prompts, each with an answer of one or more equal tokens."""
    encoded = [
        Encoded([*prompt, *[9] * answer], len(prompt))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return TokenSet.of(encoded, [f"example-{n}" for n in range(len(prompts))])


# Few tokens, so that many prompts begin alike, some are the same, and some are the beginning of
# others.
PROMPT = st.tuples(
    st.sampled_from([[], [1] * 12, [1] * 9 + [2] * 12, [3] * 20]),
    st.lists(st.integers(1, 2), min_size=1, max_size=14),
).map(lambda parts: parts[0] + parts[1])
SETS = st.lists(st.tuples(PROMPT, st.integers(1, 5)), min_size=1, max_size=40).map(
    lambda pairs: examples_of(*map(list, zip(*pairs, strict=True)))
)


def common_prompt(tokens: TokenSet, one: int, other: int) -> int:
    prompts = (tokens[n][: tokens.prompt_lengths[n]].tolist() for n in (one, other))
    return sum(
        1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False))
    )


@settings(max_examples=60, deadline=None)
@given(tokens=SETS)
def test_what_two_examples_share_is_what_their_prompts_begin_with(tokens: TokenSet) -> None:
    prefixes = find_prefixes(tokens)
    pairs = [(a, b) for a in range(len(tokens)) for b in range(len(tokens)) if a != b]
    if pairs:
        found = prefixes.common(*np.array(pairs).T)
        assert found.tolist() == [common_prompt(tokens, a, b) for a, b in pairs]
        assert not prefixes.unshared().common(*np.array(pairs).T).any()
    assert sorted(prefixes.order) == list(range(len(tokens))) and all(
        prefixes.rank[prefixes.order] == np.arange(len(tokens))
    )


@settings(max_examples=60, deadline=None)
@given(tokens=SETS)
def test_a_token_that_another_example_begins_with_too_belongs_to_its_prefix_others_to_theirs(
    tokens: TokenSet,
) -> None:
    owners, known = find_prefixes(tokens).owners, {}
    for n in range(len(tokens)):
        shareable = max(
            (common_prompt(tokens, n, other) for other in range(len(tokens)) if other != n),
            default=0,
        )
        own = owners[tokens.starts[n] : tokens.starts[n + 1]]
        for place in range(shareable):
            beginning = tuple(tokens[n][: place + 1].tolist())
            assert known.setdefault(beginning, own[place]) == own[place]
        assert set(own[shareable:].tolist()) <= {zlib.crc32(f"example-{n}".encode())}
    assert len(set(known.values())) == len(known)  # 32 bits: no two of so few agree


def read(rows: Rows, b: int, last: int) -> tuple[list[int], list[int]]:
    """Tokens and positions that the token at `last` of row b sees."""
    seen = np.flatnonzero(rows.visible_until[b, : last + 1] > last)
    return rows.tokens[b, seen].tolist(), rows.positions[b, seen].tolist()


def check_rows(tokens: TokenSet, rows: Rows, packed, shape: RowShape) -> None:
    """Each supervised token of each example is scored once, from a position that sees that
    example's tokens before it and no other.
    """
    for b, members in enumerate(packed):
        scored = [
            (*read(rows, b, int(position)), int(target))
            for position, target, weight in zip(
                rows.supervised[b], rows.targets[b], rows.weights[b], strict=True
            )
            if weight
        ]
        expected = []
        for n in members:
            ids, prompt = tokens[n].tolist(), int(tokens.prompt_lengths[n])
            expected += [
                (ids[:place], list(range(place)), ids[place]) for place in range(prompt, len(ids))
            ]
        assert sorted(scored) == sorted(expected)
    i, j = np.arange(shape.length)[:, None], np.arange(shape.length)[None, :]
    visible = (j <= i) & (i < rows.visible_until[:, None, :])
    if shape.span is not None:
        assert not (visible & (i - j >= shape.span) & (j >= shape.prefix)).any()
    assert not rows.weights[len(packed) :].any()


def check_plan(plan: Plan, tokens: TokenSet, epochs: int) -> None:
    for first, last in itertools.pairwise((0, *plan.epoch_ends)):
        seen = [
            n
            for update in plan.updates[first:last]
            for micro in update.micro
            for row in micro
            for n in row
        ]
        assert sorted(seen) == list(range(len(tokens)))
    assert len(plan.epoch_ends) == epochs and len(plan.shapes) <= MAX_SHAPES
    for update in plan.updates:
        for micro in update.micro:
            check_rows(
                tokens, fill_rows(tokens, plan.prefixes, micro, update.shape), micro, update.shape
            )


@settings(max_examples=60, deadline=None)
@given(
    tokens=SETS,
    rows=st.integers(1, 3),
    accumulation=st.integers(1, 2),
    length=st.sampled_from([40, 64, 512]),
)
def test_rows_by_tokens_hold_every_example_once_as_a_branch_of_a_prefix_tree(
    tokens: TokenSet, rows: int, accumulation: int, length: int
) -> None:
    for prefixes in (find_prefixes(tokens), find_prefixes(tokens).unshared()):
        plan = plan_by_tokens(
            tokens.lengths,
            tokens.supervised,
            prefixes,
            seed=0,
            epochs=2,
            row_length=length,
            rows=rows,
            accumulation=accumulation,
        )
        check_plan(plan, tokens, epochs=2)
    assert plan.fill(tokens.lengths, tokens.supervised).shared == 0


@settings(max_examples=60, deadline=None)
@given(
    tokens=SETS,
    examples=st.integers(1, 9),
    shards=st.integers(1, 3),
    length=st.sampled_from([40, 64, 512]),
)
def test_rows_by_examples_hold_every_example_once_as_a_branch_of_a_prefix_tree(
    tokens: TokenSet, examples: int, shards: int, length: int
) -> None:
    plan = plan_by_examples(
        tokens.lengths,
        tokens.supervised,
        find_prefixes(tokens),
        seed=0,
        epochs=2,
        row_length=length,
        examples=examples,
        accumulation=1,
        shards=shards,
        multiple=8,
    )
    check_plan(plan, tokens, epochs=2)


@settings(max_examples=60, deadline=None)
@given(tokens=SETS, data=st.data())
def test_any_examples_in_any_order_are_rows_that_read_right(
    tokens: TokenSet, data: st.DataObject
) -> None:
    """Rows with several roots, in any order, sharing every common prefix."""
    members = data.draw(st.permutations(range(len(tokens))))
    cut = data.draw(st.integers(0, len(members)))
    packed = [row for row in (members[:cut], members[cut:]) if row]
    shape = RowShape(3, int(tokens.lengths.sum()), int(tokens.supervised.sum()))
    check_rows(tokens, fill_rows(tokens, find_prefixes(tokens), packed, shape), packed, shape)


def mixture(seed: int = 0) -> TokenSet:
    """Three corpora behind one system turn, each with its demonstrations; of one, groups of pairs
    in one sentence; and a few strangers.
    """
    draw = np.random.default_rng(seed)

    def some(count: int) -> list[int]:
        return draw.integers(10, 50_000, count).tolist()

    system, encoded = some(20), []
    for demonstrations, count, pairs in ((100, 400, 1), (60, 300, 1), (0, 60, 5)):
        shown = some(demonstrations)
        for _ in range(count):
            sentence = some(int(draw.integers(20, 60)))
            for _ in range(pairs):
                prompt = system + shown + sentence + some(int(draw.integers(5, 12)))
                encoded.append(Encoded(prompt + some(int(draw.integers(2, 9))), len(prompt)))
    for _ in range(5):
        prompt = some(90)
        encoded.append(Encoded(prompt + some(3), len(prompt)))
    order = draw.permutation(len(encoded))
    return TokenSet.of([encoded[n] for n in order], [f"example-{n}" for n in order])


def test_examples_of_one_beginning_share_rows_and_pairs_of_one_sentence_stand_together() -> None:
    tokens = mixture()
    plan = plan_by_tokens(
        tokens.lengths,
        tokens.supervised,
        find_prefixes(tokens),
        seed=0,
        epochs=1,
        row_length=512,
        rows=4,
        accumulation=1,
    )
    check_plan(plan, tokens, epochs=1)
    # Each token of the prefix tree occurs once a row: hardly more than the branches, the roots and
    # the shared sentences once.
    nodes = {
        tuple(tokens[n][: place + 1].tolist())
        for n in range(len(tokens))
        for place in range(int(tokens.prompt_lengths[n]))
    }
    rows = sum(len(micro) for update in plan.updates for micro in update.micro)
    fewest = (len(nodes) + int(tokens.supervised.sum())) / 512
    # a root takes up to 120 of 512 places of a row
    assert rows < 1.35 * fewest < 0.6 * tokens.lengths.sum() / 512
    assert plan.fill(tokens.lengths, tokens.supervised).pad < 0.05
    (shape,) = plan.shapes
    assert shape.prefix == 128 and shape.span < 256  # 120 shared tokens; the longest branch has 80


def test_a_row_of_several_roots_has_each_root_once() -> None:
    tokens = begin_alike()
    prefixes = find_prefixes(tokens)
    row = prefixes.order.tolist()
    nodes = {
        tuple(tokens[n][: place + 1].tolist())
        for n in row
        for place in range(int(tokens.prompt_lengths[n]))
    }
    fewest = len(nodes) + int(tokens.supervised.sum())
    assert fewest < 0.4 * tokens.lengths.sum()
    for length in (fewest, fewest + 9):
        shape = RowShape(1, length, int(tokens.supervised.sum()))
        check_rows(tokens, fill_rows(tokens, prefixes, [row], shape), [row], shape)
    with pytest.raises(ValueError, match="broadcast"):
        fill_rows(tokens, prefixes, [row], RowShape(1, fewest - 1, shape.supervised))


def test_bounds_that_a_row_breaks_are_an_error() -> None:
    tokens = begin_alike()
    prefixes = find_prefixes(tokens)
    with pytest.raises(ValueError, match="outside of the prefix"):
        fill_rows(
            tokens, prefixes, [prefixes.order.tolist()], RowShape(1, 512, 128, prefix=16, span=32)
        )


def test_a_shared_token_of_the_prompt_is_supervised_once_at_the_weight_of_all() -> None:
    tokens = begin_alike()
    prefixes = find_prefixes(tokens)
    plan = plan_by_tokens(
        tokens.lengths,
        tokens.lengths - 1,
        prefixes,
        seed=0,
        epochs=1,
        row_length=ROW,
        rows=2,
        accumulation=1,
    )
    total = 0.0
    for update in plan.updates:
        rows = fill_rows(tokens, plan.prefixes, update.micro[0], update.shape, prompt_weight=0.25)
        for b in range(len(update.micro[0])):
            used = rows.weights[b] > 0
            pairs = [
                *zip(rows.supervised[b, used].tolist(), rows.targets[b, used].tolist(), strict=True)
            ]
            answers = sum(int(tokens.supervised[n]) for n in update.micro[0][b])
            assert len(pairs) - len(set(pairs)) <= answers  # only answers are not shared
        total += float(rows.weights.sum())
    assert total == pytest.approx(
        tokens.supervised.sum() + 0.25 * (tokens.prompt_lengths - 1).sum()
    )


def test_examples_to_classify_share_nothing() -> None:
    tokens = begin_alike()
    labelled = TokenSet(
        tokens.tokens,
        tokens.starts,
        tokens.prompt_lengths,
        tokens.ids,
        np.zeros(len(tokens), np.int32),
    )
    prefixes = find_prefixes(labelled)
    assert not prefixes.neighbours.any()
    np.testing.assert_array_equal(prefixes.owners, np.repeat(tokens.owners, tokens.lengths))


def test_groups_hold_every_example_once_and_share_no_more_than_is_there() -> None:
    for tokens in (mixture(), begin_alike()):
        found = find_prefixes(tokens)
        for bundled in (True, False):
            groups, planned = group_examples(found, tokens.lengths, tokens.supervised, 256, bundled)
            assert sorted(
                n for group in groups for bundle in group.bundles for n in bundle
            ) == list(range(len(tokens)))
            one, other = found.order[:-1], found.order[1:]
            assert (planned.common(one, other) <= found.common(one, other)).all()
            for group in groups:
                flat = [n for bundle in group.bundles for n in bundle]
                assert (
                    found.common(np.array(flat[:-1], int), np.array(flat[1:], int)) >= group.prefix
                ).all()
                assert all(len(bundle) == 1 for bundle in group.bundles) or bundled


PURE = """
import hashlib, numpy as np
from test_prefixes import mixture
from jaxre.data.packing import plan_by_examples, plan_by_tokens
from jaxre.data.prefixes import find_prefixes

np.random.seed({noise})
np.random.random(10)
tokens = mixture()
given = (tokens.lengths, tokens.supervised, find_prefixes(tokens))
plans = (
    plan_by_tokens(*given, seed=42, epochs=2, row_length=512, rows=4, accumulation=1),
    plan_by_examples(*given, seed=42, epochs=1, row_length=1024, examples=16, accumulation=1),
)
print(
    hashlib.sha256(
        repr(plans).encode() + given[2].owners.tobytes() + plans[0].prefixes.least.tobytes()
    ).hexdigest()
)
"""


@pytest.mark.slow
def test_plan_and_owners_are_the_same_in_every_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", PURE.format(noise=noise)],
            env={
                "PYTHONHASHSEED": noise,
                "PATH": "/usr/bin",
                "PYTHONPATH": (
                    f"{Path(__file__).parents[2]}:{Path(__file__).parents[1]}:{Path(__file__).parent}"
                ),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for noise in ("1", "2")
    }
    assert len(found) == 1


@pytest.mark.parametrize("count", [0, 1])
def test_a_set_of_no_or_one_example_shares_nothing(count: int) -> None:
    tokens = examples_of([[1, 2, 3]] * count, [2] * count)
    prefixes = find_prefixes(tokens)
    assert (
        isinstance(prefixes, Prefixes)
        and not prefixes.neighbours.any()
        and len(prefixes.owners) == 5 * count
    )
