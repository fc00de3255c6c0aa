"""Dense attention under a mask: the oracle of every kernel, and the attention of encoders and of
decoding.

A row is a forest of prefix trees laid out depth first. Each node's subtree is one contiguous
stretch of the row, so one number per token defines visibility: token i sees token j exactly when
`j <= i < visible_until[j]`. A pad token j has `visible_until[j] = j + 1` and sees itself.

Letters: B rows, T tokens in a row, H query heads, K key/value heads, G = H/K, C head channels.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Window(NamedTuple):
    """A sliding window over positions: token i sees token j only if positions[i] - positions[j] <
    length, so a token sees `length` tokens, its own included.

    positions: [B, T] int32; length: [] int32. Behind a shared prefix, two tokens can be closer in
    position than in the row.
    """

    positions: jax.Array
    length: jax.Array | int


def visible_mask(
    visible_until: jax.Array, window: Window | None = None, queries: jax.Array | None = None
) -> jax.Array:
    """[B, T] int32 -> [B, T, T] bool; entry [b, i, j] is whether token i sees token j.

    With `queries` [B, S] int32, the row positions of some tokens: [B, S, T] for those alone.
    """
    index = jnp.arange(visible_until.shape[-1])
    query = index[None] if queries is None else queries  # B S, or 1 T
    visible = (index <= query[..., None]) & (query[..., None] < visible_until[:, None])
    if window is None:
        return visible
    positions = window.positions
    own = positions if queries is None else jnp.take_along_axis(positions, queries, axis=1)
    return visible & (own[..., None] - positions[:, None] < window.length)


def both_ways_mask(visible_until: jax.Array, visible_from: jax.Array) -> jax.Array:
    """[B, T] int32, twice -> [B, T, T] bool: token i sees token j exactly when `visible_from[j] <=
    i < visible_until[j]`.
    """
    index = jnp.arange(visible_until.shape[-1])[:, None]
    return (visible_from[:, None, :] <= index) & (index < visible_until[:, None, :])


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention with grouped heads under an explicit mask, softmax in f32 (at least).

    Args:
      q: [B, T, H, C] float.
      k, v: [B, U, K, C] of q's dtype or a narrower one, that of the products; query head h uses
        key head h // (H / K).
      mask: [B, T, U] bool, true where a query sees a key. Every query must see a key.

    Returns:
      [B, T, H, C] of q's dtype.
    """
    B, T, H, C = q.shape
    K = k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    grouped = q.reshape(B, T, K, H // K, C)
    scores = jnp.einsum(
        "btkgc,bukc->bkgtu", grouped.astype(k.dtype), k, preferred_element_type=wide
    )
    scores = scores * C**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    context = jnp.einsum("bkgtu,bukc->btkgc", weights, v, preferred_element_type=wide)
    return context.reshape(B, T, H, C).astype(q.dtype)
