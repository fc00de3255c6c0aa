"""Attention over packed rows in plain XLA: a block of queries looks at the keys near it and at the shared prefix.

Work and memory grow with T x (prefix + back + Q), not with T x T. All blocks of a row are one batched product over the
prefix and the near keys side by side: the copy of the prefix for each block is small beside the scores, and a product, a
mask and a sum for each of the two took 1.3 (prefix of 32) to 1.1 (384) times the processor time. The backward pass
keeps q, k, v and, per query and head, the highest
score m and the sum l, and forms the weights again (FlashAttention, Dao et al. 2022, algorithm 4). The log-sum-exp
m + log l alone would do, but it is rounded as a score is, not as a difference of scores: in a network with large
scores that doubled the f32 error of the gradients. With E = exp(s Q K' - m), dE = (dO / l) V' and
dS = E (dE - rowsum(E dE) / l):

    dV = E' (dO / l),    dQ = s dS K,    dK = s dS' Q

Letters: B rows, T tokens in a row, H query heads, K key/value heads, G = H/K, C head channels,
N blocks of Q queries, M = Q x G queries of a
block and key head, U = prefix + back + Q keys that a block looks at.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Blocks(NamedTuple):
    """Queries [nQ, nQ + Q) look at keys [0, prefix) and [nQ - back, nQ + Q). One block of Q = T is dense attention."""

    queries: int
    back: int = 0
    prefix: int = 0


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, visible_until: jax.Array, blocks: Blocks) -> jax.Array:
    """Softmax attention in which token i sees token j exactly when `j <= i < visible_until[j]`; softmax in f32 (at least).

    Args:
      q: [B, T, H, C] float; k, v: [B, T, K, C] of q's dtype; visible_until: [B, T] int32.
      blocks: where to look; every visible pair must lie there.

    Returns:
      [B, T, H, C] of q's dtype.
    """
    return _forward(q, k, v, visible_until, blocks)[0]


def _forward(q, k, v, visible_until, blocks):
    queries, keys, values = _cut_queries(q, k.shape[2], blocks), _cut_keys(k, blocks), _cut_keys(v, blocks)
    scores = _scores(queries, keys, visible_until, blocks)
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(-1, keepdims=True)
    sums = _product("bknmu,bknuc->bknmc", weights.astype(q.dtype), values)
    return _join_queries(sums / total, blocks, q), (q, k, v, visible_until, highest, total)


def _backward(blocks, kept, dout):
    q, k, v, visible_until, highest, total = kept
    queries = _cut_queries(q, k.shape[2], blocks)
    keys, join_keys = jax.vjp(partial(_cut_keys, blocks=blocks), k)
    values, join_values = jax.vjp(partial(_cut_keys, blocks=blocks), v)
    dsums = (_cut_queries(dout, k.shape[2], blocks) / total).astype(q.dtype)  # dividing dO is less work than dividing weights
    weights = jnp.exp(_scores(queries, keys, visible_until, blocks) - highest)
    dweights = _product("bknmc,bknuc->bknmu", dsums, values)
    mean = (weights * dweights).sum(-1, keepdims=True) / total
    dscores = (weights * (dweights - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
    dqueries = _product("bknmu,bknuc->bknmc", dscores, keys)
    # As [C, U]: on a CPU the first operand of a sum over queries is transposed in memory, and C is the narrow side. Without
    # the barrier the compiler would turn the product around again.
    dkeys, dvalues = (
        jax.lax.optimization_barrier(_product("bknmc,bknmu->bkncu", one, other)).swapaxes(-1, -2).astype(q.dtype)
        for one, other in ((queries, dscores), (dsums, weights.astype(q.dtype)))
    )
    return _join_queries(dqueries, blocks, q), *join_keys(dkeys), *join_values(dvalues), None


blockwise_attention.defvjp(_forward, _backward)


def _product(letters, one, other):
    return jnp.einsum(letters, one, other, preferred_element_type=jnp.promote_types(one.dtype, jnp.float32))


def _scores(queries, keys, visible_until, blocks):
    """[B, K, N, M, U], the lowest number where a query does not see a key."""
    scores = _product("bknmc,bknuc->bknmu", queries, keys) * queries.shape[-1] ** -0.5
    return jnp.where(_visible(visible_until, queries.shape[3] // blocks.queries, blocks), scores, jnp.finfo(scores.dtype).min)


def _visible(visible_until, heads, blocks):
    """[B, 1, N, M, U] bool. A near key that belongs to the prefix counts there alone."""
    T = visible_until.shape[1]
    query = jnp.repeat(jnp.arange(-(-T // blocks.queries) * blocks.queries), heads).reshape(1, 1, -1, blocks.queries * heads, 1)
    # As keys of one head and one channel: B 1 N 1 U. Outside the row both are zero, and no query sees such a key.
    key, until = (
        _cut_keys(array[..., None, None], blocks)[..., None, :, 0] for array in (jnp.arange(T, dtype=jnp.int32)[None], visible_until)
    )
    apart = jnp.arange(key.shape[-1]) < blocks.prefix  # the copy of the prefix, before the near keys
    return ((key >= blocks.prefix) | apart) & (key <= query) & (query < until)


def _cut_queries(array, kv_heads, blocks):
    """[B, T, H, C] -> [B, K, N, M, C], zeros behind the row."""
    B, T, H, C = array.shape
    padded = jnp.pad(array, ((0, 0), (0, -T % blocks.queries), (0, 0), (0, 0)))
    cut = padded.reshape(B, -1, blocks.queries, kv_heads, H // kv_heads, C).transpose(0, 3, 1, 2, 4, 5)
    return cut.reshape(*cut.shape[:3], -1, C)


def _join_queries(array, blocks, like):
    """[B, K, N, M, C] -> shape and dtype of `like`, [B, T, H, C]."""
    B, T, H, C = like.shape
    whole = array.reshape(*array.shape[:3], blocks.queries, -1, C).transpose(0, 2, 3, 1, 4, 5)
    return whole.reshape(B, -1, H, C)[:, :T].astype(like.dtype)


def _cut_keys(array, blocks):
    """[B, T, K, C] -> [B, K, N, U, C]: the prefix, then what is near."""
    array = array.transpose(0, 2, 1, 3)  # B K T C
    near = _windows(array, blocks)
    if not blocks.prefix:
        return near
    prefix = jnp.broadcast_to(array[:, :, None, : blocks.prefix], (*near.shape[:3], blocks.prefix, near.shape[-1]))
    return jnp.concatenate([prefix, near], axis=-2)


def _windows(array, blocks):
    """[..., T, C] -> [..., N, back + Q, C]: what is near each block, zeros outside the row.

    Slices of the shifted row side by side; a gather of the same is slower both ways (its transpose is a scatter).
    """
    *lead, T, C = array.shape
    Q, width = blocks.queries, blocks.back + blocks.queries
    N = -(-T // Q)
    padded = jnp.pad(array, ((0, 0),) * len(lead) + ((blocks.back, -(-width // Q) * Q + N * Q - T), (0, 0)))
    pieces = [
        padded[..., start : start + N * Q, :].reshape(*lead, N, Q, C)[..., : min(Q, width - start), :] for start in range(0, width, Q)
    ]
    return jnp.concatenate(pieces, axis=-2)
