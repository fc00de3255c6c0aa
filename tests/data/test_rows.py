"""Filled rows: visibility, scored positions, dropout owners; the loader starts at any step."""

from __future__ import annotations

import itertools
import zlib

import numpy as np
import pytest

from jaxre.data.loader import updates
from jaxre.data.packing import RowShape, plan_by_examples, plan_by_tokens
from jaxre.data.prefixes import find_prefixes
from jaxre.data.rows import Rows, empty_rows, fill_rows, fill_update
from jaxre.data.template import Encoded
from jaxre.data.tokens import TokenSet

ROW = 32


def made(count: int, seed: int = 0, longest: int = ROW) -> TokenSet:
    """Random examples of 2 to `longest` tokens without token 0, all with different first tokens."""
    draw = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        length = int(draw.integers(2, longest + 1))
        encoded.append(
            Encoded(
                [100 + len(encoded), *draw.integers(1, 100, length - 1).tolist()],
                int(draw.integers(1, length)),
            )
        )
    return TokenSet.of(encoded, [f"example-{n}" for n in range(count)])


def filled(
    tokens: TokenSet, prompt_weight: float = 0.0
) -> tuple[Rows, tuple[tuple[int, ...], ...]]:
    """All examples in one micro-batch, and the examples of each row."""
    supervised = tokens.lengths - 1 if prompt_weight else tokens.supervised
    plan = plan_by_tokens(
        tokens.lengths,
        supervised,
        find_prefixes(tokens),
        seed=0,
        epochs=1,
        row_length=ROW,
        rows=len(tokens) + 1,
        accumulation=1,
    )
    (update,) = plan.updates
    return (
        fill_rows(tokens, plan.prefixes, update.micro[0], update.shape, prompt_weight),
        update.micro[0],
    )


@pytest.fixture(scope="module")
def tokens() -> TokenSet:
    return made(40)


def test_a_token_sees_its_own_example_up_to_itself_and_a_pad_itself(tokens: TokenSet) -> None:
    rows, packed = filled(tokens)
    i, j = np.arange(ROW)[:, None], np.arange(ROW)[None, :]
    for b in range(len(rows.tokens)):
        members = packed[b] if b < len(packed) else ()
        segment = np.repeat([-1], ROW)
        start = 0
        for number, one in enumerate(members):
            segment[start : start + len(tokens[one])] = number
            start += len(tokens[one])
        expected = (segment[:, None] == segment[None, :]) & (segment[:, None] >= 0) & (j <= i) | (
            i == j
        )
        seen = (j <= i) & (i < rows.visible_until[b][None, :])
        np.testing.assert_array_equal(seen, expected)


def test_each_example_stands_whole_with_positions_from_zero_and_its_own_dropout(
    tokens: TokenSet,
) -> None:
    rows, packed = filled(tokens)
    for b, members in enumerate(packed):
        start = 0
        for one in members:
            span = slice(start, start + len(tokens[one]))
            np.testing.assert_array_equal(rows.tokens[b, span], tokens[one])
            np.testing.assert_array_equal(rows.positions[b, span], np.arange(len(tokens[one])))
            assert set(rows.owner[b, span].tolist()) == {zlib.crc32(f"example-{one}".encode())}
            start = span.stop
        assert not rows.tokens[b, start:].any() and not rows.weights[len(packed) :].any()


@pytest.mark.parametrize("prompt_weight", [0.0, 0.25])
def test_scored_are_the_answers_and_the_prompt_at_its_weight(
    tokens: TokenSet, prompt_weight: float
) -> None:
    rows, packed = filled(tokens, prompt_weight)
    for b, members in enumerate(packed):
        expected, start = [], 0
        for one in members:
            ids, prompt = tokens[one], tokens.prompt_lengths[one]
            for place in range(1 if prompt_weight else prompt, len(ids)):
                expected.append(
                    (start + place - 1, ids[place], 1.0 if place >= prompt else prompt_weight)
                )
            start += len(ids)
        count = len(expected)
        assert [
            *zip(
                rows.supervised[b, :count],
                rows.targets[b, :count],
                rows.weights[b, :count],
                strict=True,
            )
        ] == expected
        assert not rows.weights[b, count:].any()
        # The token scored at a position is the one that follows it in the row.
        np.testing.assert_array_equal(
            rows.tokens[b, rows.supervised[b, :count] + 1], rows.targets[b, :count]
        )
    assert rows.weights.sum() == pytest.approx(
        tokens.supervised.sum() + prompt_weight * (tokens.prompt_lengths - 1).sum()
    )


