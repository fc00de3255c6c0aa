"""Fills packed rows: the arrays that a step reads, from an update of the plan.

Letters: A micro-batches of an update, B rows, T tokens in a row, S supervised positions in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxre.data.packing import RowShape, Update
from jaxre.data.prefixes import Prefixes
from jaxre.data.tokens import TokenSet


class Rows(NamedTuple):
    """One batch of packed rows; an update has a leading axis A.

    tokens, positions, visible_until: [B, T] int32. Positions restart with each example and continue
      after the tokens that it shares; token i sees token j exactly if `j <= i < visible_until[j]`;
      padding sees itself.
    owner: [B, T] uint32, the key of a token's dropout mask.
    supervised, targets: [B, S] int32, weights: [B, S] f32. The logits at row position
      `supervised[b, s]` are scored against `targets[b, s]`; unused entries have weight 0. Examples
      with the same prompt have an entry each.
    """

    tokens: np.ndarray
    positions: np.ndarray
    visible_until: np.ndarray
    owner: np.ndarray
    supervised: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def empty_rows(shape: RowShape) -> Rows:
    """Rows of padding only."""
    B, T, S = shape.rows, shape.length, shape.supervised
    return Rows(
        tokens=np.zeros((B, T), np.int32),
        positions=np.zeros((B, T), np.int32),
        visible_until=np.tile(np.arange(1, T + 1, dtype=np.int32), (B, 1)),
        owner=np.zeros((B, T), np.uint32),
        supervised=np.zeros((B, S), np.int32),
        targets=np.zeros((B, S), np.int32),
        weights=np.zeros((B, S), np.float32),
    )


def fill_rows(
    examples: TokenSet,
    prefixes: Prefixes,
    packed: Sequence[Sequence[int]],
    shape: RowShape,
    prompt_weight: float = 0.0,
) -> Rows:
    """The rows of one micro-batch; `packed[b]` lists the examples of row b.

    `prefixes` gives the tokens that an example shares with the one before it in its row. With a
    `prompt_weight`, all tokens of the prompt but the first are supervised too, at that weight; a
    token that k examples share is supervised once, at k times the weight. If the examples have
    labels, the first token of each is scored against its label.

    Raises:
      ValueError: the rows do not fit the shape.
    """
    rows = empty_rows(shape)
    shared_by_row = iter(prefixes.along(packed)[2].tolist())
    # For each token of the last example: its position in the row; its index among the targets.
    path, scored = np.zeros((2, shape.length), np.int64)
    for b, members in enumerate(packed):
        start = count = 0
        for example in members:
            shared, tokens = next(shared_by_row), examples[example]
            end = start + len(tokens) - shared
            rows.tokens[b, start:end] = tokens[shared:]
            rows.positions[b, start:end] = np.arange(shared, len(tokens))
            rows.owner[b, start:end] = prefixes.owners[
                examples.starts[example] + shared : examples.starts[example + 1]
            ]
            path[shared : len(tokens)] = np.arange(start, end)
            rows.visible_until[b, path[: len(tokens)]] = end
            if examples.labels is not None:
                rows.supervised[b, count], rows.targets[b, count], rows.weights[b, count] = (
                    start,
                    examples.labels[example],
                    1.0,
                )
                start, count = end, count + 1
                continue
            prompt = int(examples.prompt_lengths[example])
            first = prompt
            if prompt_weight:
                first = max(1, shared)
                rows.weights[b, scored[1:shared]] += prompt_weight
            places = slice(count, count + len(tokens) - first)
            scored[first : len(tokens)] = np.arange(count, places.stop)
            rows.supervised[b, places] = path[first - 1 : len(tokens) - 1]
            rows.targets[b, places] = tokens[first:]
            rows.weights[b, places] = np.where(
                np.arange(first, len(tokens)) < prompt, prompt_weight, 1.0
            )
            start, count = end, places.stop
    _check_reach(rows, shape)
    return rows


def _check_reach(rows: Rows, shape: RowShape) -> None:
    """Raises ValueError for a pair of tokens outside the shape's span, which attention would ignore
    silently.
    """
    if shape.span is None:
        return
    seen = rows.visible_until[:, shape.prefix :] - np.arange(
        shape.prefix, shape.length, dtype=np.int32
    )
    if seen.max(initial=0) > shape.span:
        raise ValueError(
            f"a token is seen from {seen.max() - 1} places away, outside of the prefix; {shape}"
            f" says fewer than {shape.span}"
        )


def fill_update(
    examples: TokenSet, prefixes: Prefixes, update: Update, prompt_weight: float = 0.0
) -> Rows:
    """The rows of an update, [A, B, ...]."""
    micro = [
        fill_rows(examples, prefixes, packed, update.shape, prompt_weight)
        for packed in update.micro
    ]
    return Rows(*(np.stack(arrays) for arrays in zip(*micro, strict=True)))
