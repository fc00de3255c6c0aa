"""Attention over packed rows in plain XLA: each block of queries looks at nearby keys and at the
shared prefix.

Work grows with T x (prefix + back + Q), not with T x T. On a CPU the blocks of a row run one after
another, so scores and weights stay in the cache (prefix of 352 of rows of 2,048 tokens: 0.67 of the
processor time of all blocks in one batched product, on two CPU cores). Few blocks begin far behind
the start of an example: each looks back no further than its tokens see, in steps of 64 (0.63 to
0.68 of the processor time of one width for all; rows of 1,024 and 2,048 tokens, spans of 144 and
208, most examples near 80 tokens; 2026-11-21). On other platforms as many blocks as AT_ONCE allows
are one batched product: run one after another, they would be many programs so small that starting
them takes longer than running them. (Compiled for an H200 with jax 0.11.2, an update of
Qwen2.5-0.5B on 1,280 tokens starts 4,600 programs, and 12,000 with its blocks one after another;
not timed.)

The backward pass stores q, k, v and, per query and head, the highest score m and the sum l, and
recomputes the weights (FlashAttention, Dao et al. 2022, algorithm 4). The log-sum-exp m + log l
alone would suffice, but it is rounded as a score is, not as a difference of scores: in a network
with large scores that doubled the f32 error of the gradients. With E = exp(s Q K' - m),
dE = (dO / l) V' and dS = E (dE - rowsum(E dE) / l):

    dV = E' (dO / l),    dQ = s dS K,    dK = s dS' Q

Memory: stores q, k, v and two f32 numbers a query and head, where autodiff of dense attention
stores T weights each. At any time there are S B H Q U scores in f32 (at least), in the backward
pass their gradients too, and copies of k and v (and of dk and dv in f32) laid out for the blocks.

Roofline of one block of one key head, with G = H / K; in bf16, where scores and their gradients
pass through memory in f32, and weights in bf16:

                FLOPs                               bytes: scores    q, k, v, results
    forward      4 M U C    (S, O)                  16 M U           4 (M + U) C
    backward    10 M U C    (S, dE, dQ, dK, dV)     34 M U           6 M C + 12 U C

That is 16 and 32 FLOP a byte forward with C = 64 and 128, and 19 and 38 backward. An H200 needs
206 by its datasheet, so there it is memory-bound by the scores, 6 to 13 times; a kernel keeps them
on the chip. On a CPU the scores of a block stay in the cache, so products and exponentials bound
it. M U counts all keys looked at, visible or not.

Letters: B rows, T tokens in a row, H query heads, K key/value heads, C head channels, N times S
blocks of Q queries, S of them at once, R = S x B, M = Q x H / K queries of a block and key head, U
= prefix + back + Q keys that a block looks at (at most), L = back + N x S x Q places of keys laid
out for the blocks, with zeros before and behind the row.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxre_kernels.attention.parts import Part, joint_attention
from jaxre_kernels.attention.reference import Window
from jaxre_kernels.linear import packed, unpacked

STEP = 64
# Scores of a batched product, where they need not stay in a cache: 256 MiB in f32. The backward
# pass holds four such arrays.
AT_ONCE = 2**26


class Blocks(NamedTuple):
    """Queries [nQ, nQ + Q) look at keys [0, prefix) and [nQ - back, nQ + Q). One block of Q = T is
    dense attention.
    """

    queries: int
    back: int = 0
    prefix: int = 0

    @property
    def backs(self) -> tuple[int, ...]:
        """Distances that a block may look back, ascending."""
        return (*range(STEP, self.back, STEP), self.back)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_until: jax.Array,
    blocks: Blocks,
    window: Window | None = None,
) -> jax.Array:
    """Softmax attention in which token i sees token j exactly when `j <= i < visible_until[j]` and
    j is within the window, if there is one; softmax in f32 (at least).

    Args:
      q: [B, T, H, C] float; k, v: [B, T, K, C] of q's dtype, or bf16 beside f32 (then products are
        in bf16, summed in f32); visible_until: [B, T] int32.
      blocks: where to look; must cover every visible pair. A window hides pairs but saves no work.

    Returns:
      [B, T, H, C] of q's dtype.
    """
    return _forward(q, k, v, visible_until, blocks, window)[0]


def attention_behind(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_until: jax.Array,
    blocks: Blocks,
    before: Part,
    window: Window | None = None,
) -> jax.Array:
    """`blockwise_attention` of rows whose tokens also see what comes `before` them: keys [K, P, C]
    that all rows share. For prediction; without a backward pass of its own.
    """
    return _by_platform(_attend_behind, blocks, q, k, v, visible_until, window, before)


class Order(NamedTuple):
    """A platform's schedule of blocks: how many at once, and the distances these may look back,
    ascending.
    """

    at_once: int
    backs: tuple[int, ...]


def _orders(q, blocks):
    """Two orders of work: for a CPU, and for any other device."""
    B, T, H, _ = q.shape
    number, scores = (
        -(-T // blocks.queries),
        B * H * blocks.queries * (blocks.prefix + blocks.back + blocks.queries),
    )
    steps = -(-number // max(1, AT_ONCE // scores))
    return Order(1, blocks.backs), Order(-(-number // steps), (blocks.back,))


def _by_platform(run, blocks, q, *arrays):
    cpu, other = (partial(run, blocks, order) for order in _orders(q, blocks))
    return jax.lax.platform_dependent(q, *arrays, cpu=cpu, default=other)


def _forward(q, k, v, visible_until, blocks, window):
    out, *statistics = _by_platform(_attend, blocks, q, k, v, visible_until, window)
    stored = (packed(array.astype(q.dtype), k.dtype) for array in (q, k, v))
    return out, (*stored, visible_until, window, *statistics)


def _backward(blocks, residuals, dout):
    q, k, v, *rest = residuals
    if k.dtype == jnp.uint16:
        k, v = (unpacked(array, jnp.bfloat16) for array in (k, v))
        q = unpacked(q, k.dtype).astype(dout.dtype)
    return *_by_platform(_gradients, blocks, q, k, v, *rest, dout), None, None


blockwise_attention.defvjp(_forward, _backward)


def _attend(blocks, order, q, k, v, visible_until, window):
    """Attention [B, T, H, C], and each query's highest score and sum [B, T, H, 1]."""
    keys, values, seen, widths, zero = _lay_all_out(k, v, visible_until, window, blocks, order)

    def attend(back, n, queries):
        scores = _scores(
            queries,
            _at(keys, n, blocks, order, back),
            _visible(seen, n, queries, blocks, order, back),
        )
        highest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - highest)
        total = weights.sum(-1, keepdims=True)
        sums = _product(
            "rkmu,rkuc->rkmc", weights.astype(v.dtype), _at(values, n, blocks, order, back)
        )
        return (sums / total).astype(q.dtype), highest, total

    def step(n, cut):
        width, queries = cut
        return n + 1, _looking_back(attend, width, order, n, queries)

    _, parts = jax.lax.scan(step, zero, (widths, _cut(q, k.shape[2], blocks, order)))
    return tuple(_joined(array, q, blocks, order) for array in parts)


