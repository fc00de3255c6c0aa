"""Products with NF4 weights in plain XLA.

    y = x W^T,    dx = dy W

W is frozen and has no gradient, so the backward pass needs neither x nor y, only the quantised
weight, which is stored anyway. W is dequantised to memory for each product and again for its
transpose.

dtypes: codes and their absmax uint8, the rest of the statistics f32; a value of W is formed in f32
and rounded once, to x's dtype (bf16, f32 or f64), which is that of y and dx.

Memory, in bytes: 0.516 a parameter for storage, in place of 2 (bf16) or 4 (f32); for one matrix at
a time 2 or 4 a parameter for W, and up to 4 more if the compiler writes the f32 values to memory.
Autodiff would store W of every layer.

Roofline of y or dx, for n tokens, I inputs and O outputs, in bf16: 2 n I O FLOPs; 0.52 bytes a
parameter read, 2 written and 2 read again, so 4.5 I O + 2 n (I + O) bytes. For few tokens that is
0.44 n FLOPs a byte; a dense weight has n. An H200 needs 206 by its datasheet: 580 tokens where
I = O = 2,048, a dense weight 260. With fewer tokens, a kernel that decodes on the chip (`lora`)
moves 8.8 times fewer bytes of a weight; with more, products are the bound, and dequantising is 1 ps
a parameter besides.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxre_kernels.linear import product
from jaxre_kernels.nf4.weight import BLOCK, DYNAMIC, NESTED_BLOCK, NF4, NF4Weight


def dequantise(weight: NF4Weight, dtype: jnp.dtype) -> jax.Array:
    """[O, I] of `dtype`: formed in f32, bit for bit as bitsandbytes does, then rounded once."""
    outputs, inputs = weight.shape
    codes = jnp.stack([weight.codes >> 4, weight.codes & 15], axis=-1).reshape(-1)[
        : outputs * inputs
    ]
    values = _blocks(jnp.asarray(NF4)[codes], BLOCK) * block_absmax(weight)[:, None]
    return values.reshape(-1)[: outputs * inputs].reshape(outputs, inputs).astype(dtype)


def block_absmax(weight: NF4Weight) -> jax.Array:
    """[M] f32, the absmax of each block, bit for bit as bitsandbytes dequantises it."""
    nested, levels = weight.nested_absmax[:, None], _blocks(weight.absmax, NESTED_BLOCK)
    # The highest level is 1. Selecting it apart keeps XLA from contracting product and sum into
    # a fused multiply-add, which rounds once where bitsandbytes rounds twice (an optimization
    # barrier does not: CPU, jax 0.10).
    absmax = jnp.where(levels == DYNAMIC.size - 1, nested, jnp.asarray(DYNAMIC)[levels] * nested)
    return absmax.reshape(-1)[: weight.absmax.size] + weight.offset


def _blocks(values: jax.Array, length: int) -> jax.Array:
    """[n] -> [n / length, length], the last block padded with zeros."""
    return jnp.pad(values, (0, -values.size % length)).reshape(-1, length)


@jax.custom_vjp
def nf4_linear(x: jax.Array, weight: NF4Weight) -> jax.Array:
    """y = x W^T, W dequantised to x's dtype; differentiable in x only.

    W is frozen, so its gradient is never formed. The backward pass saves only the quantised weight
    and dequantises it again for dX = dY W; autodiff would store W itself, of every layer at once.

    Args:
      x: [..., I]; weight: of one matrix [O, I].

    Returns:
      [..., O] of x's dtype.
    """
    return product(x, dequantise(weight, x.dtype).T)


def _forward(x: jax.Array, weight: NF4Weight) -> tuple[jax.Array, NF4Weight]:
    return nf4_linear(x, weight), weight


def _backward(weight: NF4Weight, dy: jax.Array) -> tuple[jax.Array, None]:
    return product(dy, dequantise(weight, dy.dtype)), None


nf4_linear.defvjp(_forward, _backward)
