"""Shared by tests of Pallas kernels: its interpreters at their strictest, races that fail the test,
and clean state afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from jax.experimental.pallas import tpu as pltpu
from jaxre_kernels.cross_entropy import gpu

needs_interpreter = pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))

# Reads of unwritten memory return NaN, reads beyond an array raise, and races are reported: `clean`
# raises for them.
OPTIONS = {"uninitialized_memory": "nan", "out_of_bounds_reads": "raise"}
# For TPUs. A copy completes as late as possible, when it is waited for.
STRICT = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", **OPTIONS)


def strict(**options):
    """For GPUs."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(**OPTIONS, **options)


class RaceError(AssertionError):
    """Two accesses that nothing orders."""


@contextmanager
def clean(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Raises RaceError if an interpreter reported a race, and resets the interpreter.

    jax 0.12 raises; 0.10 and 0.11 print the race and continue. The interpreter's own record is
    cleared by the next kernel, so after a forward and a backward pass it would cover only the last
    kernel; the output covers all.
    """
    try:
        yield
        said = capfd.readouterr()
        if "RACE DETECTED" in said.out + said.err:
            raise RaceError(said.out + said.err)
        sys.stdout.write(said.out)  # for the report of a test that fails
        sys.stderr.write(said.err)
    finally:  # an exception inside of an interpreter leaves its state behind, for every later test
        pltpu.reset_tpu_interpret_mode_state()
        if gpu.MISSING is None:
            from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import (
                reset_gpu_interpret_mode_state,
            )

            reset_gpu_interpret_mode_state()
