"""What the tests of attention kernels share: rows in blocks of 8 tokens, arrays to be differentiated, dense attention in f64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from forests import LAYOUTS, T, row_of
from jaxre_kernels.attention import masked_attention

BLOCK = 8
N = -(-T // BLOCK)
CLOSE = 2e-6  # f32: sums of at most 37 products, in another order than the reference's, which is in f64
ROWS = np.array([row_of(forest) for forest in LAYOUTS.values()], np.int32)


def draws(heads: int, kv_heads: int, channels: int, rows: int = len(ROWS), dtype=jnp.float32, seed: int = 0):
    """q, k, v and the gradient of the output."""
    draw = np.random.default_rng(seed)
    return [jnp.asarray(draw.standard_normal((rows, T, count, channels)), dtype) for count in (heads, kv_heads, kv_heads, heads)]


@jax.jit
def dense(q, k, v, dy, mask):
    out, back = jax.vjp(lambda q, k, v: masked_attention(q, k, v, mask), q, k, v)
    return out, *back(dy)


def in_f64(q, k, v, dy, mask):
    with jax.enable_x64(True):
        return [np.asarray(value) for value in dense(*(jnp.asarray(np.asarray(value), jnp.float64) for value in (q, k, v, dy)), mask)]


def segments(visible_until: np.ndarray):
    """The first token of each token's segment, and its end, for a row of roots without nodes below."""
    first = np.maximum.accumulate(np.where(np.diff(visible_until, prepend=0), np.arange(T), 0))
    return first.astype(np.int32), visible_until


def relative(ours, reference) -> float:
    ours, reference = (np.asarray(value, np.float64) for value in (ours, reference))
    return float(np.abs(ours - reference).max() / np.abs(reference).max())
