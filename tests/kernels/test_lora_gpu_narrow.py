"""dL and dB by one read of dY, in Pallas's interpreter, against f64, and which projections take
it.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreters import needs_interpreter, strict
from jaxre_kernels.lora.gpu_narrow import Panel, narrow_gradients, panel_of
from lora_kernels import largest

SCALE = 1.5


def draws(tokens, outputs, rank, dtype=jnp.float32):
    draw = np.random.default_rng(0)
    shapes = (tokens, outputs), (tokens, rank), (rank, outputs)
    return [jnp.asarray(draw.standard_normal(shape), dtype) for shape in shapes]


def exact(dy, low, b):
    dy, low, b = (np.asarray(array, np.float64) for array in (dy, low, b))
    return SCALE * dy @ b.T, low.T @ dy


@partial(jax.jit, static_argnames=("panel", "races"))
def kernel(dy, low, b, panel, races=False):
    return narrow_gradients(dy, low, b, panel, SCALE, strict(detect_races=races))


# Tokens, outputs, rank, cut. One range or several, more steps than slots, a range that goes beyond
# the outputs, spans of unlike length.
CASES = {
    "rank 8, one slab": (256, 64, 8, Panel(1, 1, 2)),
    "rank 16, two ranges": (384, 256, 16, Panel(1, 2, 1)),
    "rank 32, the last range half empty": (384, 320, 32, Panel(2, 2, 2)),
    "rank 20, one range, one slab empty": (256, 448, 20, Panel(4, 1, 1)),
}


@needs_interpreter
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_both_gradients_equal_f64(case):
    *shapes, panel = case
    arrays = draws(*shapes)
    # f32, sums of at most 448 products
    assert largest(kernel(*arrays, panel), exact(*arrays)) < 1e-6


@needs_interpreter
def test_no_race_no_read_out_of_bounds_and_nothing_read_before_it_is_written():
    arrays = draws(640, 320, 24)
    assert largest(kernel(*arrays, Panel(2, 2, 2), races=True), exact(*arrays)) < 1e-6


@needs_interpreter
@pytest.mark.parametrize("ranges", [1, 2])
def test_sums_of_bfloat16_are_f32_and_dl_is_rounded_once(ranges):
    arrays = draws(256, 256, 16, jnp.bfloat16)
    dlow, db = kernel(*arrays, Panel(2 // ranges, ranges, 2))
    assert (dlow.dtype, db.dtype) == (jnp.bfloat16, jnp.float32)
    true, true_db = exact(*arrays)
    assert largest(db, true_db) < 1e-6 and np.all(
        np.abs(np.asarray(dlow, np.float64) - true) <= 2**-8 * np.abs(true) + 1e-4
    )


def test_what_moves_fewer_bytes_is_taken():
    """Wide projections and small ranks; never more thread blocks than processors where a span can
    be longer.
    """
    assert panel_of(16384, 11008, 32) == Panel(4, 22, 6)
    assert panel_of(16384, 896, 16) == Panel(4, 2, 66)
    assert panel_of(16384, 128, 32) is None and panel_of(16384, 11008, 33) is None
    assert panel_of(256, 128, 32) is None
