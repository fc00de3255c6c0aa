"""Not yet run on a GPU: unverified. `tools/hardware_check` confirms it.

Shared parts of the kernels for GPUs (Pallas Mosaic GPU).
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

MISSING = (
    None
    if jax.__version_info__ >= (0, 11)
    else f"it needs jax 0.11 or later, this is {jax.__version__}"
)
PROCESSORS = 132  # of an H100 or H200
SWIZZLE = 128  # bytes: a tile of shared memory is 8 rows of that many
TILE = plgpu.Layout.WGMMA  # how a product lies in the registers of a warpgroup
LOG2_E = math.log2(math.e)


def shared_tile(shape, dtype, swizzle=SWIZZLE):
    """Shared memory laid out for products, in rows of `swizzle` bytes."""
    transforms = (
        plgpu.TilingTransform((8, swizzle // dtype.itemsize)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def transposed(ref):
    return ref.transpose((1, 0))


def quotient(number, by):
    """Quotient of nonnegative integers; `//` would also handle signs."""
    return lax.div(number, np.int32(by))


def remainder(number, by):
    return lax.rem(number, np.int32(by))
