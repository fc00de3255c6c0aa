"""Not yet run on a TPU: unverified. `tools/hardware_check --only nf4` confirms it.

Decodes NF4 in a TPU's vector memory, within a step of a Pallas kernel.

Decoding takes about 30 vector operations a parameter (two shifts and masks, four comparisons, 15
selections, a product, a rounding), so a kernel decodes once for as many tokens as it can.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxre_kernels.nf4.tiles import HALF, levels
from jaxre_kernels.nf4.weight import BLOCK


def decode(codes_ref, absmax_ref, values_ref, first: jax.Array | int = 0) -> None:
    """Writes values of `NF4Tiles`, each rounded once from f32: codes [I / 2, O] uint8, absmax
    [>= I / 64, O] f32 -> values [I, O].

    `first` is the row of absmax of the first block of codes. Blocks beyond the last row use the
    last row's: they lie beyond the end of the matrix.
    """

    def block(g, carry):
        codes = codes_ref[pl.ds(pl.multiple_of(g * HALF, HALF), HALF), :].astype(jnp.int32)
        absmax = absmax_ref[pl.ds(jnp.minimum(first + g, absmax_ref.shape[0] - 1), 1), :]
        for half, shift in ((0, 4), (1, 0)):
            rows = pl.ds(pl.multiple_of(g * BLOCK + half * HALF, HALF), HALF)
            values_ref[rows, :] = (levels(codes >> shift) * absmax).astype(values_ref.dtype)
        return carry

    jax.lax.fori_loop(0, values_ref.shape[0] // BLOCK, block, 0)
