"""A run brought up to its first step, as the loop does it, without a run folder."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np

from jaxre.checkpoints.source import dtype_of, tokenizer_folder
from jaxre.compilation_cache import use_compilation_cache
from jaxre.config import Config
from jaxre.data.dataset import Dataset, load_dataset, make_plan
from jaxre.data.packing import Plan, Update
from jaxre.data.rows import Rows
from jaxre.data.tokens import TokenSet
from jaxre.host_memory import TemporaryMemory
from jaxre.training import sharding
from jaxre.training.compilation import Compilations, CompiledUpdates, compile_updates
from jaxre.training.initial import Initial, check_tokens, initial_state
from jaxre.training.loop import prepared, temporary_bytes
from jaxre.training.step import Metrics, State, make_optimiser


@dataclass
class Prepared:
    """`update` runs the next update of the plan; after the last comes the first again.

    `compiled` has the update of each row shape, compiled in `compile_seconds`, `cached` of all
    programs from the compilation cache. `initial.state` is donated by the first update.
    """

    config: Config
    dataset: Dataset
    plan: Plan
    mesh: jax.sharding.Mesh
    initial: Initial
    compiled: CompiledUpdates
    compile_seconds: float
    cached: int
    done: int = 0
    state: State | None = None
    rows: Iterator[Rows] = field(default_factory=lambda: iter(()))
    memory: TemporaryMemory | None = None
    metrics: Metrics | None = None

    def next_rows(self) -> Rows:
        """The rows of the next update, on the device."""
        for rows in self.rows:
            return rows
        put = functools.partial(sharding.put_rows, sharding=sharding.row_sharding(self.mesh))
        self.rows = prepared(self.config, self.dataset, self.plan, 0, len(self.plan.updates), put)
        return next(self.rows)

    def update(self, rows: Rows) -> Metrics:
        """Runs the update of `rows`, which `next_rows` gave; does not wait for the device."""
        shape = self.plan.updates[self.done % len(self.plan.updates)].shape
        state = self.initial.state if self.state is None else self.state
        if self.memory is None:
            device = self.mesh.devices.flat[0]
            temporary = temporary_bytes(self.compiled, self.mesh)
            self.memory = TemporaryMemory(temporary, device.platform, self.mesh.size)
        self.memory.wait(self.metrics)  # as the loop does
        self.state, self.metrics = self.compiled.updates[shape](state, self.initial.base, rows)
        self.done += 1
        return self.metrics


def prepare(
    config: Config,
    dataset: Dataset | None = None,
    plan_of: Callable[[Config, TokenSet, int], Plan] = make_plan,
) -> Prepared:
    """Data, plan, state and compiled updates of a run.

    Args:
      dataset: the config's own if not given.
      plan_of: called as `make_plan` is; another plan than the config's is how a benchmark switches
        a saving off.

    Raises:
      InputError: anything in the config, data or weights that cannot be used.
    """
    sharding.split_cpu(config.mesh.cpu_devices)
    use_compilation_cache(warnings.warn)
    mesh = sharding.make_mesh(config.mesh)
    dataset = load_dataset(config, tokenizer_folder(config)) if dataset is None else dataset
    plan = plan_of(config, dataset.train.tokens, sharding.row_shards(mesh))
    dtype = dtype_of(config).dtype
    optimiser = make_optimiser(config, len(plan.updates))
    initial = initial_state(config, dtype, optimiser, mesh, dataset)
    check_tokens(dataset, initial.architecture)
    began = time.perf_counter()
    with Compilations() as seen:
        compiled = compile_updates(config, plan, initial, optimiser, mesh)
    return Prepared(
        config, dataset, plan, mesh, initial, compiled, time.perf_counter() - began, seen.read
    )


def members(update: Update) -> np.ndarray:
    """The examples of an update, in the order of its rows."""
    return np.fromiter(
        (example for rows in update.micro for row in rows for example in row), np.int64
    )
