"""Attention over keys stored in several places: a prefix shared by the batch, and the keys of each
row or slot.

The keys are never concatenated. With scores s of the parts, m the highest of all of them and E
= exp(s - m), the context is the sum of E V over the parts divided by the sum of E: one softmax over
all keys, in f32 (at least).

Letters: B rows, T tokens in a row, S selected positions, H query heads, K key/value heads, G =
H/K, C head channels, M queries of a key head, U keys of a part, P keys of the prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxre_kernels.attention import Window, visible_mask

QUERIES = 128  # of a block of a row
NEAR_MULTIPLE = 32  # keys behind a block, rounded up


class Part(NamedTuple):
    """Keys and values [B, K, U, C], or [K, U, C] where all rows share them, and which queries see
    them: to [B, K, M, U] broadcast. A sliding layer asks for their positions too, [B, U] or [U].
    """

    keys: jax.Array
    values: jax.Array
    visible: jax.Array
    positions: jax.Array | None = None


def joint_attention(
    queries: jax.Array, parts: Sequence[Part], window: Window | None = None
) -> jax.Array:
    """[B, K, M, C] queries -> [B, K, M, C] context, of the queries' dtype. Every query must see a
    key of some part.

    Args:
      window: of a sliding layer: the positions of the queries, [B, M], and how many they see.
    """
    if window is not None:
        parts = [_within(part, window) for part in parts]
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    scores = []
    for part in parts:
        found = _product("kmc,kuc->kmu", queries.astype(part.keys.dtype), part.keys, wide)
        found *= queries.shape[-1] ** -0.5
        scores.append(jnp.where(part.visible, found, jnp.finfo(wide).min))
    highest = jnp.stack([one.max(axis=-1) for one in scores]).max(axis=0)[..., None]
    total = context = 0.0
    for part, one in zip(parts, scores, strict=True):
        weights = jnp.exp(one - highest)
        total += weights.sum(axis=-1, keepdims=True)
        context += _product("kmu,kuc->kmc", weights.astype(part.values.dtype), part.values, wide)
    return (context / total).astype(queries.dtype)


def _product(letters: str, x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Products of x [B, K, M, .] with y [B, K, U, .], or with y [K, U, .] that all rows share.

    Shared, the rows of x stand side by side: XLA for CPUs otherwise turns the product around, to a
    form that it does not have for bf16 with f32 results (jax 0.10.2).
    """
    if y.ndim == 4:
        left, right, result = letters.replace("->", ",").split(",")
        return jnp.einsum(f"b{left},b{right}->b{result}", x, y, preferred_element_type=dtype)
    B, K, M, _ = x.shape
    side_by_side = x.transpose(1, 0, 2, 3).reshape(K, B * M, -1)
    found = jnp.einsum(letters, side_by_side, y, preferred_element_type=dtype)
    return found.reshape(K, B, M, -1).transpose(1, 0, 2, 3)


def _within(part: Part, window: Window) -> Part:
    """The part without the keys that a window hides from each query."""
    keys = part.positions if part.positions.ndim == 2 else part.positions[None]  # B U
    near = window.positions[:, None, :, None] - keys[:, None, None] < window.length  # B 1 M U
    return part._replace(visible=part.visible & near)


def prefix_parts(prefix: tuple[jax.Array, jax.Array] | None, length: jax.Array | int) -> list[Part]:
    """The part [K, P, C] that all see, of which the first `length` places count; none without a
    prefix.
    """
    if prefix is None:
        return []
    keys, values = prefix
    place = jnp.arange(keys.shape[1])
    return [Part(keys, values, place < length, place)]


