"""What the device does: its rates on products and copies, and the time of updates, split."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxre.models.weights import AnyArchitecture, table
from jaxre.profiling.prepared import Prepared, members
from jaxre.training import sharding

# Dense bf16 products, FLOP/s a device, by the start of its kind: the vendors' datasheets, without
# sparsity.
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
    """Of the programs that are timed: FLOPs of a chain of products, the side of the square ones,
    copies.
    """

    chain: float
    square: int
    copies: int


# On an accelerator enough that a program's start is lost in it: 2 to 4 ms on an H200, where one
# product of 1,200 tokens of a 0.5B model takes 2 to 13 us. A processor starts sooner, and has to be
# done in seconds.
PROCESSOR, ACCELERATOR = Sizes(5e8, 1024, 4), Sizes(2e12, 8192, 32)


@dataclass(frozen=True)
class Timed:
    """Of `updates` updates, each of `examples` examples with `tokens` tokens in the mean.

    `seconds` is an update's in a run that never waits; then one at a time, the median of: waiting
    for input, host work up to the return of the dispatch, and waiting for the device after it.
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


def time_updates(run: Prepared, count: int, trace: Path | None = None) -> Timed:
    """Times `count` updates in a row and as many one at a time, after two to warm up; two more are
    traced into `trace`.
    """
    for _ in range(2):
        jax.block_until_ready(run.update(run.next_rows()))
    lengths = run.dataset.train.tokens.lengths
    chosen = np.concatenate(
        [
            members(run.plan.updates[n % len(run.plan.updates)])
            for n in range(run.done, run.done + count)
        ]
    )
    began = time.perf_counter()
    for _ in range(count):
        metrics = run.update(run.next_rows())
    jax.block_until_ready(metrics)
    seconds = (time.perf_counter() - began) / count
    split = []
    for _ in range(count):
        times = [time.perf_counter()]
        rows = run.next_rows()
        times.append(time.perf_counter())
        metrics = run.update(rows)
        times.append(time.perf_counter())
        jax.block_until_ready(metrics)
        times.append(time.perf_counter())
        split.append(np.diff(times))
    if trace is not None:
        with jax.profiler.trace(str(trace)):
            for _ in range(2):
                jax.block_until_ready(run.update(run.next_rows()))
    input_wait, host, device = np.median(split, axis=0).tolist()
    return Timed(
        count,
        len(chosen) / count,
        float(lengths[chosen].sum()) / count,
        seconds,
        input_wait,
        host,
        device,
    )


def matrix_rate(
    architecture: AnyArchitecture, rows: int, length: int, dtype: np.dtype, mesh: jax.sharding.Mesh
) -> float:
    """FLOP/s of all devices on the products of one layer, [rows, length, I] x [I, O] of `dtype`
    and, as for the gradient, [rows, length, O] x [O, I]; each weight on every device.
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
    """What is timed on these devices."""
    return PROCESSOR if mesh.devices.flat[0].platform == "cpu" else ACCELERATOR


def square_rate(dtype: np.dtype, mesh: jax.sharding.Mesh) -> float:
    """FLOP/s of all devices on one large square product each: what they can do, whatever the
    model's shapes are.
    """
    rows, size = sharding.row_shards(mesh), sizes_for(mesh).square
    return 2.0 * rows * size**3 / _seconds_of_product(rows, size, size, size, dtype, mesh)


def _seconds_of_product(
    rows: int, length: int, inputs: int, outputs: int, dtype: np.dtype, mesh: jax.sharding.Mesh
) -> float:
    """The mean of [rows, length, I] x [I, O] and back, in a program of many. Alone a small product
    takes as long as its start.

    Each takes the result of the one before it, and barriers keep the compiler from multiplying the
    two weights first.
    """
    pairs = int(max(2, sizes_for(mesh).chain // (4 * rows * length * inputs * outputs)))
    x = jax.device_put(
        _random(0, (rows, length, inputs), dtype), sharding.row_sharding(mesh, leading=0)
    )
    # So scaled, a product is of the size of its input.
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
    """Bytes a second, read and written, of adding to an array on one device, in a program that does
    it many times.
    """
    copies = sizes_for(mesh).copies
    source = jax.device_put(jnp.zeros(COPIED, jnp.float32), mesh.devices.flat[0])
    add = jax.jit(
        lambda x: jax.lax.fori_loop(0, copies, lambda _, x: jax.lax.optimization_barrier(x + 1), x)
    )
    return 2 * source.nbytes * copies / _best(lambda: add(source))


def _random(seed: int, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    # Not zeros: an H200 multiplies those an eighth faster (894 against 788 TFLOP/s).
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _best(call: Callable[[], jax.Array], tries: int = 5) -> float:
    """Seconds of a call, the fastest of `tries`."""
    jax.block_until_ready(call())
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return min(times)


def datasheet_rate(mesh: jax.sharding.Mesh, dtype: np.dtype) -> float | None:
    """FLOP/s of all devices as the vendor says, where DATASHEET knows the kind and products are
    bf16.
    """
    kind = mesh.devices.flat[0].device_kind
    known = [rate for name, rate in DATASHEET.items() if kind.startswith(name)]
    return known[0] * mesh.devices.size if known and dtype == jnp.bfloat16 else None
