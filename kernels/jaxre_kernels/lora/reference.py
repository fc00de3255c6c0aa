"""The LoRA projection in plain XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def lora_linear(x: jax.Array, w: jax.Array, a: jax.Array, b: jax.Array, scale: float, dropped: jax.Array | None = None) -> jax.Array:
    """y = x W + scale (x' A) B, where x' is x after dropout.

    W is not differentiated by the caller (LoRA trains A and B), so its gradient is never formed.
    A and B are f32 masters, cast to x's dtype in the products.

    Args:
      x: [..., I] compute dtype; w: [I, O] compute dtype; a: [I, R]; b: [R, O].
      scale: alpha / rank, or alpha / sqrt(rank).
      dropped: [..., I], x after dropout; x itself if not given.

    Returns:
      [..., O] of x's dtype.
    """
    return x @ w + low_rank_term(x, a, b, scale, dropped)


def low_rank_term(x: jax.Array, a: jax.Array, b: jax.Array, scale: float, dropped: jax.Array | None = None) -> jax.Array:
    """scale (x' A) B alone, for a weight that is multiplied in its own way; arguments as in `lora_linear`."""
    low = (x if dropped is None else dropped) @ a.astype(x.dtype)
    return (low * jnp.asarray(scale, x.dtype)) @ b.astype(x.dtype)
