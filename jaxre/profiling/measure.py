"""Measures the rates of a device on products and copies, and the parts of an update's time."""

from __future__ import annotations

import time
import timeit
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxre.models import sharding
from jaxre.models.weights import AnyArchitecture, table
from jaxre.profiling.updates import Updates

# FLOP/s of a device on dense bf16 products, by the start of its kind; from the vendors' datasheets,
# without sparsity.
DATASHEET = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
COPIED = 2**26  # elements of the copy: past every cache, small beside a device's memory


class Sizes(NamedTuple):
    """Sizes of the timed programs: FLOPs in a chain of products, side of the square matrices,
    number of copies.
    """

    chain: float
    square: int
    copies: int


# On an accelerator, large enough to hide the launch of a program: 2 to 4 ms on an H200, where a
# product of 1,200 tokens of a 0.5B model takes 2 to 13 us. A processor launches sooner, and has to
# finish in seconds.
PROCESSOR, ACCELERATOR = Sizes(5e8, 1024, 4), Sizes(2e12, 8192, 32)


@dataclass(frozen=True)
class Timed:
    """Times of `updates` updates, with a mean of `examples` examples and `tokens` tokens each.

    seconds: mean of an update in a run that never waits.
    input_wait, host, device: medians with one update at a time: waiting for input, host work until
      the dispatch returns, and waiting for the device after that.
    """

    updates: int
    examples: float
    tokens: float
    seconds: float
    input_wait: float
    host: float
    device: float

    @property
    def examples_per_second(self) -> float:
        return self.examples / self.seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def time_updates(updates: Updates, count: int, trace: Path | None = None) -> Timed:
    """Times `count` updates in a row and as many one at a time, after two warm-up updates; traces
    two more into `trace`.
    """
    for _ in range(2):
        jax.block_until_ready(updates.run(updates.next_rows()))
    lengths = updates.setup.dataset.train.tokens.lengths
    chosen = updates.upcoming(count)
    began = time.perf_counter()
    for _ in range(count):
        metrics = updates.run(updates.next_rows())
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - began) / count
    split = []
    for _ in range(count):
        began = time.perf_counter()
        rows = updates.next_rows()
        got_rows = time.perf_counter()
        metrics = updates.run(rows)
        dispatched = time.perf_counter()
        jax.block_until_ready(metrics)
        split.append((got_rows - began, dispatched - got_rows, time.perf_counter() - dispatched))
    if trace is not None:
        with jax.profiler.trace(str(trace)):
            for _ in range(2):
                jax.block_until_ready(updates.run(updates.next_rows()))
    input_wait, host, device = np.median(split, axis=0).tolist()
    return Timed(
        updates=count,
        examples=len(chosen) / count,
        tokens=float(lengths[chosen].sum()) / count,
        seconds=seconds,
        input_wait=input_wait,
        host=host,
        device=device,
    )


def matrix_rate(
    architecture: AnyArchitecture, rows: int, length: int, dtype: np.dtype, mesh: jax.sharding.Mesh
) -> float:
    """FLOP/s of all devices on the products of one layer, [rows, length, I] x [I, O] of `dtype`
    and, as in the backward pass, [rows, length, O] x [O, I], with replicated weights.
    """
    counts = Counter(
        weight.shape(architecture)
        for weight in table(architecture)
        if weight.in_layer and len(weight.dims) == 2
    )
    flops = sum(
        count * 2.0 * rows * length * inputs * outputs
        for (inputs, outputs), count in counts.items()
    )
    return flops / sum(
        count * _seconds_of_product(rows, length, *shape, dtype, mesh)
        for shape, count in counts.items()
    )


def sizes_for(mesh: jax.sharding.Mesh) -> Sizes:
    """Sizes of the programs to time on these devices."""
    return PROCESSOR if mesh.devices.flat[0].platform == "cpu" else ACCELERATOR


def square_rate(dtype: np.dtype, mesh: jax.sharding.Mesh) -> float:
    """FLOP/s of all devices on one large square product each, independent of the model's shapes."""
    rows, size = sharding.row_shards(mesh), sizes_for(mesh).square
    return 2.0 * rows * size**3 / _seconds_of_product(rows, size, size, size, dtype, mesh)


def _seconds_of_product(
    rows: int, length: int, inputs: int, outputs: int, dtype: np.dtype, mesh: jax.sharding.Mesh
) -> float:
    """Mean time of [rows, length, I] x [I, O] and back, in a program of many: a small product alone
    takes as long as its launch.

    Each product takes the previous result, and barriers keep the compiler from multiplying the two
    weights first.
    """
    pairs = int(max(2, sizes_for(mesh).chain // (4 * rows * length * inputs * outputs)))
    x = jax.device_put(
        _random(0, (rows, length, inputs), dtype), sharding.row_sharding(mesh, leading=0)
    )
    # With this scale a product has the magnitude of its input.
    there, back = (
        jax.device_put(_random(seed, shape, dtype) * shape[0] ** -0.5, sharding.replicated(mesh))
        for seed, shape in ((1, (inputs, outputs)), (2, (outputs, inputs)))
    )

    def product(x, w):
        return jax.lax.optimization_barrier(x @ w)

    @jax.jit
    def chain(x, there, back):
        return jax.lax.fori_loop(
            0, pairs, lambda _, x: product(product(x, there), back), x, unroll=2
        )

    return _best(lambda: chain(x, there, back)) / (2 * pairs)


def copy_rate(mesh: jax.sharding.Mesh) -> float:
    """Bytes per second, read and written, of repeated additions to an array on one device."""
    copies = sizes_for(mesh).copies
    source = jax.device_put(jnp.zeros(COPIED, jnp.float32), mesh.devices.flat[0])
    add = jax.jit(
        lambda x: jax.lax.fori_loop(0, copies, lambda _, x: jax.lax.optimization_barrier(x + 1), x)
    )
    return 2 * source.nbytes * copies / _best(lambda: add(source))


def _random(seed: int, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    # Not zeros, which an H200 multiplies an eighth faster (894 against 788 TFLOP/s).
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _best(call: Callable[[], jax.Array]) -> float:
    """Seconds of a call, the fastest of five after a warm-up."""

    def run() -> None:
        jax.block_until_ready(call())

    run()
    return min(timeit.repeat(run, number=1, repeat=5))


def datasheet_rate(mesh: jax.sharding.Mesh, dtype: np.dtype) -> float | None:
    """The vendor's FLOP/s of all devices; None unless products are bf16 and DATASHEET has the
    device.
    """
    kind = mesh.devices.flat[0].device_kind
    known = [rate for name, rate in DATASHEET.items() if kind.startswith(name)]
    return known[0] * mesh.devices.size if known and dtype == jnp.bfloat16 else None
