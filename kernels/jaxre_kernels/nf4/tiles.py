"""NF4 weights as the kernels for TPUs want them: inputs down the rows, a block's two halves in the two halves of its bytes.

A TPU's vector unit cannot look up a table or interleave lanes cheaply, and it broadcasts a row to the rows below it for nothing. So
the matrix lies as [I, O], as a dense weight does: the 64 values of a block are 64 rows of a column, their absmax is one number above
them, and byte r of the 32 of a block holds value r in its high half and value 32 + r in its low half. Decoded, the halves are 32
whole rows each, and nothing has to be moved.

    value[64 g + r, o] = NF4[codes[32 g + r, o] >> 4] absmax[g, o],    value[64 g + 32 + r, o] = NF4[codes[32 g + r, o] & 15] absmax[g, o]

The absmax are no longer quantised: 4 / 64 bytes a parameter in f32 beside 0.5 of the codes, 4.5 bits a parameter where the stored
form has 4.127. For the 2.77e9 projection parameters of a model of Qwen2.5-3B's shape that is 129 MB on top of 1,431 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxre_kernels.nf4.reference import block_absmax
from jaxre_kernels.nf4.weight import BLOCK, NF4, NF4Weight

HALF = BLOCK // 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4Tiles:
    """One matrix [I, O]: codes [I / 2, O] uint8, absmax [I / 64, O] f32; or a stack with one more axis in front of both."""

    codes: Any
    absmax: Any


def tiled(weight: NF4Weight) -> NF4Tiles:
    """The same values in the layout of the kernels; bit for bit what `dequantise` gives.

    Args:
      weight: of one matrix [O, I] (`jax.vmap` for a stack).

    Raises:
      ValueError: blocks that go over the end of a row, where I is no multiple of 64.
    """
    outputs, inputs = weight.shape
    if inputs % BLOCK:
        raise ValueError(f"NF4 for TPUs takes a multiple of {BLOCK} inputs, not {inputs}")
    codes = jnp.asarray(weight.codes).reshape(outputs, -1, HALF).transpose(1, 2, 0)  # G 32 O
    values = jnp.stack([codes >> 4, codes & 15], axis=2).reshape(-1, BLOCK, outputs)
    packed = values[:, :HALF] << 4 | values[:, HALF:]
    absmax = block_absmax(weight).reshape(outputs, -1)
    return NF4Tiles(packed.reshape(-1, outputs), absmax.T)


def dequantise_tiles(tiles: NF4Tiles, dtype: jnp.dtype) -> jax.Array:
    """[I, O] of `dtype`, formed in f32 and rounded once: `dequantise(weight, dtype).T`."""
    codes = tiles.codes.reshape(-1, HALF, tiles.codes.shape[1])  # G 32 O
    values = jnp.asarray(NF4)[jnp.concatenate([codes >> 4, codes & 15], axis=1)] * tiles.absmax[:, None]
    return values.reshape(-1, tiles.codes.shape[1]).astype(dtype)
