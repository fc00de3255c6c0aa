"""Cross-entropy of logits, and of hidden states through all logits: the oracle of every kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted sum of -log softmax(logits)[target]: [..., V] f32, [...] int32, [...] f32 -> []
    f32.
    """
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - chosen))


def logits_of(x: jax.Array, head: jax.Array) -> jax.Array:
    """Applies the vocabulary head: [..., D], [V, D] -> [..., V], multiplied in the head's dtype,
    f32 (at least).
    """
    return jnp.einsum(
        "...d,vd->...v",
        x.astype(head.dtype),
        head,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )


def dense_cross_entropy(
    x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
) -> jax.Array:
    """`linear_cross_entropy` as written in the formula; autodiff stores the logits and forms a
    gradient of their size.
    """
    return cross_entropy(logits_of(x, head), targets, weights)