def _attend_behind(blocks, order, q, k, v, visible_until, window, before):
    """Attention [B, T, H, C] of each block and of what comes before its row."""
    keys, values, seen, widths, zero = _lay_all_out(k, v, visible_until, window, blocks, order)

    def attend(back, n, queries):
        own = Part(
            *(_at(array, n, blocks, order, back) for array in (keys, values)),
            _visible(seen, n, queries, blocks, order, back),
        )
        first = before
        if window is not None:
            positions = _query_positions(seen[1], n, queries, blocks, order, back)
            first = before.within(Window(positions, window.length))
        return joint_attention(queries, [first, own])

    def step(n, cut):
        width, queries = cut
        return n + 1, _looking_back(attend, width, order, n, queries)

    _, parts = jax.lax.scan(step, zero, (widths, _cut(q, k.shape[2], blocks, order)))
    return _joined(parts, q, blocks, order)


def _gradients(blocks, order, q, k, v, visible_until, window, highest, total, dout):
    keys, values, seen, widths, zero = _lay_all_out(k, v, visible_until, window, blocks, order)

    def gradients(back, n, queries, dout, highest, total):
        near_keys = _at(keys, n, blocks, order, back)
        dsums = (dout / total).astype(q.dtype)  # dividing dO is less work than dividing weights
        weights = jnp.exp(
            _scores(queries, near_keys, _visible(seen, n, queries, blocks, order, back)) - highest
        )
        dweights = _product("rkmc,rkuc->rkmu", dsums, _at(values, n, blocks, order, back))
        mean = (weights * dweights).sum(-1, keepdims=True) / total
        dscores = (weights * (dweights - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
        dqueries = _product("rkmu,rkuc->rkmc", dscores, near_keys).astype(q.dtype)
        return dqueries, *(
            _part(*pair, blocks, back)
            for pair in ((queries, dscores), (dsums, weights.astype(q.dtype)))
        )

    def step(carry, inputs):
        n, dkeys, dvalues = carry
        width, *operands = inputs
        dqueries, keys_part, values_part = _looking_back(gradients, width, order, n, *operands)
        return (
            n + 1,
            _added(dkeys, keys_part, n, blocks, order),
            _added(dvalues, values_part, n, blocks, order),
        ), dqueries

    zeros = jnp.zeros(keys.shape, jnp.promote_types(q.dtype, jnp.float32))
    # Behind the row the sums are 1 rather than 0: the zeros there are divided by them.
    cut = (
        _cut(array, k.shape[2], blocks, order, fill)
        for array, fill in ((q, 0), (dout, 0), (highest, 0), (total, 1))
    )
    (_, dkeys, dvalues), dqueries = jax.lax.scan(step, (zero, zeros, zeros), (widths, *cut))
    dk, dv = (
        array[:, :, blocks.back : blocks.back + k.shape[1]].transpose(0, 2, 1, 3).astype(like.dtype)
        for array, like in ((dkeys, k), (dvalues, v))
    )
    return _joined(dqueries, q, blocks, order), dk, dv


def _widths(visible_until, blocks, order):
    """[N] int32: index into `order.backs` of the least distance that covers everything the blocks
    of a step see, in any row, between the prefix and their own tokens.
    """
    T, Q = visible_until.shape[1], blocks.queries
    first, key = jnp.arange(0, T, Q)[:, None], jnp.arange(T)
    if len(order.backs) == 1:
        return jnp.zeros(-(-T // (Q * order.at_once)), jnp.int32)
    seen = (visible_until[:, None] > first) & (key >= blocks.prefix) & (key < first)  # B N T
    back = jnp.where(seen, first - key, 0).max((0, 2))
    return (back[:, None] > jnp.array(order.backs)).sum(1, dtype=jnp.int32)


def _looking_back(run, width, order, *operands):
    """`run(back, *operands)` with `back = order.backs[width]`."""
    if len(order.backs) == 1:
        return run(*order.backs, *operands)
    return jax.lax.switch(width, [partial(run, back) for back in order.backs], *operands)


def _product(letters, x, y):
    """Product in y's dtype, summed in f32 (at least)."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(letters, x.astype(y.dtype), y, preferred_element_type=wide)


def _scores(queries, keys, visible):
    """[R, K, M, U]; the lowest number where a query does not see a key."""
    scores = _product("rkmc,rkuc->rkmu", queries, keys) * queries.shape[-1] ** -0.5
    return jnp.where(visible, scores, jnp.finfo(scores.dtype).min)


def _visible(seen, n, queries, blocks, order, back):
    """[R, 1, M, U] bool of step n. A near key within the prefix counts only in the prefix copy."""
    until, window = seen
    rows = until.shape[0]
    row = jnp.broadcast_to(jnp.arange(until.shape[2])[:, None] - blocks.back, until.shape)
    first = (n * order.at_once + jnp.repeat(jnp.arange(order.at_once), rows)) * blocks.queries  # R
    within = jnp.repeat(jnp.arange(blocks.queries), queries.shape[2] // blocks.queries)  # M
    query = first[:, None, None, None] + within[:, None]  # R 1 M 1
    # Outside the row `until` is zero, so no query sees such a key.
    # R 1 1 U
    key, until = (_at(array, n, blocks, order, back)[..., None, :, 0] for array in (row, until))
    in_prefix_copy = jnp.arange(key.shape[-1]) < blocks.prefix  # it precedes the near keys
    visible = ((key >= blocks.prefix) | in_prefix_copy) & (key <= query) & (query < until)
    if window is None:
        return visible
    position = _at(window.positions, n, blocks, order, back)[..., None, :, 0]  # R 1 1 U
    query_position = _query_positions(window, n, queries, blocks, order, back)  # R M
    return visible & (query_position[:, None, :, None] - position < window.length)


def _query_positions(window, n, queries, blocks, order, back):
    """[R, M] positions of the queries of step n."""
    near = _at(window.positions, n, blocks, order, back)[:, 0, :, 0]  # R U
    own = near[:, -blocks.queries :]  # R Q: a block's last keys are its own tokens'
    return jnp.repeat(own, queries.shape[2] // blocks.queries, axis=-1)


def _cut(array, kv_heads, blocks, order, fill=0):
    """[B, T, H, C] -> [N, R, K, M, C], `fill` behind the row."""
    B, T, H, C = array.shape
    S, Q = order.at_once, blocks.queries
    padded = jnp.pad(array, ((0, 0), (0, -T % (S * Q)), (0, 0), (0, 0)), constant_values=fill)
    cut = padded.reshape(B, -1, S, Q, kv_heads, H // kv_heads, C).transpose(1, 2, 0, 4, 3, 5, 6)
    return cut.reshape(-1, S * B, kv_heads, Q * H // kv_heads, C)


def _joined(array, like, blocks, order):
    """[N, R, K, M, C] -> [B, T, H, C], of `like`'s B, T and H."""
    B, T, H, _ = like.shape
    N, _, K, _, C = array.shape
    rows = array.reshape(N, order.at_once, B, K, blocks.queries, H // K, C).transpose(
        2, 0, 1, 4, 3, 5, 6
    )
    return rows.reshape(B, -1, H, C)[:, :T]


def _lay_all_out(k, v, visible_until, window, blocks, order):
    """Lays out keys, values, `visible_until` and the window's positions; also returns how far back
    each step looks, and the number of the first step.

    A mask is the same in every layer: without the barrier JAX would form the masks of all blocks
    before a scan over layers, and store them.
    """
    k, visible_until, window, zero = jax.lax.optimization_barrier(
        (k, visible_until, window, jnp.int32(0))
    )
    keys, values, until = (
        _lay_out(array, blocks, order) for array in (k, v, visible_until[..., None, None])
    )
    if window is not None:
        positions = _lay_out(window.positions[..., None, None], blocks, order)
        window = window._replace(positions=positions)
    return keys, values, (until, window), _widths(visible_until, blocks, order), zero


def _lay_out(array, blocks, order):
    """[B, T, K, C] -> [B, K, L, C]."""
    behind = -array.shape[1] % (order.at_once * blocks.queries)
    return jnp.pad(array.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (blocks.back, behind), (0, 0)))


def _at(laid_out, n, blocks, order, back):
    """[B, K, L, C] -> [R, K, prefix + back + Q, C]: the prefix, then the keys near each block of
    step n.
    """
    width = order.at_once * blocks.queries
    near = _windows(
        jax.lax.dynamic_slice_in_dim(
            laid_out, n * width + blocks.back - back, back + width, axis=2
        ),
        order,
        back,
    )
    if not blocks.prefix:
        return near
    prefix = laid_out[:, :, blocks.back : blocks.back + blocks.prefix]
    return jnp.concatenate([jnp.concatenate([prefix] * order.at_once), near], axis=2)


def _windows(near, order, back):
    """[B, K, back + S Q, C] -> [R, K, back + Q, C]: for each of S blocks its own keys and the
    `back` before them.
    """
    S = order.at_once
    if S == 1:
        return near
    B, K, length, C = near.shape
    Q = (length - back) // S
    cut = jnp.pad(near, ((0, 0), (0, 0), (-back % Q, 0), (0, 0))).reshape(B, K, -1, Q, C)
    pieces = [cut[:, :, place : place + S] for place in range(cut.shape[2] - S + 1)]
    pieces[0] = pieces[0][..., -back % Q :, :]
    return jnp.concatenate(pieces, axis=3).transpose(2, 0, 1, 3, 4).reshape(S * B, K, back + Q, C)


def _part(queries, scores, blocks, back):
    """[R, K, U, C]: scores [R, K, M, prefix + back + Q] times queries [R, K, M, C]; zero where a
    block did not look.
    """
    # As [C, U]: a CPU transposes the first operand of a sum over queries in memory, and C is the
    # narrow side. Without the barrier the compiler would swap the operands again.
    part = jax.lax.optimization_barrier(_product("rkmc,rkmu->rkcu", queries, scores)).swapaxes(
        -1, -2
    )
    near = jnp.pad(part[:, :, blocks.prefix :], ((0, 0), (0, 0), (blocks.back - back, 0), (0, 0)))
    return jnp.concatenate([part[:, :, : blocks.prefix], near], axis=2)


def _added(total, part, n, blocks, order):
    """total [B, K, L, C] plus part [R, K, U, C] of step n, added at its keys."""
    B, K, _, C = total.shape
    if blocks.prefix:
        prefix = part[:, :, : blocks.prefix].reshape(order.at_once, B, K, blocks.prefix, C).sum(0)
        total = total.at[:, :, blocks.back : blocks.back + blocks.prefix].add(prefix)
    width = order.at_once * blocks.queries
    near = jax.lax.dynamic_slice_in_dim(total, n * width, blocks.back + width, axis=2)
    (added,) = jax.linear_transpose(partial(_windows, order=order, back=blocks.back), near)(
        part[:, :, blocks.prefix :]
    )
    return jax.lax.dynamic_update_slice_in_dim(total, near + added, n * width, axis=2)
