"""Set-up of a run before its first update, shared by training, profiles, benchmarks and sweeps.

run = set_up(load_config("configs/quickstart.yaml"))
state = run.take_state()
for rows in run.rows(0, run.steps): ...
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax

from jaxre.checkpoints.source import Loaded, dtype_of, tokenizer_folder
from jaxre.compilation_cache import use_compilation_cache
from jaxre.config import Config
from jaxre.data.dataset import Dataset, make_plan
from jaxre.data.loader import updates
from jaxre.data.packing import Plan
from jaxre.data.rows import Rows
from jaxre.data.tokens import TokenSet
from jaxre.models import sharding
from jaxre.objectives import load_dataset, objective_of
from jaxre.training.compilation import Compilations, CompiledUpdates, compile_updates
from jaxre.training.initial import Initial, check_tokens, initial_state, start_reading
from jaxre.training.preview import data_notices, leak_notice
from jaxre.training.step import LossSum, State, make_optimiser

MakePlan = Callable[[Config, TokenSet, int], Plan]


class Validation(Protocol):
    """The validation of an objective."""

    def run(self, trainable: Any, base: Any) -> dict[str, float]: ...


@dataclass
class SetUp:
    """A run before its first update.

    plan: whole epochs; the run ends after `steps` of its updates. compiled: the update of each row
    shape, compiled in `compile_seconds`; `programs_read` programs came from the compilation cache.
    validation: None without validation data or if the run is not trained. notices: lines about the
    data for the user. cache: a line about the use of the compilation cache.
    """

    config: Config
    dataset: Dataset
    plan: Plan
    steps: int
    mesh: jax.sharding.Mesh
    initial: Initial
    compiled: CompiledUpdates
    validation: Validation | None
    notices: list[str]
    cache: str
    compile_seconds: float
    programs_read: int

    def take_state(self) -> State:
        """Returns the initial state and drops it here, because updates donate it."""
        state = self.initial.state
        self.initial = dataclasses.replace(self.initial, state=None)
        return state

    def rows(self, start: int, stop: int) -> Iterator[Rows]:
        """Yields the rows of the updates after `start` up to `stop`, on the devices."""
        put = functools.partial(sharding.put_rows, sharding=sharding.row_sharding(self.mesh))
        return self.host_rows(start, stop, put)

    def host_rows(
        self, start: int, stop: int, put: Callable[[Rows], Rows] = lambda rows: rows
    ) -> Iterator[Rows]:
        """Yields the same rows where `put` places them; on the host by default."""
        tokens, weight = self.dataset.train.tokens, self.config.train.prompt_weight
        return itertools.islice(updates(tokens, self.plan, start, weight, put), stop - start)

    @property
    def temporary_bytes(self) -> int:
        """Temporary bytes of an update, on all devices of this process."""
        return self.compiled.memory[1] * len(self.mesh.local_devices)


def set_up(
    config: Config,
    *,
    say: Callable[[object], None] = lambda _: None,
    opened: Loaded | None = None,
    dataset: Dataset | None = None,
    plan_of: MakePlan = make_plan,
    loss: LossSum | None = None,
    training: bool = False,
) -> SetUp:
    """Reads data and weights, plans the rows and compiles the updates of a run.

    Args:
      say: prints a message to the user.
      opened: the model at `model.path`, if it is in memory already; it is not changed.
      dataset: by default that of the config.
      plan_of, loss: replace `make_plan` and the objective's loss, for benchmarks that switch a
        saving off.
      training: the run will be trained: looks for held-out examples in the training data and
        prepares the validation data.

    Raises:
      InputError: anything in the config, data or weights that cannot be used.
    """
    sharding.split_cpu(config.mesh.cpu_devices)
    sharding.join_processes()
    cache = use_compilation_cache(say)

    # ---- data
    folder = tokenizer_folder(config)
    mesh = sharding.make_mesh(config.mesh)
    dtype, why = dtype_of(config)
    if why:
        say(f"model.dtype=auto: {why}")
    # One core reads the weights while another prepares the data.
    read = start_reading(config, dtype) if opened is None else lambda: opened
    dataset = load_dataset(config, folder) if dataset is None else dataset
    plan = plan_of(config, dataset.train.tokens, sharding.row_shards(mesh))
    notices = data_notices(config, dataset) if training else []
    for line in [*filter(None, [training and leak_notice(config, dataset)]), *notices]:
        say(line)
    steps = min(len(plan.updates), config.train.max_steps or len(plan.updates))

    # ---- model and state
    optimiser = make_optimiser(config, steps)
    initial = initial_state(config, dtype, optimiser, mesh, dataset, read)
    check_tokens(dataset, initial.architecture)
    validation = None
    if training and dataset.validation:
        measured = objective_of(config).Validation
        validation = measured(config, dataset, initial.architecture, dtype, mesh)

    # ---- compile: every update's shape (validation compiles its own at its first run)
    began = time.perf_counter()
    with Compilations() as compilations:
        compiled = compile_updates(config, plan, initial, optimiser, mesh, loss)
    return SetUp(
        config,
        dataset,
        plan,
        steps,
        mesh,
        initial,
        compiled,
        validation,
        notices,
        f"{cache}: {compilations.read} read, {compilations.written} written",
        time.perf_counter() - began,
        compilations.read,
    )
