"""The updates of a run, compiled before its first step: what they rematerialise to fit the device,
and that none is compiled twice.

A policy says what the backward pass computes again in place of reading it from memory: `none` or
`block` (everything inside a layer but the last). Loss and gradients are the same in each. There is
none between them for attention alone: a decoder's scores, softmax, SwiGLU and norms are never kept
(`jaxre_kernels.attention.blockwise`, `jaxre.models.decoder`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax

from jaxre.config import Config
from jaxre.data.packing import Plan, RowShape
from jaxre.data.rows import Rows, empty_rows
from jaxre.errors import DoesNotFit, InputError
from jaxre.models.ops import Ops
from jaxre.training import sharding
from jaxre.training.initial import Initial
from jaxre.training.kernels import Chosen, ops_of
from jaxre.training.step import Metrics, make_update

POLICIES = ("none", "block")
# Of what a device reports, left free: the compiler's figure is of one update, and knows nothing of
# the rows that are put on the device ahead nor of holes between buffers.
HEADROOM = 0.05

CompileOne = Callable[[RowShape, int, str], jax.stages.Compiled]


@dataclass(frozen=True)
class CompiledUpdates:
    """`updates`: the compiled update of each row shape, all with one policy `remat`.

    `tried`: bytes a device of each policy that was compiled, in order; `limit`: bytes a run may
    take of a device, None if that is not known.
    `kernels`: op -> the implementations that run and why, in words (an encoder has a choice of
    attention alone).
    """

    updates: dict[RowShape, jax.stages.Compiled]
    remat: str
    tried: dict[str, int]
    limit: int | None
    kernels: dict[str, str]

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes a device of the update that needs most: (weights, state and rows; temporary)."""
        return max((memory_of(update) for update in self.updates.values()), key=sum)

    def told_remat(self) -> str:
        """The policy, and why it was chosen."""
        if self.limit is None:
            return (
                f"{self.remat} (how much memory a device has is not known; train.memory_gb says it)"
            )
        tried = ", ".join(f"{remat} {size / 2**20:,.0f}" for remat, size in self.tried.items())
        return f"{self.remat} (of {self.limit / 2**20:,.0f} MiB a device, takes: {tried})"


def compile_updates(
    config: Config,
    plan: Plan,
    initial: Initial,
    optimiser: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> CompiledUpdates:
    """The update for each row shape of the plan, with `train.remat`, or the first of POLICIES that
    fits the device.

    Raises:
      DoesNotFit: none fits (it names the largest rows x T that does, found by compiling smaller
        ones).
      InputError: a kernel that is asked for does not run here.
    """
    chosen: Chosen = {}
    ops = ops_of(config.kernels, mesh, chosen)

    def compile_one(shape: RowShape, micro: int, remat: str) -> jax.stages.Compiled:
        return compile_update(config, initial, optimiser, mesh, ops, shape, micro, remat)

    policies = POLICIES if config.train.remat == "auto" else (config.train.remat,)
    limit = memory_limit(config.train.memory_gb, mesh)
    micro = len(plan.updates[0].micro)
    # What needs most comes first, so that a policy that does not fit costs one compilation.
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
                updates, remat, tried, limit, {op: "; ".join(told) for op, told in chosen.items()}
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
) -> jax.stages.Compiled:
    """The update for `micro` micro-batches of one row shape, with the state donated."""
    update = make_update(config, initial.architecture, optimiser, initial.dtype, ops, remat)
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
    """What to do about rows that do not fit: their number is halved (to a divisor) until they
    do.
    """
    remat, rows = POLICIES[-1] if config.train.remat == "auto" else config.train.remat, shape.rows
    while smaller := [one for one in range(shards, rows // 2 + 1, shards) if shape.rows % one == 0]:
        rows = smaller[-1]
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
    """Bytes that a run may take of a device: the setting, else the least that a device of the mesh
    reports but for HEADROOM, else None (a CPU reports nothing).
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
    """What JAX compiles while this is entered; a run compiles before its first step, and then
    nothing again.

    `names`: of the programs compiled; `read`, `written`: how many came from the persistent cache,
    and went there.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.read = self.written = 0
        self._begun: set[str] = set()

    def __enter__(self) -> Compilations:
        jax.monitoring.register_event_duration_secs_listener(self._timed)
        jax.monitoring.register_event_listener(self._happened)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._timed)
        jax.monitoring.unregister_event_listener(self._happened)

    def _timed(self, event: str, seconds: float, **facts: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(facts.get("fun_name", "a program")))

    def _happened(self, event: str, **_: Any) -> None:
        self.read += event == "/jax/compilation_cache/cache_hits"
        self.written += event == "/jax/compilation_cache/cache_misses"

    @contextmanager
    def expected_once(self, part: str) -> Iterator[None]:
        """What is compiled inside is forgotten the first time that this part of a run is met."""
        before = len(self.names)
        yield
        if part not in self._begun:
            self._begun.add(part)
            del self.names[before:]

    def check(self, step: int, run: Path) -> None:
        """Raises InputError if anything was compiled that is not forgotten."""
        if self.names:
            raise InputError(
                f"{run}: compiled again at step {step}: {', '.join(dict.fromkeys(self.names))}; a"
                " run compiles before its first step only, so this is a bug of jaxre: report it"
                " with the run's config.yaml"
            )
