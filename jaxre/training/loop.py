"""The whole run, from a config to a run folder: `train(load_config("configs/quickstart.yaml"))`.

One function, told in chapters. The update itself is in `step.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxre.checkpoints.huggingface import save_base
from jaxre.checkpoints.peft import save_adapter
from jaxre.checkpoints.run_store import RunStore, shapes_of
from jaxre.checkpoints.source import Loaded, base_of, dtype_of, tokenizer_folder
from jaxre.compilation_cache import use_compilation_cache
from jaxre.config import Config
from jaxre.data.dataset import Dataset, load_dataset, make_plan, supervised_of
from jaxre.data.loader import updates
from jaxre.data.packing import Plan
from jaxre.data.preview import told_data, told_leaks
from jaxre.data.rows import Rows
from jaxre.errors import InputError
from jaxre.host_memory import TemporaryMemory, resident
from jaxre.models.quantised import base_bytes, is_nf4
from jaxre.models.weights import AnyArchitecture, parameter_count
from jaxre.training import sharding
from jaxre.training.compilation import Compilations, CompiledUpdates, compile_updates
from jaxre.training.initial import Initial, check_tokens, initial_state, start_reading
from jaxre.training.log import RunLog
from jaxre.training.run_folder import run_folder
from jaxre.training.step import Metrics, State, make_optimiser, make_schedule
from jaxre.training.validate import LabelValidation, Validation, told


def train(config: Config, console: Console | None = None, opened: Loaded | None = None) -> Path:
    """Runs or resumes a run and returns its folder.

    A folder that holds checkpoints of the same config is continued where it stopped; the loss
    curve goes on as if it had not.

    Args:
      opened: what `read_model` gave for such a `model`, where a study has it in memory; it is not
        changed.

    Raises:
      InputError: anything in the config, data, weights or run folder that cannot be used.
    """
    console = console or Console()
    sharding.split_cpu(config.mesh.cpu_devices)
    sharding.join_processes()
    first_process = jax.process_index() == 0
    say = functools.partial(console.print, markup=False) if first_process else lambda *_: None
    cache = use_compilation_cache(say)

    # ---- data -------------------------------------------------------------------------------
    folder = tokenizer_folder(config)
    mesh = sharding.make_mesh(config.mesh)
    dtype, why = dtype_of(config)
    if why:
        say(f"model.dtype=auto: {why}")
    # Read on one core, while the other one prepares the data.
    read = start_reading(config, dtype) if opened is None else lambda: opened
    dataset = load_dataset(config, folder)
    plan = make_plan(config, dataset.train.tokens, sharding.row_shards(mesh))
    if leaks := told_leaks(config, dataset):
        say(leaks)
    data_told = told_data(config, dataset)
    for line in data_told:
        say(line)
    steps = min(len(plan.updates), config.train.max_steps or len(plan.updates))
    epoch_steps = plan.epoch_ends[0]

    # ---- model and state --------------------------------------------------------------------
    optimiser = make_optimiser(config, steps)
    initial = initial_state(config, dtype, optimiser, mesh, dataset, read)
    state, base, architecture = initial.state, initial.base, initial.architecture
    check_tokens(dataset, architecture)
    validate = LabelValidation if config.train.objective == "classify" else Validation
    validation = (
        validate(config, dataset, architecture, dtype, mesh) if dataset.validation else None
    )

    # ---- compile: every update's shape before step 1 (validation compiles its own at its first
    # run)
    with Compilations() as seen:
        compiled = compile_updates(config, plan, initial, optimiser, mesh)
    say(
        describe(
            config,
            dataset,
            plan,
            initial,
            compiled,
            mesh,
            steps,
            f"{cache}: {seen.read} read, {seen.written} written",
        )
    )

    # ---- run folder: only once everything above has been accepted ---------------------------
    with run_folder(config, first_process) as run:
        store = RunStore(run / "checkpoints", config.train.keep, config.train.best)

        # ---- resume -----------------------------------------------------------------------------
        start = store.latest or 0
        like = shapes_of(state)
        del initial  # with it the fresh state would stay in memory beside the restored one
        if start:
            del state
            state = store.restore(start, like)
            say(f"resumed {run} at step {start} of {steps}")
        log = RunLog(run, start, first_process)
        dropped = {
            name: split.dropped
            for name, split in (("train", dataset.train), ("validation", dataset.validation))
            if split and split.dropped
        }
        if data_told and not start:
            log.write("data", 0, {"told": data_told})
        if dataset.train.truncation and not start:
            log.write("truncation", 0, dataclasses.asdict(dataset.train.truncation))
        if dropped and not start:
            log.write("too_long", 0, dropped)
            say(
                "longer than a row and left out, ids in log.jsonl:"
                f" {', '.join(f'{len(ids)} of {name}' for name, ids in dropped.items())}"
            )

        # ---- updates ----------------------------------------------------------------------------
        evaluate_every = config.train.evaluate_every or epoch_steps
        checkpoint_every = config.train.checkpoint_every or evaluate_every
        put = functools.partial(sharding.put_rows, sharding=sharding.row_sharding(mesh))
        # all at once: nothing to compute or wait for at a log step
        rates = np.asarray(make_schedule(config, steps)(np.arange(steps)))
        clock = Clock(dataset, plan, start)
        pending: list[Metrics] = []
        memory = TemporaryMemory(
            temporary_bytes(compiled, mesh), mesh.devices.flat[0].platform, mesh.size
        )
        metrics = None
        with progress_bar(console, first_process) as bar, Compilations() as compilations:
            task = bar.add_task("train", total=steps, completed=start, told="")
            for step, rows in enumerate(
                prepared(config, dataset, plan, start, steps, put), start + 1
            ):
                memory.wait(metrics)
                update = compiled.updates[plan.updates[step - 1].shape]
                state, metrics = update(state, base, rows)
                pending.append(metrics)

                if (
                    step % config.train.log_every == 0
                    or step == steps
                    or step % evaluate_every == 0
                    or step % checkpoint_every == 0
                ):
                    losses = jax.device_get(pending)  # the only wait for the device
                    speed = clock.read(step)
                    for number, one in enumerate(losses, step - len(losses) + 1):
                        log.write(
                            "train",
                            number,
                            {**one.numbers(), "learning_rate": float(rates[number - 1])},
                        )
                    log.write("speed", step, speed)
                    log.flush()
                    pending = []
                    told_speed = (
                        f"{speed['examples_per_second']:.1f} examples/s "
                        f" {speed['tokens_per_second']:.0f} tokens/s"
                    )
                    bar.update(
                        task, completed=step, told=f"loss {losses[-1].loss:.4f}  {told_speed}"
                    )
                    check_finite(losses, step, run)  # before a checkpoint of this state is written

                validated = None
                if validation and (step % evaluate_every == 0 or step == steps):
                    with clock.paused(), compilations.expected_once("validation"):
                        validated = validation.run(state.trainable, base)
                    log.write("validation", step, validated)
                    # before the checkpoint: a run that goes on from it does not validate again
                    log.flush()
                    say(f"step {step}: {told(validated)}")
                if step % checkpoint_every == 0 or step == steps or validated:
                    with clock.paused(), compilations.expected_once("checkpoint"):
                        store.save(step, state, validated)
                compilations.check(step, run)
        with clock.paused():
            store.wait()

        # ---- the best checkpoint, for others to load
        # ----------------------------------------------
        best = store.best_step
        if not log.ended:  # a finished run that is started again has its record
            log.write("end", steps, summary_of(config, dataset, plan, clock, best, compiled, steps))
        if best != steps:
            del state
            state = store.restore(best, like)
        log.close()
        store.close()
        save_result(run, config, architecture, state, folder, dataset)
        say(f"best checkpoint: step {best}; written to {run}")
    return run


def summary_of(
    config: Config,
    dataset: Dataset,
    plan: Plan,
    clock: Clock,
    best: int,
    compiled: CompiledUpdates,
    steps: int,
) -> dict[str, Any]:
    """The figures of the whole run; time and speed are of this process (a resumed one did the rest
    only).
    """
    tokens = dataset.train.tokens
    fill = plan.fill(tokens.lengths, supervised_of(config, tokens))
    return {
        "best_step": best,
        "train_seconds": clock.seconds,
        "tokens_per_second": (
            float(clock.tokens[steps] - clock.tokens[clock.start]) / max(clock.seconds, 1e-9)
        ),
        "rows": [[shape.rows, shape.length, shape.supervised] for shape in plan.shapes],
        "pad_share": fill.pad,
        "supervised_share": fill.supervised,
        "shared_share": fill.shared,
        "compilations": len(compiled.updates),
        "memory_bytes": sum(compiled.memory),
    }


def check_finite(losses: list[Metrics], step: int, run: Path) -> None:
    """Raises InputError for a loss or gradient, of the updates up to `step`, that is not finite."""
    for number, one in enumerate(losses, step - len(losses) + 1):
        for name, value in zip(("loss", "gradient norm"), one, strict=True):
            if not np.isfinite(value):
                raise InputError(
                    f"{run}: the {name} is {value} at step {number}; lower train.learning_rate and"
                    " give the new run another name (name=...)"
                )


def prepared(
    config: Config,
    dataset: Dataset,
    plan: Plan,
    start: int,
    steps: int,
    put: Callable[[Rows], Rows] = lambda rows: rows,
) -> Iterator[Rows]:
    """The rows of the updates after `start`, up to `steps`, already where `put` brings them."""
    return itertools.islice(
        updates(dataset.train.tokens, plan, start, config.train.prompt_weight, put), steps - start
    )


def save_result(
    run: Path,
    config: Config,
    architecture: AnyArchitecture,
    state: State,
    folder: Path,
    dataset: Dataset,
) -> None:
    """Writes `adapter/` (PEFT) or `model/` (Hugging Face) from the state, replacing those of an
    earlier end.
    """
    trained = fetch(state.trainable)
    if jax.process_index():
        return
    if config.train.method == "lora":
        save_adapter(
            run / "adapter",
            architecture,
            config.lora,
            trained,
            base_of(config.model.path)[0],
            folder,
            replace=True,
        )
    else:
        tokenizer = dataset.tokenizer if config.train.objective == "classify" else None
        save_base(
            run / "model",
            architecture,
            trained,
            folder,
            config=config.model.architecture,
            tokenizer=tokenizer,
            replace=True,
        )


def fetch(tree: Any) -> Any:
    """The whole arrays on the host, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def describe(
    config: Config,
    dataset: Dataset,
    plan: Plan,
    initial: Initial,
    compiled: CompiledUpdates,
    mesh: jax.sharding.Mesh,
    steps: int,
    cache: str,
) -> Table:
    """What was chosen for this run, before its first step; `cache` is what the compilation cache
    did.
    """
    tokens = dataset.train.tokens
    fill = plan.fill(tokens.lengths, supervised_of(config, tokens))
    trained = sum(leaf.size for leaf in jax.tree.leaves(initial.state.trainable))
    total = parameter_count(initial.architecture)
    classifies = config.train.objective == "classify"
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    where = f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind} ({axes})"
    kept, temporary = (size / 2**20 for size in compiled.memory)
    table = Table(title=f"run {config.name}", show_header=False)
    for name, value in (
        (
            "parameters",
            f"{trained:,} trained"
            + (f", {total:,} frozen" if config.train.method == "lora" else "")
            + f", products in {initial.dtype}",
        ),
        (
            "examples",
            (
                f"{len(tokens):,} ({len(dataset.train.dropped)} too long; token cache"
                f" {'read' if dataset.train.from_cache else 'written'})"
            ),
        ),
        ("updates", f"{steps:,} ({config.train.epochs} epochs of {plan.epoch_ends[0]:,})"),
        (
            "rows",
            ", ".join(
                f"{len(plan.updates[0].micro)} x {s.rows} x {s.length}, {s.supervised} supervised"
                for s in plan.shapes
            ),
        ),
        ("pad share", f"{fill.pad:.1%}"),
        (
            "shared share",
            f"{fill.shared:.1%} of real tokens stand in a row for several examples at once",
        ),
        (
            "supervised share",
            f"{fill.supervised:.1%} of real tokens ({fill.idle:.1%} of supervised places idle)",
        ),
        *([("head", head_of(dataset, initial))] if classifies else []),
        ("devices", where),
        ("attention", compiled.kernels.get("attention", "xla, of the classified tokens alone")),
        ("cross-entropy", compiled.kernels.get("cross_entropy", "xla (the only one of encoders)")),
        *([("base", described_base(initial))] if config.train.method == "lora" else []),
        *([("LoRA", compiled.kernels["lora"])] if config.train.method == "lora" else []),
        ("compilations", f"{len(compiled.updates)}, one a row shape"),
        ("compilation cache", cache),
        ("rematerialisation", compiled.told_remat()),
        (
            "compiled memory",
            (
                f"{kept + temporary:,.0f} MiB a device ({kept:,.0f} weights, state and rows;"
                f" {temporary:,.0f} temporary)"
            ),
        ),
        *([("process memory", described_process(compiled, mesh))] if on_cpu(mesh) else []),
    ):
        table.add_row(name, value)
    return table


