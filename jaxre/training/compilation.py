"""Compilation of a run's updates before its first step, with a policy that fits the device, and a
check that nothing is compiled later.

A policy names what the backward pass recomputes instead of reading it from memory: `none` or
`block` (everything inside the layers, except the last). Loss and gradients are the same in both. No
policy lies between them for attention: a decoder's scores, softmax, SwiGLU and norms are always
recomputed (`jaxre_kernels.attention.blockwise`, `jaxre.models.decoder`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxre.config import Config
from jaxre.data.packing import Plan, RowShape
from jaxre.data.rows import Rows, empty_rows
from jaxre.errors import DoesNotFit
from jaxre.models import sharding
from jaxre.models.kernels import Chosen, ops_of
from jaxre.models.ops import Ops
from jaxre.training.initial import Initial
from jaxre.training.step import LossSum, Metrics, make_update

POLICIES = ("none", "block")
# Share of the reported device memory that stays free: the compiler's figure covers one update, but
# not rows put on the device ahead, nor fragmentation.
HEADROOM = 0.05

CompileOne = Callable[[RowShape, int, str], jax.stages.Compiled]


@dataclass(frozen=True)
class CompiledUpdates:
    """Compiled updates of a run.

    updates: the compiled update of each row shape, all with the policy `remat`. tried: bytes a
    device of each compiled policy, in order. limit: bytes that a run may use of a device, None if
    unknown. kernels: op -> the implementations that run and why, in words (for an encoder, of
    attention only).
    """

    updates: dict[RowShape, jax.stages.Compiled]
    remat: str
    tried: dict[str, int]
    limit: int | None
    kernels: dict[str, str]

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes a device of the largest update: (weights, state and rows; temporary)."""
        return max((memory_of(update) for update in self.updates.values()), key=sum)

    def described_remat(self) -> str:
        """The policy and the reason for it."""
        if self.limit is None:
            return f"{self.remat} (device memory is not known; set it with train.memory_gb)"
        tried = ", ".join(f"{remat} {size / 2**20:,.0f}" for remat, size in self.tried.items())
        return f"{self.remat} (of {self.limit / 2**20:,.0f} MiB a device, takes: {tried})"


def compile_updates(
    config: Config,
    plan: Plan,
    initial: Initial,
    optimiser: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    loss: LossSum | None = None,
) -> CompiledUpdates:
    """Compiles the update for each row shape of the plan, with `train.remat`, or with the first of
    POLICIES that fits the device; `loss` replaces that of the config's objective.

    Raises:
      DoesNotFit: no policy fits; names the largest rows x T that does (compiles smaller ones).
      InputError: a kernel of the config does not run here.
    """
    chosen: Chosen = {}
    ops = ops_of(config.kernels, mesh, chosen)

    def compile_one(shape: RowShape, micro: int, remat: str) -> jax.stages.Compiled:
        return compile_update(config, initial, optimiser, mesh, ops, shape, micro, remat, loss)

    policies = POLICIES if config.train.remat == "auto" else (config.train.remat,)
    limit = memory_limit(config.train.memory_gb, mesh)
    micro = len(plan.updates[0].micro)
    # The largest shape comes first, so that a policy that does not fit costs one compilation.
    shapes = sorted(plan.shapes, key=lambda shape: -shape.rows * shape.length)
    tried: dict[str, int] = {}
    for remat in policies:
        updates: dict[RowShape, jax.stages.Compiled] = {}
        for shape in shapes:
            updates[shape] = compile_one(shape, micro, remat)
            tried[remat] = max(tried.get(remat, 0), sum(memory_of(updates[shape])))
            if limit is not None and tried[remat] > limit:
                break
        else:
            return CompiledUpdates(
                updates,
                remat,
                tried,
                limit,
                {op: "; ".join(reasons) for op, reasons in chosen.items()},
            )
    taken = ", ".join(
        f"{size / 2**20:,.0f} MiB with train.remat={remat}" for remat, size in tried.items()
    )
    advice = largest_that_fits(
        config, shapes[0], micro, limit, sharding.row_shards(mesh), compile_one
    )
    raise DoesNotFit(
        f"rows of {shapes[0].rows} x {shapes[0].length} take {taken}, a run may take"
        f" {limit / 2**20:,.0f} of a device; {advice}"
    )


