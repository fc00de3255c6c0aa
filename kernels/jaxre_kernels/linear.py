"""Products in plain XLA: what they sum in, and those with dense weights.

`product` is the one matrix product of all XLA implementations. With AVX512_BF16 a processor
multiplies bf16 at twice the rate of f32, but XLA uses these instructions only where the result is
f32: of [2048, 576] x [576, 1536] on two cores f32 runs at 186 to 205 GFLOP/s, bf16 with an f32
result at 330 to 411, bf16 with a bf16 result at 172 (jax 0.10.2, 2026-11-30). So on a CPU the sum
leaves the product in f32 and is rounded behind it; elsewhere the program is as it was.

`dense_linear` is for full fine-tuning and language modelling, where dW is formed. On a CPU the first operand of a sum
over tokens is transposed in memory, and autodiff puts dY there whatever the widths: for a
projection that widens (gate and up of an MLP), the larger of the two.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y, summed in f32 (at least) and rounded once to x's dtype.

    Args:
      x: [..., I]; y: [I, O], of one dtype.

    Returns:
      [..., O] of that dtype.
    """
    if jnp.promote_types(x.dtype, jnp.float32) == x.dtype:
        return x @ y
    return jax.lax.platform_dependent(x, y, cpu=_rounded_behind, default=jnp.matmul)


def _rounded_behind(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.float32).astype(x.dtype)


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
    return product(x, weight)


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, weight), (x, weight)


def _backward(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    inputs, outputs = weight.shape
    return product(dy, weight.T), _over_tokens(x, dy) if inputs <= outputs else _over_tokens(dy, x).T


dense_linear.defvjp(_forward, _backward)


def _over_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., I], [..., O] -> [I, O], summed over tokens."""
    tokens = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(x, y, ((tokens, tokens), ((), ())))
