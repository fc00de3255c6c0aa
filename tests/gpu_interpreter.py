"""How tests run Mosaic GPU kernels in Pallas's interpreter. jax has it from 0.11 on: it is imported where it is used."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True)
def fresh_interpreter():
    """An exception inside of the interpreter leaves its state behind, for every later test. Of each file that imports this."""
    yield
    if jax.__version_info__ >= (0, 11):
        from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

        reset_gpu_interpret_mode_state()


def strict(**options):
    """Reads of what was never written give NaN, reads behind an array raise, and accesses that race are told."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(uninitialized_memory="nan", out_of_bounds_reads="raise", **options)