def test_rows_have_the_dtypes_of_the_step(tokens: TokenSet) -> None:
    rows, _ = filled(tokens)
    empty = empty_rows(RowShape(2, ROW, 3))
    for one in (rows, empty):
        assert [array.dtype for array in one] == [
            np.int32,
            np.int32,
            np.int32,
            np.uint32,
            np.int32,
            np.int32,
            np.float32,
        ]
    assert (
        empty.tokens.shape == (2, ROW) and empty.targets.shape == (2, 3) and not empty.weights.any()
    )


@pytest.mark.parametrize("shape", [RowShape(1, 40, 100), RowShape(1, 200, 2), RowShape(1, 40, 2)])
def test_a_row_that_overflows_is_an_error_not_a_cut(shape: RowShape) -> None:
    tokens = made(6, seed=3, longest=30)
    assert tokens.lengths.sum() > 40 and tokens.supervised.sum() > 2
    with pytest.raises(ValueError, match="broadcast"):
        fill_rows(tokens, find_prefixes(tokens), [range(6)], shape)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("by", ["tokens", "examples"])
def test_the_loader_resumes_at_any_step_with_the_same_rows(
    tokens: TokenSet, by: str, accumulation: int
) -> None:
    settings = {"seed": 1, "epochs": 2, "row_length": ROW, "accumulation": accumulation}
    if by == "tokens":
        plan = plan_by_tokens(
            tokens.lengths, tokens.supervised, find_prefixes(tokens), rows=2, **settings
        )
    else:
        plan = plan_by_examples(
            tokens.lengths,
            tokens.supervised,
            find_prefixes(tokens),
            examples=6,
            multiple=8,
            **settings,
        )
    whole = list(updates(tokens, plan))
    assert len(whole) == len(plan.updates) > 4
    for step, (rows, update) in enumerate(zip(whole, plan.updates, strict=True)):
        shape = update.shape
        assert rows.tokens.shape == (accumulation, shape.rows, shape.length), step
        assert rows.weights.shape == (accumulation, shape.rows, shape.supervised)
    for first in (1, plan.epoch_ends[0], len(whole) - 1, len(whole)):
        again = list(updates(tokens, plan, first))
        assert len(again) == len(whole) - first
        for one, other in zip(again, whole[first:], strict=True):
            for left, right in zip(one, other, strict=True):
                np.testing.assert_array_equal(left, right)


def test_every_supervised_token_is_trained_on_once_an_epoch(tokens: TokenSet) -> None:
    plan = plan_by_examples(
        tokens.lengths,
        tokens.supervised,
        find_prefixes(tokens),
        seed=1,
        epochs=3,
        row_length=ROW,
        examples=7,
        accumulation=1,
        multiple=8,
        shards=2,
    )
    counts = [float(rows.weights.sum()) for rows in updates(tokens, plan)]
    for first, last in itertools.pairwise((0, *plan.epoch_ends)):
        assert sum(counts[first:last]) == tokens.supervised.sum()


def test_the_loader_passes_the_prompt_weight_on(tokens: TokenSet) -> None:
    plan = plan_by_tokens(
        tokens.lengths,
        tokens.lengths - 1,
        find_prefixes(tokens),
        seed=1,
        epochs=1,
        row_length=ROW,
        rows=2,
        accumulation=1,
    )
    for rows, update in zip(updates(tokens, plan, prompt_weight=0.5), plan.updates, strict=True):
        for left, right in zip(rows, fill_update(tokens, plan.prefixes, update, 0.5), strict=True):
            np.testing.assert_array_equal(left, right)
        assert set(np.unique(rows.weights).tolist()) <= {0.0, 0.5, 1.0} and 0.5 in rows.weights