def on_cpu(mesh: jax.sharding.Mesh) -> bool:
    return mesh.devices.flat[0].platform == "cpu"


def temporary_bytes(compiled: CompiledUpdates, mesh: jax.sharding.Mesh) -> int:
    """Temporary bytes of an update, on all devices of this process."""
    return compiled.memory[1] * len(mesh.local_devices)


def described_process(compiled: CompiledUpdates, mesh: jax.sharding.Mesh) -> str:
    """What a process on CPU cores will hold at its peak: what it holds now, base and state and
    compiled programs with it, and an update's temporary arrays.
    """
    now, temporary = resident(), temporary_bytes(compiled, mesh)
    return (
        f"{(now + temporary) / 2**20:,.0f} MiB at the peak of an update ({now / 2**20:,.0f} held"
        f" now, {temporary / 2**20:,.0f} temporary)"
    )


def described_base(initial: Initial) -> str:
    """Bytes of the frozen base as it is stored, and in what form."""
    projections = [leaf for leaf in jax.tree.leaves(initial.base, is_leaf=is_nf4) if is_nf4(leaf)]
    whole, quantised = (
        f"{base_bytes(part) / 2**20:,.1f} MiB" for part in (initial.base, projections)
    )
    if not projections:
        return f"{whole} ({initial.dtype})"
    return (
        f"{whole} (projections NF4, {quantised}, dequantised in LoRA's products; the rest"
        f" {initial.dtype})"
    )


