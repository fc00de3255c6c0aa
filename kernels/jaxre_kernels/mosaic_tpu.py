"""Not yet run on a TPU: unverified. `tools/hardware_check` confirms it.

Shared parts of the kernels for TPUs (Pallas Mosaic).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LANES = 128
VMEM_LIMIT = 48 * 2**20  # bytes; v5p has 64 MiB, v5e and v6e 128


def product(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """x y over an axis of each, f32. Factors in f32 are not rounded to bf16, whatever the default
    of the matrix unit: callers use f32 to check parity.
    """
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
