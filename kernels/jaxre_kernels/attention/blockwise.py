"""Attention over packed rows in plain XLA: a block of queries looks at the keys near it and at the shared prefix.

Work grows with T x (prefix + back + Q), not with T x T, and memory with a block's part of that: the blocks of a row come
one after another, so that scores and weights stay in the cache (prefix of 352 of rows of 2,048 tokens: 0.67 of the processor
time of all blocks in one batched product, on two CPU cores). Few blocks begin far behind the start of an example: each
looks back no further than its tokens see, in steps of 64 (0.63 to 0.68 of the processor time of one width for all;
rows of 1,024 and 2,048 tokens, spans of 144 and 208, most examples near 80 tokens; 2026-11-21).

The backward pass keeps q, k, v and, per query and head, the highest score m and the sum l, and forms the weights again
(FlashAttention, Dao et al. 2022, algorithm 4). The log-sum-exp m + log l alone would do, but it is rounded as a score is,
not as a difference of scores: in a network with large scores that doubled the f32 error of the gradients.
With E = exp(s Q K' - m), dE = (dO / l) V' and
dS = E (dE - rowsum(E dE) / l):

    dV = E' (dO / l),    dQ = s dS K,    dK = s dS' Q

Letters: B rows, T tokens in a row, H query heads, K key/value heads, G = H/K, C head channels, N blocks of Q queries,
M = Q x G queries of a block and key head, U = prefix + back + Q keys that a block looks at at most, L = back + N x Q places of
keys laid out for the blocks: zeros before and behind the row.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

STEP = 64


class Blocks(NamedTuple):
    """Queries [nQ, nQ + Q) look at keys [0, prefix) and [nQ - back, nQ + Q). One block of Q = T is dense attention."""

    queries: int
    back: int = 0
    prefix: int = 0

    @property
    def backs(self) -> tuple[int, ...]:
        """How far back a block may look, ascending."""
        return (*range(STEP, self.back, STEP), self.back)


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
    keys, values, until, widths, zero = _lay_all_out(k, v, visible_until, blocks)

    def attend(back, n, queries):
        scores = _scores(queries, _at(keys, n, blocks, back), _visible(until, n, queries, blocks, back))
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        sums = _product("bkmu,bkuc->bkmc", weights.astype(q.dtype), _at(values, n, blocks, back))
        return (sums / total).astype(q.dtype), highest, total

    def block(n, one):
        width, queries = one
        return n + 1, _looking_back(attend, width, blocks, n, queries)

    each = widths, _cut_queries(q, k.shape[2], blocks)
    _, (out, highest, total) = jax.lax.scan(block, zero, each)
    return _join_queries(out, blocks, q), (q, k, v, visible_until, highest, total)


def _backward(blocks, kept, dout):
    q, k, v, visible_until, highest, total = kept
    keys, values, until, widths, zero = _lay_all_out(k, v, visible_until, blocks)

    def gradients(back, n, queries, dout, highest, total):
        near_keys = _at(keys, n, blocks, back)
        dsums = (dout / total).astype(q.dtype)  # dividing dO is less work than dividing weights
        weights = jnp.exp(_scores(queries, near_keys, _visible(until, n, queries, blocks, back)) - highest)
        dweights = _product("bkmc,bkuc->bkmu", dsums, _at(values, n, blocks, back))
        mean = (weights * dweights).sum(-1, keepdims=True) / total
        dscores = (weights * (dweights - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
        dqueries = _product("bkmu,bkuc->bkmc", dscores, near_keys).astype(q.dtype)
        return dqueries, *(_part(*pair, blocks, back) for pair in ((queries, dscores), (dsums, weights.astype(q.dtype))))

    def block(carry, one):
        n, dkeys, dvalues = carry
        width, *operands = one
        dqueries, keys_part, values_part = _looking_back(gradients, width, blocks, n, *operands)
        return (n + 1, _added(dkeys, keys_part, n, blocks), _added(dvalues, values_part, n, blocks)), dqueries

    zeros = jnp.zeros(keys.shape, jnp.promote_types(q.dtype, jnp.float32))
    each = widths, *(_cut_queries(array, k.shape[2], blocks) for array in (q, dout)), highest, total
    (_, dkeys, dvalues), dqueries = jax.lax.scan(block, (zero, zeros, zeros), each)
    dk, dv = (
        array[:, :, blocks.back : blocks.back + k.shape[1]].transpose(0, 2, 1, 3).astype(like.dtype)
        for array, like in ((dkeys, k), (dvalues, v))
    )
    return _join_queries(dqueries, blocks, q), dk, dv, None


blockwise_attention.defvjp(_forward, _backward)


def _widths(visible_until, blocks):
    """[N] int32: which of `blocks.backs` holds all that a block sees of any row before its own tokens and behind the prefix."""
    T = visible_until.shape[1]
    first, key = jnp.arange(0, T, blocks.queries)[:, None], jnp.arange(T)
    seen = (visible_until[:, None] > first) & (key >= blocks.prefix) & (key < first)  # B N T
    back = jnp.where(seen, first - key, 0).max((0, 2))
    return (back[:, None] > jnp.array(blocks.backs)).sum(1, dtype=jnp.int32)


def _looking_back(run, width, blocks, *operands):
    """`run(back, *operands)` with `back = blocks.backs[width]` on a CPU. Elsewhere the widest: not measured there."""
    if len(blocks.backs) == 1:
        return run(blocks.back, *operands)

    def narrowest(width, *operands):
        return jax.lax.switch(width, [partial(run, back) for back in blocks.backs], *operands)

    def widest(width, *operands):
        return run(blocks.back, *operands)

    return jax.lax.platform_dependent(width, *operands, cpu=narrowest, default=widest)


def _product(letters, one, other):
    return jnp.einsum(letters, one, other, preferred_element_type=jnp.promote_types(one.dtype, jnp.float32))


def _scores(queries, keys, visible):
    """[B, K, M, U], the lowest number where a query does not see a key."""
    scores = _product("bkmc,bkuc->bkmu", queries, keys) * queries.shape[-1] ** -0.5
    return jnp.where(visible, scores, jnp.finfo(scores.dtype).min)


def _visible(until, n, queries, blocks, back):
    """[B, 1, M, U] bool of block n. A near key that belongs to the prefix counts there alone."""
    row, first = jnp.arange(until.shape[2])[None, None, :, None] - blocks.back, n * blocks.queries
    query = first + jnp.repeat(jnp.arange(blocks.queries), queries.shape[2] // blocks.queries)[:, None]  # M 1
    # Outside the row `until` is zero, and no query sees such a key.
    key, until = (_at(array, n, blocks, back)[..., None, :, 0] for array in (row, until))  # B 1 1 U
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
    """Keys, values and `visible_until` laid out, how far back each block looks, and the number of the first block.

    A mask hangs on no layer: without the barrier JAX would form those of all blocks before a scan over layers, and keep them.
    """
    k, visible_until, zero = jax.lax.optimization_barrier((k, visible_until, jnp.int32(0)))
    return *(_lay_out(array, blocks) for array in (k, v, visible_until[..., None, None])), _widths(visible_until, blocks), zero


def _lay_out(array, blocks):
    """[B, T, K, C] -> [B, K, L, C]."""
    behind = -array.shape[1] % blocks.queries
    return jnp.pad(array.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (blocks.back, behind), (0, 0)))


def _at(laid_out, n, blocks, back):
    """[B, K, L, C] -> [B, K, prefix + back + Q, C]: the prefix, then what is near block n."""
    near = jax.lax.dynamic_slice_in_dim(laid_out, n * blocks.queries + blocks.back - back, back + blocks.queries, axis=2)
    if not blocks.prefix:
        return near
    return jnp.concatenate([laid_out[:, :, blocks.back : blocks.back + blocks.prefix], near], axis=2)


def _part(queries, scores, blocks, back):
    """[B, K, U, C]: scores [B, K, M, prefix + back + Q] times queries [B, K, M, C], zeros where a block did not look."""
    # As [C, U]: on a CPU the first operand of a sum over queries is transposed in memory, and C is the narrow side. Without
    # the barrier the compiler would turn the product around again.
    part = jax.lax.optimization_barrier(_product("bkmc,bkmu->bkcu", queries, scores)).swapaxes(-1, -2)
    near = jnp.pad(part[:, :, blocks.prefix :], ((0, 0), (0, 0), (blocks.back - back, 0), (0, 0)))
    return jnp.concatenate([part[:, :, : blocks.prefix], near], axis=2)


def _added(total, part, n, blocks):
    """total [B, K, L, C] with part [B, K, U, C] of block n added where its keys are."""
    if blocks.prefix:
        total = total.at[:, :, blocks.back : blocks.back + blocks.prefix].add(part[:, :, : blocks.prefix])
    first, width = n * blocks.queries, blocks.back + blocks.queries
    near = jax.lax.dynamic_slice_in_dim(total, first, width, axis=2) + part[:, :, blocks.prefix :]
    return jax.lax.dynamic_update_slice_in_dim(total, near, first, axis=2)
