"""Measures how fast this machine's cores multiply f32 and bf16, for `model.dtype=auto` on a CPU.

This is done once for a kind of processor (about a second) and cached in
~/.cache/jaxre/products.json.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

CACHE = "~/.cache/jaxre/products.json"
# A product of LoRA training: 2,048 tokens, the MLP of a model with 135M parameters.
TOKENS, INPUTS, OUTPUTS = 2048, 576, 1536
TRIES = 5
# Required speedup of bf16, which adds rounding between the products.
GAIN = 1.2


class Rates(NamedTuple):
    """FLOP/s of products with f32 results, by the dtype of their operands."""

    float32: float
    bfloat16: float

    @property
    def faster(self) -> str:
        """The dtype to multiply in."""
        return "bfloat16" if self.bfloat16 >= GAIN * self.float32 else "float32"

    def words(self) -> str:
        return (
            f"bfloat16 products {self.bfloat16 / 1e9:.0f} GFLOP/s, float32"
            f" {self.float32 / 1e9:.0f}: {self.faster}"
        )


def product_rates(cache: Path | None = None, measure: Callable[[], Rates] | None = None) -> Rates:
    """The rates of this kind of processor: from the cache, else measured and cached.

    Args:
      cache: the file, CACHE by default; ignored if it cannot be read or written.
      measure: `measured_rates` by default.
    """
    path = Path(CACHE).expanduser() if cache is None else cache
    rates = _read(path)
    key = processor()
    if key not in rates:
        rates[key] = (measure or measured_rates)()
        _write(path, rates)
    return rates[key]


def processor() -> str:
    """Key of the rates: the processor's name and bf16 flags, number of cores, version of jaxlib."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    about = {
        name: next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
        for name in ("model name", "flags")
    }
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Virtual machines use one name for several generations.
    bf16 = sorted(flag for flag in about["flags"].split() if "bf16" in flag)
    name = about["model name"] or platform.processor() or platform.machine()
    return f"{name} ({', '.join(bf16) or 'no bf16'}), {cores} cores, jaxlib {version('jaxlib')}"


def measured_rates() -> Rates:
    """Times both products alternately and takes the fastest of each, so that other work on the
    machine affects both equally.
    """
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (TOKENS, INPUTS))
    w = jax.random.normal(jax.random.key(1), (INPUTS, OUTPUTS))
    product = jax.jit(lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32))
    operands = [(x.astype(dtype), w.astype(dtype)) for dtype in (jnp.float32, jnp.bfloat16)]
    best = [float("inf"), float("inf")]
    for number in range(TRIES + 1):
        for index, pair in enumerate(operands):
            began = time.perf_counter()
            jax.block_until_ready(product(*pair))
            if number:  # the first compiles
                best[index] = min(best[index], time.perf_counter() - began)
    return Rates(*(2.0 * TOKENS * INPUTS * OUTPUTS / seconds for seconds in best))


def _read(path: Path) -> dict[str, Rates]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {key: Rates(*map(float, rates)) for key, rates in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _write(path: Path, rates: dict[str, Rates]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, delete=False, encoding="utf-8"
        ) as file:
            json.dump(rates, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        pass  # measured again next time
