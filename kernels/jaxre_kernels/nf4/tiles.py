"""NF4 weights in the layout of the kernels: inputs down the rows, each byte holding values of two
rows.

A vector unit cannot look up a table or interleave lanes cheaply, but it broadcasts a row to the
rows below it for free. So the matrix is stored as [I, O], like a dense weight: the 64 values of a
block are 64 rows of a column, their absmax is one number above them. Of each 2 h rows, byte r of h
holds value r in its high half and value h + r in its low half. Decoded, the halves are h whole rows
each, and nothing has to be moved. On a TPU h is 32, half a block. On a GPU it is 64, the rows of a
warpgroup's tile.

    value[2 h g + r, o] = NF4[codes[h g + r, o] >> 4] absmax[.., o],
        value[2 h g + h + r, o] = NF4[codes[h g + r, o] & 15] absmax[.., o]

The absmax are no longer quantised: 4 / 64 bytes a parameter in f32 beside 0.5 of the codes, 4.5
bits a parameter where the stored form has 4.127. For the 2.77e9 projection parameters of a model of
Qwen2.5-3B's shape that is 129 MB on top of 1,431 MB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from jaxre_kernels.nf4.reference import block_absmax
from jaxre_kernels.nf4.weight import BLOCK, NF4, NF4Weight

HALF = BLOCK // 2


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4Tiles:
    """One matrix [I, O]: codes [I / 2, O] uint8, absmax [I / 64, O] f32; or a stack with one more
    axis in front of both.

    half: rows of a half, h above.
    """

    codes: Any
    absmax: Any
    half: int = field(default=HALF, metadata={"static": True})


def tiled(weight: NF4Weight | NF4Tiles, half: int = HALF) -> NF4Tiles:
    """The same values in the layout of the kernels; bit for bit those of `dequantise`.

    Args:
      weight: of one matrix [O, I] (`jax.vmap` for a stack); or tiles with halves of any size.

    Raises:
      ValueError: I is not a multiple of two halves, or of 64.
    """
    if isinstance(weight, NF4Tiles):
        if weight.half == half:
            return weight
        codes, absmax = _codes(weight), weight.absmax
        inputs, outputs = codes.shape
    else:
        outputs, inputs = weight.shape
    if inputs % max(2 * half, BLOCK):
        raise ValueError(
            f"NF4 in halves of {half} rows takes a multiple of {max(2 * half, BLOCK)} inputs, not"
            f" {inputs}"
        )
    if isinstance(weight, NF4Weight):
        packed = jnp.asarray(weight.codes).reshape(outputs, -1, HALF).transpose(1, 2, 0)  # G 32 O
        codes, absmax = (
            jnp.stack([packed >> 4, packed & 15], axis=2),
            block_absmax(weight).reshape(outputs, -1).T,
        )
    halves = codes.reshape(-1, 2, half, outputs)
    return NF4Tiles((halves[:, 0] << 4 | halves[:, 1]).reshape(-1, outputs), absmax, half)


def dequantise_tiles(tiles: NF4Tiles, dtype: jnp.dtype) -> jax.Array:
    """[I, O] of `dtype`, formed in f32 and rounded once: `dequantise(weight, dtype).T`."""
    codes = _codes(tiles)
    values = jnp.asarray(NF4)[codes.reshape(-1, BLOCK, codes.shape[1])] * tiles.absmax[:, None]
    return values.reshape(codes.shape).astype(dtype)


def levels(codes: jax.Array) -> jax.Array:
    """NF4[codes & 15] f32 by selection, bit by bit: in a kernel a table would need a gather."""
    chosen = list(NF4)
    for bit in range(4):
        taken = (codes & (1 << bit)) != 0
        chosen = [
            jnp.where(taken, high, low) for low, high in zip(chosen[::2], chosen[1::2], strict=True)
        ]
    return chosen[0]


def _codes(tiles: NF4Tiles) -> jax.Array:
    """[I, O], one code a byte."""
    packed = tiles.codes.reshape(-1, tiles.half, tiles.codes.shape[1])
    return jnp.concatenate([packed >> 4, packed & 15], axis=1).reshape(-1, packed.shape[2])
