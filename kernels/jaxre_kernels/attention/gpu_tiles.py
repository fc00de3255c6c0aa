"""What the Mosaic GPU kernels of packed attention share: where a thread block stands, and the
weights of a block of scores.

A block of scores lies in the registers of four warps as the tensor cores leave a product (`TILE`):
a warp holds 16 rows. It is the same for `wgmma` and for `mma`. Scores carry the factor log2 e, so
that exp2 is the exponential.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # less any score it stays finite
LOG2_E = math.log2(math.e)
TILE = plgpu.Layout.WGMMA


def own_block(array, block):
    """Of the block of this thread block: its number over all rows, its row, and its first token.
    `array` [B, S, ...].
    """
    own, blocks = lax.axis_index("blocks"), array.shape[1] // block
    return own, quotient(own, blocks), remainder(own, blocks) * block


def quotient(number, by):
    """Of numbers that are not negative: `//` would ask for the sign."""
    return lax.div(number, np.int32(by))


def remainder(number, by):
    return lax.rem(number, np.int32(by))


def along(vector, axis, like):
    """A vector that lies along `axis` of `like`, repeated over the other."""
    return lax.broadcast_in_dim(vector, like.shape, [axis])


def full(shape, value, layout=TILE):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def visible(since, until, start, scores, *, queries):
    """Whether a query sees a key, as `scores`.

    `since` and `until` are the bounds of the keys, along the keys; `queries` is the axis of the
    queries, whose first is `start`.
    """
    query = plgpu.broadcasted_iota(jnp.int32, scores.shape, queries, layout=TILE) + start
    return (along(since, 1 - queries, scores) <= query) & (
        query < along(until, 1 - queries, scores)
    )


def online_softmax(scores, seen, highest, count, scale):
    """Weights of a block of keys; by how much what was summed before shrinks; the highest score and
    the sum of weights until now.

    A query that has seen no key yet has highest = HIDDEN and weights of one; the first score that
    it sees takes all of that times exp2(HIDDEN - score) = 0.
    """
    scores = jnp.where(seen, scores * (scale * LOG2_E), HIDDEN)
    now = jnp.maximum(highest, scores.max(1))
    shrink, weights = jnp.exp2(highest - now), jnp.exp2(scores - along(now, 0, scores))
    return weights, shrink, now, count * shrink + weights.sum(1)


def weights_again(scores, seen, highest, scale):
    """exp(s Q K' - m), zero where a query does not see a key. What overflows there is not taken."""
    return jnp.where(seen, jnp.exp2(scores * (scale * LOG2_E) - highest), 0.0)
