"""Products in plain XLA: dtypes of operands and results, and products with dense weights.

`product(x, y)` multiplies in the dtype of y and returns x's. Where both are bf16 (accelerators)
that is a plain product. On a CPU activations are f32 and weights bf16: x is rounded to bf16 and the
sum is returned in f32. With AVX512_BF16 a processor multiplies bf16 at twice the rate of f32, but
XLA uses these instructions only if the result is f32: [2048, 576] x [576, 1536] on two cores in f32
runs at 186 to 205 GFLOP/s, in bf16 with an f32 result at 330 to 411, with a bf16 result at 172 (jax
0.10.2, 2026-11-30).

`packed` is the form in which such activations are saved for a backward pass: the bits of bf16. XLA
for CPUs updates a slice of a bf16 array by widening the whole array to f32 and rounding it back:
in a scan over layers that is every saved activation, once a layer.

`dense_linear` is for full fine-tuning and language modelling, where dW is formed. A CPU transposes
the first operand of a sum over tokens in memory, and autodiff always puts dY there, which is the
larger one for a projection that widens (gate and up of an MLP).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y, multiplied in y's dtype, of x's dtype.

    Args:
      x: [..., I]; y: [I, O], of x's dtype or a narrower one.

    Returns:
      [..., O] of x's dtype.
    """
    if x.dtype == y.dtype:
        return x @ y
    return jnp.matmul(x.astype(y.dtype), y, preferred_element_type=x.dtype)


def packed(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x as saved for the backward pass of products in `dtype`: unchanged if it has that dtype, else
    the bits of the rounded values (uint16 for bf16).
    """
    if x.dtype == jnp.dtype(dtype):
        return x
    return jax.lax.bitcast_convert_type(x.astype(dtype), jnp.uint16)


def unpacked(stored: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The values, of `dtype`, that `packed` stored."""
    return jax.lax.bitcast_convert_type(stored, dtype) if stored.dtype == jnp.uint16 else stored


@jax.custom_vjp
def dense_linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Y = X W; the backward pass puts the narrower of X and dY first in the product for dW.

    dX = dY W^T; dW = X^T dY if I <= O, else (dY^T X)^T, summed over tokens. The same products as
    autodiff's, one of them transposed.

    Args:
      x: [..., I]; weight: [I, O], of x's dtype or a narrower one, that of the products.

    Returns:
      [..., O] of x's dtype.
    """
    return product(x, weight)


def _forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return product(x, weight), (packed(x, weight.dtype), weight)


def _backward(residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = residuals
    inputs, outputs = weight.shape
    x, dx = unpacked(x, weight.dtype), product(dy, weight.T)
    dw = _over_tokens(x, dy) if inputs <= outputs else _over_tokens(dy, x).T
    return dx, dw.astype(weight.dtype)


dense_linear.defvjp(_forward, _backward)


def _over_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., I], [..., O] -> [I, O], summed over tokens."""
    tokens = tuple(range(x.ndim - 1))
    wide = jnp.promote_types(x.dtype, y.dtype)
    return jax.lax.dot_general(x.astype(wide), y.astype(wide), ((tokens, tokens), ((), ())))
