"""Not yet run on a GPU: unverified. `tools/hardware_check --only attention` confirms it.

Shared parts of the Mosaic GPU kernels of packed attention: the position of a thread block, and the
weights of a block of scores.

A block of scores lies in the registers of four warps as the tensor cores leave a product (`TILE`):
a warp holds 16 rows. The layout is the same for `wgmma` and for `mma`. Scores carry the factor
log2 e, so exp2 replaces the exponential.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxre_kernels.mosaic_gpu import LOG2_E, TILE, quotient, remainder

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite even after subtracting any score


def own_block(array, block):
    """The thread block's block: its number over all rows, its row, and its first token. `array`
    [B, S, ...].
    """
    own, blocks = lax.axis_index("blocks"), array.shape[1] // block
    return own, quotient(own, blocks), remainder(own, blocks) * block


def along(vector, axis, like):
    """A vector that lies along `axis` of `like`, broadcast over the other axis."""
    return lax.broadcast_in_dim(vector, like.shape, [axis])


def full(shape, value, layout=TILE):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def visible(since, until, start, scores, *, queries):
    """Mask of the shape of `scores`, true where a query sees a key.

    `since` and `until` are the bounds of the keys, along the keys; `queries` is the axis of the
    queries, whose first is `start`.
    """
    query = plgpu.broadcasted_iota(jnp.int32, scores.shape, queries, layout=TILE) + start
    return (along(since, 1 - queries, scores) <= query) & (
        query < along(until, 1 - queries, scores)
    )


def online_softmax(scores, seen, highest, count, scale):
    """One step of the online softmax: weights of a block of keys, the factor that rescales earlier
    sums, and the new highest score and sum of weights.

    A query that has not seen a key yet has highest = HIDDEN and weights of one; the first score
    it sees rescales all of that by exp2(HIDDEN - score) = 0.
    """
    scores = jnp.where(seen, scores * (scale * LOG2_E), HIDDEN)
    now = jnp.maximum(highest, scores.max(1))
    shrink, weights = jnp.exp2(highest - now), jnp.exp2(scores - along(now, 0, scores))
    return weights, shrink, now, count * shrink + weights.sum(1)


def weights_again(scores, seen, highest, scale):
    """exp(s Q K' - m), zero where a query does not see a key; overflow there is discarded."""
    return jnp.where(seen, jnp.exp2(scores * (scale * LOG2_E) - highest), 0.0)