def compile_update(
    config: Config,
    initial: Initial,
    optimiser: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    ops: Ops,
    shape: RowShape,
    micro: int,
    remat: str,
    loss: LossSum | None = None,
) -> jax.stages.Compiled:
    """Compiles the update for `micro` micro-batches of a row shape, with the state donated."""
    update = make_update(config, initial.architecture, optimiser, initial.dtype, ops, remat, loss)
    outputs = (
        jax.tree.map(lambda leaf: leaf.sharding, initial.state),
        Metrics(*(sharding.replicated(mesh),) * 2),
    )
    row_sharding = sharding.row_sharding(mesh)
    rows = Rows(
        *(
            jax.ShapeDtypeStruct((micro, *array.shape), array.dtype, sharding=row_sharding)
            for array in empty_rows(shape)
        )
    )
    return (
        jax.jit(update, static_argnums=3, donate_argnums=0, out_shardings=outputs)
        .lower(initial.state, initial.base, rows, shape)
        .compile()
    )


def largest_that_fits(
    config: Config, shape: RowShape, micro: int, limit: int, shards: int, compile_one: CompileOne
) -> str:
    """Advice for rows that do not fit: halves their number (to a divisor) until they do."""
    remat, rows = POLICIES[-1] if config.train.remat == "auto" else config.train.remat, shape.rows
    while divisors := [n for n in range(shards, rows // 2 + 1, shards) if shape.rows % n == 0]:
        rows = divisors[-1]
        times = shape.rows // rows
        needed = sum(
            memory_of(compile_one(dataclasses.replace(shape, rows=rows), micro * times, remat))
        )
        if needed <= limit:
            accumulation = config.train.accumulation * times
            return (
                f"the largest that fits is {rows} x {shape.length} ({needed / 2**20:,.0f} MiB with"
                f" train.remat={remat}): set train.accumulation={accumulation}"
                + ("" if config.train.batch_tokens else " or lower train.batch_examples")
            )
    return (
        f"not even {rows} x {shape.length} fits with train.remat={remat}: lower train.row_length,"
        " or take a smaller model"
    )


def memory_limit(memory_gb: float | None, mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that a run may use of a device: the setting, else the smallest report of the mesh's
    devices less HEADROOM, else None (a CPU reports nothing).
    """
    if memory_gb is not None:
        return int(memory_gb * 2**30)
    reported = [(device.memory_stats() or {}).get("bytes_limit") for device in mesh.local_devices]
    return int((1 - HEADROOM) * min(reported)) if all(reported) else None


def memory_of(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Bytes a device: (weights, state and rows; temporary)."""
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


class Compilations:
    """Context manager that records the programs that JAX compiles inside it.

    names: of the compiled programs. read, written: number of programs read from the persistent
    cache, and written to it.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.read = self.written = 0
        self._parts: set[str] = set()

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._record_duration)
        jax.monitoring.register_event_listener(self._record_event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._record_duration)
        jax.monitoring.unregister_event_listener(self._record_event)

    def _record_duration(self, event: str, seconds: float, **metadata: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(metadata.get("fun_name", "a program")))

    def _record_event(self, event: str, **_: Any) -> None:
        self.read += event == "/jax/compilation_cache/cache_hits"
        self.written += event == "/jax/compilation_cache/cache_misses"

    @contextmanager
    def expected_once(self, part: str) -> Iterator[None]:
        """Discards the programs compiled inside it, the first time for each part of a run."""
        before = len(self.names)
        yield
        if part not in self._parts:
            self._parts.add(part)
            del self.names[before:]

    def late(self) -> list[str]:
        """Names of the unexpected programs compiled since the last call."""
        names = list(dict.fromkeys(self.names))
        self.names.clear()
        return names
