"""Attention over packed rows in plain XLA: a block of queries looks at the keys near it and at the shared prefix.

Work and memory grow with T x (prefix + back + Q), not with T x T. All blocks of a row are one batched
product, and one softmax runs over both parts. The backward pass keeps q, k, v and, per query and head, the highest
score m and the sum l, and forms the weights again (FlashAttention, Dao et al. 2022, algorithm 4). The log-sum-exp
m + log l alone would do, but it is rounded as a score is, not as a difference of scores: in a network with large
scores that doubled the f32 error of the gradients. With E = exp(s Q K' - m), dE = (dO / l) V' and
dS = E (dE - rowsum(E dE) / l):

    dV = E' (dO / l),    dQ = s dS K,    dK = s dS' Q

Letters: B rows, T tokens in a row, H query heads, K key/value heads, G = H/K, C head channels,
N blocks of Q queries, U keys of a part (near: Q + back; shared: prefix).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Einsum letters of the two parts' keys and values: near ones are cut for each block, shared ones are the same for all.
_PARTS = ("bknuc", "bkuc")


class Blocks(NamedTuple):
    """Queries [nQ, nQ + Q) look at keys [nQ - back, nQ + Q) and [0, prefix). One block of Q = T is dense attention."""

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
    queries, parts = _cut_queries(q, k.shape[2], blocks), _cut_keys(k, v, blocks)
    scores = _scores(queries, parts, visible_until, blocks)
    highest = _over_parts(jnp.maximum, [s.max(-1, keepdims=True) for s in scores])
    weights = [jnp.exp(s - highest) for s in scores]
    total = _over_parts(jnp.add, [w.sum(-1, keepdims=True) for w in weights])
    sums = [
        _product(f"bknqgu,{part}->bknqgc", w.astype(q.dtype), values) for part, w, (_, values) in zip(_PARTS, weights, parts, strict=False)
    ]
    return _join_queries(_over_parts(jnp.add, sums) / total, q), (q, k, v, visible_until, highest, total)


def _backward(blocks, kept, dout):
    q, k, v, visible_until, highest, total = kept
    queries = _cut_queries(q, k.shape[2], blocks)
    dsums = (_cut_queries(dout, k.shape[2], blocks) / total).astype(q.dtype)  # dividing dO is less work than dividing weights
    parts, join_keys = jax.vjp(partial(_cut_keys, blocks=blocks), k, v)
    weights = [jnp.exp(s - highest) for s in _scores(queries, parts, visible_until, blocks)]
    dweights = [_product(f"bknqgc,{part}->bknqgu", dsums, values) for part, (_, values) in zip(_PARTS, parts, strict=False)]
    mean = _over_parts(jnp.add, [(w * dw).sum(-1, keepdims=True) for w, dw in zip(weights, dweights, strict=True)]) / total
    dqueries, dparts = [], []
    for part, (keys, _), w, dw in zip(_PARTS, parts, weights, dweights, strict=False):
        dscores = (w * (dw - mean) * q.shape[-1] ** -0.5).astype(q.dtype)
        dqueries.append(_product(f"bknqgu,{part}->bknqgc", dscores, keys))
        dkeys = _product(f"bknqgu,bknqgc->{part}", dscores, queries)
        dvalues = _product(f"bknqgu,bknqgc->{part}", w.astype(q.dtype), dsums)
        dparts.append((dkeys.astype(k.dtype), dvalues.astype(v.dtype)))
    return _join_queries(_over_parts(jnp.add, dqueries), q), *join_keys(dparts), None


blockwise_attention.defvjp(_forward, _backward)


def _over_parts(combine, values):
    return values[0] if len(values) == 1 else combine(*values)


def _product(letters, one, other):
    return jnp.einsum(letters, one, other, preferred_element_type=jnp.promote_types(one.dtype, jnp.float32))


def _scores(queries, parts, visible_until, blocks):
    """Of each part [B, K, N, Q, G, U], the lowest number where a query does not see a key."""
    scale = queries.shape[-1] ** -0.5
    return [
        jnp.where(seen[:, None, :, :, None], scores * scale, jnp.finfo(scores.dtype).min)
        for seen, scores in zip(
            _visible(visible_until, blocks),
            (_product(f"bknqgc,{part}->bknqgu", queries, keys) for part, (keys, _) in zip(_PARTS, parts, strict=False)),
            strict=True,
        )
    ]


def _visible(visible_until, blocks):
    """Of each part [B, N, Q, U] bool, or [B, 1, ...]. A key of the prefix counts in the shared part alone."""
    T = visible_until.shape[1]
    index = jnp.arange(-(-T // blocks.queries) * blocks.queries).reshape(1, -1, blocks.queries, 1)  # 1 N Q 1
    near = _windows(visible_until[..., None], blocks)[..., None, :, 0]  # B N 1 U, zero outside the row
    key = _windows(jnp.arange(T)[None, :, None], blocks)[..., None, :, 0]
    seen = [(key <= index) & (index < near) & (key >= blocks.prefix)]
    if blocks.prefix:
        key = jnp.arange(blocks.prefix)
        seen.append((key <= index) & (index < visible_until[:, None, None, : blocks.prefix]))
    return seen


def _cut_queries(array, kv_heads, blocks):
    """[B, T, H, C] -> [B, K, N, Q, G, C], zeros behind the row."""
    B, T, H, C = array.shape
    padded = jnp.pad(array, ((0, 0), (0, -T % blocks.queries), (0, 0), (0, 0)))
    return padded.reshape(B, -1, blocks.queries, kv_heads, H // kv_heads, C).transpose(0, 3, 1, 2, 4, 5)


def _join_queries(array, like):
    """[B, K, N, Q, G, C] -> shape and dtype of `like`, [B, T, H, C]."""
    B, T, H, C = like.shape
    return array.transpose(0, 2, 3, 1, 4, 5).reshape(B, -1, H, C)[:, :T].astype(like.dtype)


def _cut_keys(k, v, blocks):
    """(keys, values) of each part: near [B, K, N, U, C], and shared [B, K, U, C] if there is a prefix."""
    k, v = (array.transpose(0, 2, 1, 3) for array in (k, v))  # B K T C
    parts = [tuple(_windows(array, blocks) for array in (k, v))]
    if blocks.prefix:
        parts.append((k[:, :, : blocks.prefix], v[:, :, : blocks.prefix]))
    return parts


def _windows(array, blocks):
    """[..., T, C] -> [..., N, back + Q, C]: what each block looks at, zeros outside the row.

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
