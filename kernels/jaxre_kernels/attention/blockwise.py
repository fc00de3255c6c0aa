"""Attention over packed rows in plain XLA: a block of queries looks at the keys near it and at the shared prefix.

Work grows with T x (prefix + back + Q), not with T x T, and memory with a block's part of that: the blocks of a row come
one after another, so that scores and weights stay in the cache (prefix of 352 of rows of 2,048 tokens: 0.67 of the processor
time of all blocks in one batched product, on two CPU cores). The backward pass keeps q, k, v and, per query and head, the
highest score m and the sum l, and forms the weights again (FlashAttention, Dao et al. 2022, algorithm 4). The log-sum-exp
m + log l alone would do, but it is rounded as a score is, not as a difference of scores: in a network with large
scores that doubled the f32 error of the gradients. With E = exp(s Q K' - m), dE = (dO / l) V' and
dS = E (dE - rowsum(E dE) / l):

    dV = E' (dO / l),    dQ = s dS K,    dK = s dS' Q

Letters: B rows, T tokens in a row, H query heads, K key/value heads, G = H/K, C head channels, N blocks of Q queries,
M = Q x G queries of a block and key head, U = prefix + back + Q keys that a block looks at, L = back + N x Q places of
keys laid out for the blocks: zeros before and behind the row.
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
    keys, values, until, zero = _lay_all_out(k, v, visible_until, blocks)

    def block(n, queries):
        scores = _scores(queries, _at(keys, n, blocks), _visible(until, n, queries, blocks))
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        sums = _product("bkmu,bkuc->bkmc", weights.astype(q.dtype), _at(values, n, blocks))
        return n + 1, ((sums / total).astype(q.dtype), highest, total)

    _, (out, highest, total) = jax.lax.scan(block, zero, _cut_queries(q, k.shape[2], blocks))
    return _join_queries(out, blocks, q), (q, k, v, visible_until, highest, total)


def _backward(blocks, kept, dout):
    q, k, v, visible_until, highest, total = kept
    keys, values, until, zero = _lay_all_out(k, v, visible_until, blocks)

    def block(carry, one):
        n, dkeys, dvalues = carry
        queries, dout, highest, total = one
        near_keys = _at(keys, n, blocks)
        dsums = (dout / total).astype(q.dtype)  # dividing dO is less work than dividing weights
        weights = jnp.exp(_scores(queries, near_keys, _visible(until, n, queries, blocks)) - highest)
        dweights = _product("bkmc,bkuc->bkmu", dsums, _at(values, n, blocks))
        mean = (weights * dweights).sum(-1, keepdims=True) / total
        dscores = (weights * (dweights - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
        dqueries = _product("bkmu,bkuc->bkmc", dscores, near_keys).astype(q.dtype)
        return (n + 1, _added(dkeys, queries, dscores, n, blocks), _added(dvalues, dsums, weights.astype(q.dtype), n, blocks)), dqueries

    zeros = jnp.zeros(keys.shape, jnp.promote_types(q.dtype, jnp.float32))
    each = (*(_cut_queries(array, k.shape[2], blocks) for array in (q, dout)), highest, total)
    (_, dkeys, dvalues), dqueries = jax.lax.scan(block, (zero, zeros, zeros), each)
    dk, dv = (
        array[:, :, blocks.back : blocks.back + k.shape[1]].transpose(0, 2, 1, 3).astype(like.dtype)
        for array, like in ((dkeys, k), (dvalues, v))
    )
    return _join_queries(dqueries, blocks, q), dk, dv, None


blockwise_attention.defvjp(_forward, _backward)


def _product(letters, one, other):
    return jnp.einsum(letters, one, other, preferred_element_type=jnp.promote_types(one.dtype, jnp.float32))


def _scores(queries, keys, visible):
    """[B, K, M, U], the lowest number where a query does not see a key."""
    scores = _product("bkmc,bkuc->bkmu", queries, keys) * queries.shape[-1] ** -0.5
    return jnp.where(visible, scores, jnp.finfo(scores.dtype).min)


def _visible(until, n, queries, blocks):
    """[B, 1, M, U] bool of block n. A near key that belongs to the prefix counts there alone."""
    row, first = jnp.arange(until.shape[2])[None, None, :, None] - blocks.back, n * blocks.queries
    query = first + jnp.repeat(jnp.arange(blocks.queries), queries.shape[2] // blocks.queries)[:, None]  # M 1
    # Outside the row `until` is zero, and no query sees such a key.
    key, until = (_at(array, n, blocks)[..., None, :, 0] for array in (row, until))  # B 1 1 U
    apart = jnp.arange(key.shape[-1]) < blocks.prefix  # the copy of the prefix, before the near keys
    return ((key >= blocks.prefix) | apart) & (key <= query) & (query < until)


def _cut_queries(array, kv_heads, blocks):
    """[B, T, H, C] -> [N, B, K, M, C], zeros behind the row."""
    B, T, H, C = array.shape
    padded = jnp.pad(array, ((0, 0), (0, -T % blocks.queries), (0, 0), (0, 0)))
    cut = padded.reshape(B, -1, blocks.queries, kv_heads, H // kv_heads, C).transpose(1, 0, 3, 2, 4, 5)
    return cut.reshape(*cut.shape[:3], -1, C)


def _join_queries(array, blocks, like):
    """[N, B, K, M, C] -> [B, T, H, C], the shape of `like`."""
    B, T, H, C = like.shape
    whole = array.reshape(*array.shape[:3], blocks.queries, -1, C).transpose(1, 0, 3, 2, 4, 5)
    return whole.reshape(B, -1, H, C)[:, :T]


def _lay_all_out(k, v, visible_until, blocks):
    """Keys, values and `visible_until` laid out, and the number of the first block.

    A mask hangs on no layer: without the barrier JAX would form those of all blocks before a scan over layers, and keep them.
    """
    k, visible_until, zero = jax.lax.optimization_barrier((k, visible_until, jnp.int32(0)))
    return *(_lay_out(array, blocks) for array in (k, v, visible_until[..., None, None])), zero


def _lay_out(array, blocks):
    """[B, T, K, C] -> [B, K, L, C]."""
    behind = -array.shape[1] % blocks.queries
    return jnp.pad(array.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (blocks.back, behind), (0, 0)))


def _at(laid_out, n, blocks):
    """[B, K, L, C] -> [B, K, U, C]: the prefix, then what is near block n."""
    near = jax.lax.dynamic_slice_in_dim(laid_out, n * blocks.queries, blocks.back + blocks.queries, axis=2)
    if not blocks.prefix:
        return near
    return jnp.concatenate([laid_out[:, :, blocks.back : blocks.back + blocks.prefix], near], axis=2)


def _added(total, queries, scores, n, blocks):
    """total [B, K, L, C] with scores [B, K, M, U] times queries [B, K, M, C] of block n added where its keys are."""
    # As [C, U]: on a CPU the first operand of a sum over queries is transposed in memory, and C is the narrow side. Without
    # the barrier the compiler would turn the product around again.
    part = jax.lax.optimization_barrier(_product("bkmc,bkmu->bkcu", queries, scores)).swapaxes(-1, -2)
    if blocks.prefix:
        total = total.at[:, :, blocks.back : blocks.back + blocks.prefix].add(part[:, :, : blocks.prefix])
    first, width = n * blocks.queries, blocks.back + blocks.queries
    near = jax.lax.dynamic_slice_in_dim(total, first, width, axis=2) + part[:, :, blocks.prefix :]
    return jax.lax.dynamic_update_slice_in_dim(total, near, first, axis=2)
