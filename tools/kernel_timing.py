"""What is the same for every kernel that is checked or timed: cases and their variants, the oracle,
the clock.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
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

# A result is right when its error, max|difference| / max|reference| to f32, is at most this, or
# twice that of the plain formula in the same dtype: f32 differs by the order of its sums (of at
# most 16,384 products), bf16 keeps 8 bits. In the order of the checks: what training uses on an
# accelerator first.
CLOSE = {"bfloat16": 2.0**-7, "float32": 1e-5}
# Bytes written between two calls: many times the second-level cache of an H200 (60 MB), and long
# enough (0.4 ms there) to hide what the host needs for a call of many small programs.
TOUCHED = 2**30
DRY_TOUCHED = 2**20
# of the time is waited for the device at the end, at least, where the device is what takes it
HOST_BOUND = 0.1


@dataclass(frozen=True)
class Variant:
    """One way to compute a case: `run(*inputs)` gives what the case's reference gives, in the same
    tree.

    implementation, tiles: of ours, as the dispatch names them. left_out: why it is not run here.
    compared: whether the result is the case's; a bare product's is not.
    """

    run: Callable[..., Any]
    implementation: str | None = None
    tiles: dict[str, int] = field(default_factory=dict)
    left_out: str | None = None
    compared: bool = True


@dataclass(frozen=True)
class Case:
    """`inputs(seed)` are the arrays of one call, forward and backward.

    covers: the bounds of sizes, by the table's names, that a measurement of this case stands for;
    None if for none. flops: that the model needs; moved: bytes, each input read and each result
    written once. targets: opponent -> least ratio of its seconds to the fastest of ours.
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
    each of the tile sizes it lists.

    Args:
      op: its folder; function: its entry, whose `implementation` and `tiles` are set here.
      both: makes a run, forward and backward, of an op that is called with the case's arrays.
    """
    known, name = inspect.signature(function).parameters, f"jaxre_kernels.{op}.dispatch"
    listed = (
        getattr(importlib.import_module(name), "TILES", {})
        if importlib.util.find_spec(name)
        else {}
    )
    variants = {}
    for name in implementations_of(op):
        elsewhere = (
            None if runs_on(name, jax.devices()[0]) else f"is for {HARDWARE[name].told} alone"
        )
        call = partial(function, implementation=name) if "implementation" in known else function
        variants[name] = Variant(both(call), name, left_out=elsewhere)
        for tiles in listed.get(name, ()) if sweep and "tiles" in known else ():
            told = ", ".join(f"{key} {size}" for key, size in tiles.items())
            variants[f"{name}, {told}"] = Variant(
                both(partial(call, tiles=tiles)), name, tiles, left_out=elsewhere
            )
    return variants


def only_on(wanted: str, otherwise: str | None = None) -> str | None:
    return otherwise if jax.devices()[0].platform == wanted else f"is for a {wanted.upper()} alone"


def missing(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def normal(
    seed: int, number: int, shape: tuple[int, ...], dtype: str, scale: float = 1.0
) -> jax.Array:
    """Random, never zeros: an H200 multiplies those an eighth faster."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def in_f32(inputs: tuple) -> tuple:
    """The same values, so that only the computation is compared."""
    return jax.tree.map(
        lambda array: array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array, inputs
    )


@jax.jit
def _largest(found, expected):
    def relative(found, expected):
        expected = expected.astype(jnp.float32)
        # No tensor of a case is all zero; were one, its difference itself would be told.
        largest = jnp.max(jnp.abs(expected))
        return jnp.max(jnp.abs(found.astype(jnp.float32) - expected)) / jnp.where(
            largest > 0, largest, 1
        )

    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(relative, found, expected))))


def error_of(found: Any, expected: Any) -> float:
    """max|difference| / max|expected|, the largest over tensors; NaN if there is any."""
    return float(_largest(found, expected))


class Oracle:
    """The plain formula of a case in f32 on the values of one set of inputs, and the error that is
    allowed against it.
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

    def judge(self, found: Any) -> dict[str, Any]:
        error = error_of(found, self.expected)
        # NaN is no number of JSON; a comparison with it is false.
        return {
            "error": error if np.isfinite(error) else None,
            "limit": self.limit,
            "passed": bool(error <= self.limit),
        }


class Clock:
    """Seconds of a call on the device, median over rounds, each of many calls on inputs in turn
    with the cache flushed between.

    Calls are dispatched at once and waited for together, so that the host's part is hidden behind
    the flushes; the time of as many flushes alone is taken off. (A device runs what it is given in
    order; a CPU does not, and is waited for after each call.) Where the host needs nearly as long
    as the device, `host_bound` is true of the last measurement: its seconds may be the host's.
    """

    def __init__(self, dry: bool = False):
        self.settle = (
            jax.block_until_ready if jax.default_backend() == "cpu" else lambda found: found
        )
        self.touch = jax.jit(lambda buffer: buffer + 1, donate_argnums=0)
        self.buffer = jnp.zeros((DRY_TOUCHED if dry else TOUCHED) // 4, jnp.float32)
        self.rounds, self.least = (2, 0.0) if dry else (7, 0.03)
        self.waited = 0.0  # share of the last flushes that passed when all was dispatched
        self.flushes(2)

    def flushes(
        self, count: int, run: Callable | None = None, sets: list[tuple] | None = None
    ) -> float:
        """Seconds of `count` flushes, each with a call behind it."""
        jax.block_until_ready(self.buffer)
        began = time.perf_counter()
        found = None
        for number in range(count):
            self.buffer = self.settle(self.touch(self.buffer))
            if run is not None:
                found = self.settle(run(*sets[number % len(sets)]))
        dispatched = time.perf_counter()
        jax.block_until_ready((self.buffer, found))
        ended = time.perf_counter()
        self.waited = (ended - dispatched) / (ended - began)
        return ended - began

    def seconds(self, run: Callable, sets: list[tuple]) -> tuple[float, float, float]:
        """The median, and the least and the most of the rounds."""
        for inputs in sets:
            jax.block_until_ready(run(*inputs))
        count = int(np.clip(self.least / self.flushes(1, run, sets), len(sets), 60))
        # Of tiny shapes, in a dry run, the difference may come out as nothing.
        times, waits = [], []
        for _ in range(self.rounds):
            both = self.flushes(count, run, sets)
            waits.append(self.waited)
            times.append(max(both - self.flushes(count), 1e-9) / count)
        # (A CPU is waited for as it goes.)
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
