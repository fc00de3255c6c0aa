"""Products with dense weights, in plain XLA.

For full fine-tuning and language modelling, where dW is formed. On a CPU the first operand of a sum
over tokens is transposed in memory, and autodiff puts dY there whatever the widths: for a
projection that widens (gate and up of an MLP), the larger of the two.
"""

from __future__ import annotations

import jax


@jax.custom_vjp
def dense_linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Y = X W; its backward pass has the narrower of X and dY as the first operand of dW.

    dX = dY W^T; dW = X^T dY if I <= O, else (dY^T X)^T, summed over tokens. The same products as
    autodiff's, one of them turned.

    Args:
      x: [..., I]; weight: [I, O], of one dtype.

    Returns:
      [..., O] of that dtype.
    """
    return x @ weight


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ weight, (x, weight)


def _backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    inputs, outputs = weight.shape
    return dy @ weight.T, _over_tokens(x, dy) if inputs <= outputs else _over_tokens(dy, x).T


dense_linear.defvjp(_forward, _backward)


def _over_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., I], [..., O] -> [I, O], summed over tokens."""
    tokens = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, y, ((tokens, tokens), ((), ())))