def head_of(dataset: Dataset, initial: Initial) -> str:
    """What an encoder got for this run, and its dropout."""
    fresh = f"drawn at random: {', '.join(initial.fresh)}" if initial.fresh else "that of the model"
    markers = f"{len(dataset.new_tokens)} new marker tokens"
    return (
        f"{len(dataset.schema.labels)} labels ({fresh}); {markers}; dropout"
        f" {initial.architecture.dropout:g} (config.json)"
    )


def progress_bar(console: Console, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[told]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )


@dataclass
class Clock:
    """Training time without its pauses, and what was done in it."""

    dataset: Dataset
    plan: Plan
    start: int
    pauses: float = 0.0

    def __post_init__(self) -> None:
        lengths = self.dataset.train.tokens.lengths
        chosen = [
            np.fromiter((i for rows in update.micro for row in rows for i in row), np.int64)
            for update in self.plan.updates
        ]
        self.examples = np.cumsum([0, *(len(one) for one in chosen)])
        self.tokens = np.cumsum([0, *(int(lengths[one].sum()) for one in chosen)])
        self.began = time.perf_counter()
        self.last = (self.start, 0.0)

    @property
    def seconds(self) -> float:
        """Since the first step of this process, pauses left out."""
        return time.perf_counter() - self.began - self.pauses

    def read(self, step: int) -> dict[str, float]:
        """Examples and real tokens per second since the last reading."""
        before, then = self.last
        self.last = (step, self.seconds)
        passed = max(self.last[1] - then, 1e-9)
        return {
            "examples_per_second": float(self.examples[step] - self.examples[before]) / passed,
            "tokens_per_second": float(self.tokens[step] - self.tokens[before]) / passed,
            "seconds": self.last[1],
        }

    def paused(self) -> _Pause:
        return _Pause(self)


@dataclass
class _Pause:
    clock: Clock

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.pauses += time.perf_counter() - self.began
