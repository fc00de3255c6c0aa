"""Cases and variants of kernel checks and timings, the oracle, the clock."""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxre_kernels.implementations import HARDWARE, implementations_of, runs_on

# Largest error of a correct result, max|difference| / max|reference| to f32; twice the error of the
# plain formula in the same dtype is also allowed. f32 differs by the order of its sums (of at most
# 16,384 products), bf16 has 8 bits. In the order of the checks: training on accelerators uses bf16.
CLOSE = {"bfloat16": 2.0**-7, "float32": 1e-5}
# Bytes written between two calls: many times the second-level cache of an H200 (60 MB), and long
# enough (0.4 ms there) to hide what the host needs for a call of many small programs.
TOUCHED = 2**30
DRY_TOUCHED = 2**20
HOST_BOUND = 0.1  # least share of the time spent waiting at the end if the device is the bottleneck


@dataclass(frozen=True)
class Variant:
    """One way to compute a case: `run(*inputs)` returns the same tree as the case's reference.

    implementation, tiles: of ours, as the dispatch names them. left_out: why it is not run here.
    compared: whether its result must equal the case's; a bare product's does not.
    """

    run: Callable[..., Any]
    implementation: str | None = None
    tiles: dict[str, int] = field(default_factory=dict)
    left_out: str | None = None
    compared: bool = True


@dataclass(frozen=True)
class Case:
    """A computation to check or time. `inputs(seed)` are the arrays of one call, forward and
    backward.

    covers: bounds of sizes, by the table's names, that a measurement of this case represents; None
    for none. flops: needed by the model; moved: bytes, each input read and each result written
    once. targets: opponent -> least ratio of its seconds to the fastest of ours.
    """

    op: str
    name: str
    dtype: str
    inputs: Callable[[int], tuple]
    reference: Callable[..., Any]
    variants: dict[str, Variant]
    covers: dict[str, tuple[int, int]] | None = None
    flops: float = 0.0
    moved: float = 0.0
    targets: dict[str, float] = field(default_factory=dict)


def ours(
    op: str, function: Callable, both: Callable[[Callable], Callable], sweep: bool
) -> dict[str, Variant]:
    """The implementations that the dispatch of an op names, each by itself and, with `sweep`, with
    each of its tile sizes.

    Args:
      op: its folder; function: its entry, whose `implementation` and `tiles` are set here.
      both: makes a forward and backward run of an op that is called with the case's arrays.
    """
    listed = getattr(importlib.import_module(f"jaxre_kernels.{op}.dispatch"), "TILES", {})
    variants = {}
    for name in implementations_of(op):
        elsewhere = (
            None
            if runs_on(name, jax.devices()[0])
            else f"is for {HARDWARE[name].description} alone"
        )
        call = partial(function, implementation=name)
        variants[name] = Variant(both(call), name, left_out=elsewhere)
        for tiles in listed.get(name, ()) if sweep else ():
            sizes = ", ".join(f"{key} {size}" for key, size in tiles.items())
            variants[f"{name}, {sizes}"] = Variant(
                both(partial(call, tiles=tiles)), name, tiles, left_out=elsewhere
            )
    return variants


def only_on(platform: str, otherwise: str | None = None) -> str | None:
    return (
        otherwise if jax.devices()[0].platform == platform else f"is for a {platform.upper()} alone"
    )


def missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def normal(
    seed: int, number: int, shape: tuple[int, ...], dtype: str, scale: float = 1.0
) -> jax.Array:
    """Random numbers, never zeros: an H200 multiplies zeros an eighth faster."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def in_f32(inputs: tuple) -> tuple:
    """The same values in f32, so that only the computation is compared."""
    return jax.tree.map(
        lambda array: array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array, inputs
    )


@jax.jit
def _largest(result, expected):
    def relative(result, expected):
        expected = expected.astype(jnp.float32)
        # Tensors of a case are not all zero; one that is would be compared absolutely.
        largest = jnp.max(jnp.abs(expected))
        return jnp.max(jnp.abs(result.astype(jnp.float32) - expected)) / jnp.where(
            largest > 0, largest, 1
        )

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(relative, result, expected))))


def error_of(result: Any, expected: Any) -> float:
    """max|difference| / max|expected|, the largest over tensors; NaN if there is any."""
    return float(_largest(result, expected))


class Oracle:
    """The plain formula of a case in f32 on the values of one set of inputs, and the largest
    allowed error.
    """

    def __init__(self, case: Case, inputs: tuple):
        with jax.default_matmul_precision("highest"):
            self.expected = jax.block_until_ready(jax.jit(case.reference)(*in_f32(inputs)))
            plain = (
                0.0
                if case.dtype == "float32"
                else error_of(jax.jit(case.reference)(*inputs), self.expected)
            )
        self.limit = max(CLOSE[case.dtype], 2 * plain)

    def judge(self, result: Any) -> dict[str, Any]:
        error = error_of(result, self.expected)
        # JSON has no NaN; a comparison with NaN is false.
        return {
            "error": error if np.isfinite(error) else None,
            "limit": self.limit,
            "passed": bool(error <= self.limit),
        }


class Clock:
    """Seconds of a call on the device, median over rounds, each of many calls on inputs in turn
    with the cache flushed between.

    Calls are dispatched without waiting and waited for together, so the flushes hide the host's
    part; the time of as many flushes alone is subtracted. (A device runs calls in order; a CPU does
    not, so there each call is waited for.) `host_bound` is true of the last measurement if the host
    took nearly as long as the device: its seconds may be the host's.
    """

    def __init__(self, dry: bool = False):
        self.settle = (
            jax.block_until_ready if jax.default_backend() == "cpu" else lambda result: result
        )
        self.touch = jax.jit(lambda buffer: buffer + 1, donate_argnums=0)
        self.buffer = jnp.zeros((DRY_TOUCHED if dry else TOUCHED) // 4, jnp.float32)
        self.rounds, self.least = (2, 0.0) if dry else (7, 0.03)
        self.waited = 0.0  # share of the time of the last flushes spent waiting after dispatch
        self.flushes(2)

    def flushes(
        self, count: int, run: Callable | None = None, sets: list[tuple] | None = None
    ) -> float:
        """Seconds of `count` flushes, each followed by a call."""
        jax.block_until_ready(self.buffer)
        began = time.perf_counter()
        result = None
        for number in range(count):
            self.buffer = self.settle(self.touch(self.buffer))
            if run is not None:
                result = self.settle(run(*sets[number % len(sets)]))
        dispatched = time.perf_counter()
        jax.block_until_ready((self.buffer, result))
        ended = time.perf_counter()
        self.waited = (ended - dispatched) / (ended - began)
        return ended - began

    def seconds(self, run: Callable, sets: list[tuple]) -> tuple[float, float, float]:
        """Median, minimum and maximum of the rounds."""
        for inputs in sets:
            jax.block_until_ready(run(*inputs))
        count = int(np.clip(self.least / self.flushes(1, run, sets), len(sets), 60))
        # For tiny shapes, in a dry run, the difference may be zero.
        times, waits = [], []
        for _ in range(self.rounds):
            total = self.flushes(count, run, sets)
            waits.append(self.waited)
            times.append(max(total - self.flushes(count), 1e-9) / count)
        # A CPU is waited for after each call.
        self.host_bound = jax.default_backend() != "cpu" and statistics.median(waits) < HOST_BOUND
        return statistics.median(times), min(times), max(times)

    def copy_rate(self) -> float:
        """Bytes a second, read and written, of the flush."""
        count = 3 if self.least == 0 else 50
        return 2 * self.buffer.nbytes * count / min(self.flushes(count) for _ in range(self.rounds))

    def matrix_rate(self, dtype: str, size: int) -> float:
        """FLOP/s of a square product."""
        sets = [
            (normal(seed, 0, (size, size), dtype), normal(seed, 1, (size, size), dtype))
            for seed in range(2)
        ]
        return 2 * size**3 / self.seconds(jax.jit(jnp.matmul), sets)[0]
