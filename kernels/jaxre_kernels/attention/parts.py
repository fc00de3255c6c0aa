"""Attention over keys stored in several places: a prefix that all rows share, and the keys of each
row or slot.

The keys are never concatenated. With scores s of the parts, m the highest of all of them and E
= exp(s - m), the context is the sum of E V over the parts divided by the sum of E: one softmax over
all keys, in f32 (at least).

Letters: B rows, K key/value heads, C head channels, M queries of a key head, U keys of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxre_kernels.attention.reference import Window


class Part(NamedTuple):
    """Keys and values [B, K, U, C], or [K, U, C] where all rows share them, and which queries see
    them: to [B, K, M, U] broadcast. A sliding layer asks for their positions too, [B, U] or [U].
    """

    keys: jax.Array
    values: jax.Array
    visible: jax.Array
    positions: jax.Array | None = None

    def within(self, window: Window) -> Part:
        """The part without the keys that a window hides; `window.positions` [B, M] are those of the
        queries.
        """
        keys = self.positions if self.positions.ndim == 2 else self.positions[None]  # B U
        near = window.positions[:, None, :, None] - keys[:, None, None] < window.length  # B 1 M U
        return self._replace(visible=self.visible & near)


def joint_attention(queries: jax.Array, parts: Sequence[Part]) -> jax.Array:
    """[B, K, M, C] queries -> [B, K, M, C] context, of the queries' dtype. Every query must see a
    key of some part.
    """
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
