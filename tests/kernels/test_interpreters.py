"""The interpreters detect a race, a read behind an array and memory that was never written.

Each kernel here has one such fault. If it went undetected, tests that run kernels under `STRICT`
and `strict` would not reveal such faults either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreters import STRICT, RaceError, clean, needs_interpreter, strict
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

ROWS = 8
RESULT = jax.ShapeDtypeStruct((ROWS, 128), jnp.float32)


class Device(NamedTuple):
    """How its kernels are run, and how one copies and waits for the copy."""

    run: Callable
    copy: Callable
    wait: Callable


def on_tpu(kernel, *arrays):
    given = [pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pl.ANY)]
    scratch = [pltpu.VMEM(RESULT.shape, RESULT.dtype), pltpu.SemaphoreType.DMA]
    return pl.pallas_call(
        kernel, out_shape=RESULT, in_specs=given, scratch_shapes=scratch, interpret=STRICT
    )(*arrays)


def on_gpu(kernel, *arrays):
    scratch = [plgpu.SMEM(RESULT.shape, RESULT.dtype), plgpu.Barrier()]
    return plgpu.kernel(
        kernel, out_type=RESULT, scratch_types=scratch, interpret=strict(detect_races=True)
    )(*arrays)


TPU = Device(
    on_tpu,
    lambda *refs: pltpu.make_async_copy(*refs).start(),
    lambda *refs: pltpu.make_async_copy(*refs).wait(),
)
GPU = Device(
    on_gpu,
    lambda *refs: plgpu.copy_gmem_to_smem(*refs),
    lambda far, near, arrived: plgpu.barrier_wait(arrived),
)
both_devices = pytest.mark.parametrize(
    "device", [TPU, pytest.param(GPU, marks=needs_interpreter)], ids=["tpu", "gpu"]
)


def copied(device: Device, first: int = 0, waits: str = "before") -> np.ndarray:
    """Ones, copied to the chip and read there from row `first` on, before the copy is waited for or
    after; "" copies nothing.
    """

    def kernel(first, far, out, near, arrived):
        if waits:
            device.copy(far, near, arrived)
        if waits == "before":
            device.wait(far, near, arrived)
        out[...] = near[pl.ds(first[0], ROWS), :]
        if waits == "after":
            device.wait(far, near, arrived)

    return np.asarray(device.run(kernel, jnp.array([first]), jnp.ones(RESULT.shape, RESULT.dtype)))


@both_devices
def test_a_kernel_without_a_fault_is_let_through(device):
    assert (copied(device) == 1).all()


@both_devices
def test_a_read_that_does_not_wait_for_its_copy_fails_the_test(device, capfd):
    """Also where another kernel, without a fault, follows. On jax 0.12 the interpreter's own error
    comes first.
    """
    with (
        pytest.raises((RaceError, jax.errors.JaxRuntimeError), match="RACE DETECTED"),
        clean(capfd),
    ):
        copied(device, waits="after")
        copied(device)


@both_devices
def test_a_read_behind_an_array_raises(device):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"(?i)out-of-bounds"):
        copied(device, first=1)


@both_devices
def test_memory_that_was_never_written_is_not_a_number(device):
    assert np.isnan(copied(device, waits="")).all()
