"""What tests of Mosaic GPU kernels share: Pallas's interpreter at its strictest, and its state left clean."""

from __future__ import annotations

import pytest
from jaxre_kernels.cross_entropy import gpu

needs_interpreter = pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """An exception inside of the interpreter leaves its state behind, for every later test."""
    yield
    if gpu.MISSING is None:
        from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

        reset_gpu_interpret_mode_state()


def strict(**options):
    """Reads of what was never written give NaN, reads behind an array raise, and accesses that race are told."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(uninitialized_memory="nan", out_of_bounds_reads="raise", **options)
