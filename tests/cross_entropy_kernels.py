"""Shared by tests of linear cross-entropy kernels: random inputs, all gradients, the dense formula
in f64.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxre_kernels.cross_entropy import dense_cross_entropy

CLOSE = (
    2e-6  # f32: sums of at most 50 products, in another order than the reference's, which is in f64
)
COTANGENT = 0.37


def draws(tokens, channels: int, entries: int, scale: float = 1.0):
    """x, head, targets with the first and the last entry, weights of which a fifth is zero."""
    draw = np.random.default_rng(0)
    targets = draw.integers(0, entries, tokens).astype(np.int32)
    targets.flat[0], targets.flat[-1] = 0, entries - 1
    weights = (draw.random(tokens) * (draw.random(tokens) > 0.2)).astype(np.float32)
    weights.flat[0] = weights.flat[-1] = 0.7
    x, head = draw.standard_normal((*tokens, channels)), draw.standard_normal((entries, channels))
    return [(scale * x).astype(np.float32), head.astype(np.float32), targets, weights]


def gradients(op, x, head, targets, weights):
    """Loss, and gradients by x, head and weights at a cotangent that is not 1."""
    loss, back = jax.vjp(lambda x, head, weights: op(x, head, targets, weights), x, head, weights)
    return loss, *back(jnp.asarray(COTANGENT, loss.dtype))


def exact(x, head, targets, weights):
    """By autodiff of the dense formula in f64."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array), jnp.float64) for array in (x, head, weights)]
        return jax.device_get(
            jax.jit(partial(gradients, dense_cross_entropy))(*wide[:2], targets, wide[2])
        )


def relative(value, reference) -> float:
    value, reference = (np.asarray(array, np.float64) for array in (value, reference))
    assert value.shape == reference.shape
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def distance(value, reference) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean((np.asarray(value, np.float64) - reference) ** 2)))