def row_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_until: jax.Array,
    before: Sequence[Part],
    span: int,
    window: Window | None = None,
) -> jax.Array:
    """Attention of packed rows: token i sees `before`, and token j of its row exactly when `j <= i
    < visible_until[j]`.

    Args:
      q: [B, T, H, C]; k, v: [B, T, K, C]; visible_until: [B, T] int32.
      span: every visible pair of a row has i - j < span; a block of queries looks no further back.
      window: of a sliding layer, with the positions of the row's tokens; `before` has its own.

    Returns:
      [B, T, H, C].
    """
    T, K = q.shape[1], k.shape[2]
    block, back = block_of(T, span)
    # B K back+T C
    k, v = (
        jnp.pad(array.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (back, 0), (0, 0)))
        for array in (k, v)
    )
    until = jnp.pad(visible_until, ((0, 0), (back, 0)))  # zero before the row: seen by none
    if window is not None:
        positions = jnp.pad(window.positions, ((0, 0), (back, 0)))
    blocks = jnp.moveaxis(q.reshape(q.shape[0], -1, block, *q.shape[2:]), 1, 0)  # N B block H C

    def attend(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        first, queries = one

        def near(array: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(array, first, back + block, axis)

        query, key = first + jnp.arange(block)[:, None], first - back + jnp.arange(back + block)
        visible = (key <= query) & (query < near(until, 1)[:, None])  # B block back+block
        G = queries.shape[2] // K
        own, own_window = Part(near(k, 2), near(v, 2), _for_heads(visible, G)), None
        if window is not None:
            own = own._replace(positions=near(positions, 1))
            own_window = Window(jnp.repeat(own.positions[:, back:], G, axis=1), window.length)
        context = joint_attention(_grouped(queries, K), [*before, own], own_window)
        return _ungrouped(context, queries.shape)

    if blocks.shape[0] == 1:
        return attend((jnp.int32(0), blocks[0]))
    context = jax.lax.map(attend, (jnp.arange(0, T, block), blocks))
    return jnp.moveaxis(context, 0, 1).reshape(q.shape)


def chosen_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    visible_until: jax.Array,
    before: Sequence[Part],
    window: Window | None = None,
) -> jax.Array:
    """`row_attention` of the queries [B, S, H, C] at row positions [B, S] alone."""
    keys, values = (array.transpose(0, 2, 1, 3) for array in (k, v))
    G = q.shape[2] // k.shape[2]
    visible = visible_mask(visible_until, queries=positions)  # B S T
    own = Part(keys, values, _for_heads(visible, G))
    if window is not None:
        own = own._replace(positions=window.positions)
        selected = jnp.take_along_axis(window.positions, positions, axis=1)
        window = window._replace(positions=jnp.repeat(selected, G, axis=1))
    return _ungrouped(joint_attention(_grouped(q, k.shape[2]), [*before, own], window), q.shape)


def window_of(positions: jax.Array, length: jax.Array | int | None) -> Window | None:
    """The window of a layer over positions [B, T]; None for a layer without one."""
    return None if length is None else Window(positions, length)


def block_of(length: int, span: int) -> tuple[int, int]:
    """Queries in a block, and how many keys before the block it reads; the whole row where blocks
    would save nothing or do not divide it.
    """
    back = -(-(span - 1) // NEAR_MULTIPLE) * NEAR_MULTIPLE
    return (QUERIES, back) if back + QUERIES < length and length % QUERIES == 0 else (length, 0)


def _grouped(q: jax.Array, K: int) -> jax.Array:
    """[B, T, H, C] -> [B, K, T x G, C]."""
    B, T, H, C = q.shape
    return q.reshape(B, T, K, H // K, C).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, C)


def _ungrouped(context: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, K, T x G, C] -> [B, T, H, C]."""
    B, T, H, C = shape
    K = context.shape[1]
    return context.reshape(B, K, T, H // K, C).transpose(0, 2, 1, 3, 4).reshape(shape)


def _for_heads(visible: jax.Array, G: int) -> jax.Array:
    """[B, T, U] -> [B, 1, T x G, U]."""
    return jnp.repeat(visible, G, axis=1)[:, None]
