"""Shared by tests of attention kernels: rows in blocks of 8 tokens, random arrays, dense attention
in f64.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from forests import LAYOUTS, T, flat, row_of
from jaxre_kernels.attention import masked_attention

BLOCK = 8
N = -(-T // BLOCK)
CLOSE = (
    2e-6  # f32: sums of at most 37 products, in another order than the reference's, which is in f64
)
ROWS = np.array([row_of(forest) for forest in LAYOUTS.values()], np.int32)


# Rows of segments with attention in both directions.
SEGMENTS = {
    "one segment": flat(37),
    "ragged, pads behind": flat(11, 1, 9, 8, 3),
    "whole blocks and what is left": flat(8, 16, 8, 5),
    "all pad": flat(),
    "tokens of length one": flat(*[1] * 37),
}


def draws(
    heads: int,
    kv_heads: int,
    channels: int,
    rows: int = len(ROWS),
    dtype=jnp.float32,
    seed: int = 0,
    tokens: int = T,
):
    """q, k, v and the gradient of the output."""
    draw = np.random.default_rng(seed)
    return [
        jnp.asarray(draw.standard_normal((rows, tokens, count, channels)), dtype)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


@jax.jit
def dense(q, k, v, dy, mask):
    out, back = jax.vjp(lambda q, k, v: masked_attention(q, k, v, mask), q, k, v)
    return out, *back(dy)


def in_f64(q, k, v, dy, mask):
    with jax.enable_x64(True):
        return [
            np.asarray(value)
            for value in dense(
                *(jnp.asarray(np.asarray(value), jnp.float64) for value in (q, k, v, dy)), mask
            )
        ]


def segments(forests, tokens: int = T):
    """For rows of roots without nodes below: first token and end of each token's segment, and the
    mask of tokens that see each other.
    """
    until = np.stack([row_of(forest, tokens) for forest in forests]).astype(np.int32)
    starts = np.diff(until, prepend=0, axis=1) > 0
    first = np.maximum.accumulate(np.where(starts, np.arange(tokens), 0), axis=1).astype(np.int32)
    return first, until, first[:, :, None] == first[:, None, :]


def assert_close(found, expected, names=None) -> None:
    """Compares row by row, so that the largest number of a layout hides no error in another.

    Gradients of scores are differences of products dO V', about the root of the channels large. If
    a token sees only itself, they are zero, and their rounding remains.
    """
    for ours, reference in zip(found, expected, strict=True):
        for row, (our_row, exact) in enumerate(zip(np.asarray(ours), reference, strict=True)):
            bound = CLOSE * max(exact.shape[-1] ** 0.5, np.abs(exact).max())
            assert np.abs(our_row - exact).max() < bound, names[row] if names else row


def relative(ours, reference) -> float:
    ours, reference = (np.asarray(value, np.float64) for value in (ours, reference))
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
