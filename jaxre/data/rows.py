"""Packed rows: the arrays a step reads, and how a plan's update becomes them.

Letters: A micro-batches of an update, B rows, T tokens in a row, S supervised positions in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxre.data.packing import RowShape, Update
from jaxre.data.tokens import TokenSet


class Rows(NamedTuple):
    """One batch of packed rows; an update has a leading axis A.

    tokens, positions, visible_until: [B, T] int32. Positions restart with each example; token i sees
    token j exactly when `j <= i < visible_until[j]`; a pad token sees itself.
    owner: [B, T] uint32, whose dropout mask a token follows.
    supervised, targets: [B, S] int32, weights: [B, S] f32. The logits at row position
    `supervised[b, s]` are scored against `targets[b, s]`; unused places have weight 0.
    """

    tokens: np.ndarray
    positions: np.ndarray
    visible_until: np.ndarray
    owner: np.ndarray
    supervised: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def empty_rows(shape: RowShape) -> Rows:
    """All-pad rows."""
    B, T, S = shape.rows, shape.length, shape.supervised
    tokens = np.zeros((B, T), np.int32)
    alone = np.broadcast_to(np.arange(1, T + 1, dtype=np.int32), (B, T)).copy()
    supervised = np.zeros((B, S), np.int32)
    return Rows(
        tokens, np.zeros_like(tokens), alone, np.zeros((B, T), np.uint32), supervised, supervised.copy(), np.zeros((B, S), np.float32)
    )


def fill_rows(examples: TokenSet, owners: np.ndarray, packed: Sequence[Sequence[int]], shape: RowShape, prompt_weight: float = 0.0) -> Rows:
    """The rows of one micro-batch; `packed[b]` lists the examples of row b.

    With a `prompt_weight` the prompt's tokens, all but the first, are supervised too, at that weight. Where the examples
    have labels, the first token of each is scored against its label.
    """
    rows = empty_rows(shape)
    for b, members in enumerate(packed):
        start = count = 0
        for example in members:
            tokens = examples[example]
            end = start + len(tokens)
            rows.tokens[b, start:end] = tokens
            rows.positions[b, start:end] = np.arange(len(tokens))
            rows.visible_until[b, start:end] = end
            rows.owner[b, start:end] = owners[example]
            if examples.labels is not None:
                rows.supervised[b, count], rows.targets[b, count], rows.weights[b, count] = start, examples.labels[example], 1.0
                start, count = end, count + 1
                continue
            prompt = int(examples.prompt_lengths[example])
            first = 1 if prompt_weight else prompt
            places = slice(count, count + len(tokens) - first)
            rows.supervised[b, places] = np.arange(start + first - 1, end - 1)
            rows.targets[b, places] = tokens[first:]
            rows.weights[b, places] = np.where(np.arange(first, len(tokens)) < prompt, prompt_weight, 1.0)
            start, count = end, places.stop
    return rows


def fill_update(examples: TokenSet, owners: np.ndarray, update: Update, prompt_weight: float = 0.0) -> Rows:
    """The rows of an update, [A, B, ...]."""
    micro = [fill_rows(examples, owners, packed, update.shape, prompt_weight) for packed in update.micro]
    return Rows(*(np.stack(arrays) for arrays in zip(*micro, strict=True)))
