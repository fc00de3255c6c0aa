"""The whole run, from a config to a run folder: `train(load_config("configs/quickstart.yaml"))`.

One function in chapters. The update itself is in `step.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from jaxre.checkpoints.source import Loaded, base_of, tokenizer_folder
from jaxre.config import Config
from jaxre.data.dataset import Dataset, supervised_of
from jaxre.data.packing import Plan
from jaxre.errors import InputError
from jaxre.host_memory import TemporaryMemory, resident
from jaxre.models import sharding
from jaxre.models.quantised import base_bytes, is_nf4
from jaxre.models.weights import AnyArchitecture, parameter_count
from jaxre.training.compilation import Compilations
from jaxre.training.initial import Initial
from jaxre.training.log import RunLog
from jaxre.training.run_folder import run_folder
from jaxre.training.setup import SetUp, set_up
from jaxre.training.step import Metrics, State, make_schedule


def train(config: Config, console: Console | None = None, opened: Loaded | None = None) -> Path:
    """Starts or resumes a run and returns its folder.

    If the folder holds checkpoints of the same config, the run continues from the latest with the
    loss curve of an uninterrupted run.

    Args:
      opened: result of `read_model` for the config's `model`, if a study has it in memory; it is
        not changed.

    Raises:
      InputError: anything in the config, data, weights or run folder that cannot be used.
    """
    console = console or Console()
    sharding.split_cpu(config.mesh.cpu_devices)
    sharding.join_processes()
    first_process = jax.process_index() == 0
    say = functools.partial(console.print, markup=False) if first_process else lambda *_: None

    # ---- data, model, compiled updates ------------------------------------------------------
    setup = set_up(config, say=say, opened=opened, training=True)
    say(describe(setup))
    dataset, plan, mesh, steps = setup.dataset, setup.plan, setup.mesh, setup.steps
    base, validation = setup.initial.base, setup.validation

    # ---- run folder: only once everything above has been accepted ---------------------------
    with run_folder(config, first_process) as run:
        store = RunStore(run / "checkpoints", config.train.keep, config.train.best)

        # ---- resume -----------------------------------------------------------------------------
        start = store.latest or 0
        state = setup.take_state()
        like = shapes_of(state)
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
        if not start:
            if setup.notices:
                log.write("data", 0, {"notices": setup.notices})
            if dataset.train.truncation:
                log.write("truncation", 0, dataclasses.asdict(dataset.train.truncation))
            if dropped:
                log.write("too_long", 0, dropped)
                counts = ", ".join(f"{len(ids)} of {name}" for name, ids in dropped.items())
                say(f"longer than a row and left out, ids in log.jsonl: {counts}")

        # ---- updates ----------------------------------------------------------------------------
        evaluate_every = config.train.evaluate_every or plan.epoch_ends[0]
        checkpoint_every = config.train.checkpoint_every or evaluate_every
        # computed at once, so that a log step computes and waits for nothing
        rates = np.asarray(make_schedule(config, steps)(np.arange(steps)))
        clock = Clock(dataset, plan, start)
        pending: list[Metrics] = []
        memory = TemporaryMemory(setup.temporary_bytes, mesh.devices.flat[0].platform, mesh.size)
        metrics = None
        with progress_bar(console, first_process) as bar, Compilations() as compilations:
            task = bar.add_task("train", total=steps, completed=start, note="")
            for step, rows in enumerate(setup.rows(start, steps), start + 1):
                memory.wait(metrics)
                update = setup.compiled.updates[plan.updates[step - 1].shape]
                state, metrics = update(state, base, rows)
                pending.append(metrics)

                if (
                    step % config.train.log_every == 0
                    or step == steps
                    or step % evaluate_every == 0
                    or step % checkpoint_every == 0
                ):
                    recent = jax.device_get(pending)  # the only wait for the device
                    speed = clock.read(step)
                    for number, update_metrics in enumerate(recent, step - len(recent) + 1):
                        rate = {"learning_rate": float(rates[number - 1])}
                        log.write("train", number, update_metrics.numbers() | rate)
                    log.write("speed", step, speed)
                    log.flush()
                    pending = []
                    note = (
                        f"loss {recent[-1].loss:.4f}  {speed['examples_per_second']:.1f} examples/s"
                        f"  {speed['tokens_per_second']:.0f} tokens/s"
                    )
                    bar.update(task, completed=step, note=note)
                    check_finite(recent, step, run)  # before a checkpoint of this state is written

                validated = None
                if validation and (step % evaluate_every == 0 or step == steps):
                    with clock.paused(), compilations.expected_once("validation"):
                        validated = validation.run(state.trainable, base)
                    log.write("validation", step, validated)
                    # before the checkpoint: a run resumed from it does not validate again
                    log.flush()
                    say(f"step {step}: {described_validation(validated)}")
                if step % checkpoint_every == 0 or step == steps or validated:
                    with clock.paused(), compilations.expected_once("checkpoint"):
                        store.save(step, state, validated)
                if late := compilations.late():
                    log.write("compiled", step, {"programs": late})
                    say(
                        f"step {step}: {', '.join(late)} was compiled during training, which should"
                        " happen before step 1 only; please report it with the run's config.yaml"
                    )
        with clock.paused():
            store.wait()

        # ---- export of the best checkpoint --------------------------------------------------
        best = store.best_step
        if not log.ended:  # a finished run that is started again has this record
            log.write("end", steps, summary_of(setup, clock, best))
        if best != steps:
            del state
            state = store.restore(best, like)
        log.close()
        store.close()
        save_result(
            run, config, setup.initial.architecture, state, tokenizer_folder(config), dataset
        )
        say(f"best checkpoint: step {best}; written to {run}")
    return run


def summary_of(setup: SetUp, clock: Clock, best: int) -> dict[str, Any]:
    """Figures of the whole run; time and speed cover only this process, not those it resumed."""
    tokens, steps = setup.dataset.train.tokens, setup.steps
    fill = setup.plan.fill(tokens.lengths, supervised_of(setup.config, tokens))
    return {
        "best_step": best,
        "train_seconds": clock.seconds,
        "tokens_per_second": (
            float(clock.tokens[steps] - clock.tokens[clock.start]) / max(clock.seconds, 1e-9)
        ),
        "rows": [[shape.rows, shape.length, shape.supervised] for shape in setup.plan.shapes],
        "pad_share": fill.pad,
        "supervised_share": fill.supervised,
        "shared_share": fill.shared,
        "compilations": len(setup.compiled.updates),
        "memory_bytes": sum(setup.compiled.memory),
    }


def described_validation(validated: dict[str, float]) -> str:
    """Line on a validation; of each dataset's own figures it has only the F1."""
    line = "  ".join(
        f"validation {name} {value:.4f}"
        for name, value in validated.items()
        if name in ("loss", "f1", "accuracy") or name.startswith("f1/")
    )
    if not validated.get("collapsed"):
        return line
    collapsed = [
        name.removeprefix("collapsed/")
        for name, value in validated.items()
        if name.startswith("collapsed/") and value
    ]
    where = f" of {', '.join(collapsed)}" if collapsed else ""
    return f"{line}  COLLAPSED: one label is predicted for every example{where}"


def check_finite(recent: list[Metrics], step: int, run: Path) -> None:
    """Raises InputError for a loss or gradient of the updates up to `step` that is not finite."""
    for number, metrics in enumerate(recent, step - len(recent) + 1):
        for name, value in zip(("loss", "gradient norm"), metrics, strict=True):
            if not np.isfinite(value):
                raise InputError(
                    f"{run}: the {name} is {value} at step {number}; lower train.learning_rate and"
                    " give the new run another name (name=...)"
                )


def save_result(
    run: Path,
    config: Config,
    architecture: AnyArchitecture,
    state: State,
    folder: Path,
    dataset: Dataset,
) -> None:
    """Writes `adapter/` (PEFT) or `model/` (Hugging Face) from the state, replacing older ones."""
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
    """Fetches whole arrays to the host of every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def describe(setup: SetUp) -> Table:
    """Table of the choices of a run, printed before its first step."""
    config, dataset, plan = setup.config, setup.dataset, setup.plan
    initial, compiled, mesh = setup.initial, setup.compiled, setup.mesh
    tokens, device = dataset.train.tokens, mesh.devices.flat[0]
    fill = plan.fill(tokens.lengths, supervised_of(config, tokens))
    trained = sum(leaf.size for leaf in jax.tree.leaves(initial.state.trainable))
    total = parameter_count(initial.architecture)
    classifies = config.train.objective == "classify"
    lora = config.train.method == "lora"
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    arguments, temporary = (size / 2**20 for size in compiled.memory)
    table = Table(title=f"run {config.name}", show_header=False)
    for name, value in (
        (
            "parameters",
            f"{trained:,} trained"
            + (f", {total:,} frozen" if lora else "")
            + f", products in {initial.dtype}",
        ),
        (
            "examples",
            f"{len(tokens):,} ({len(dataset.train.dropped)} too long; token cache"
            f" {'read' if dataset.train.from_cache else 'written'})",
        ),
        ("updates", f"{setup.steps:,} ({config.train.epochs} epochs of {plan.epoch_ends[0]:,})"),
        (
            "rows",
            ", ".join(
                f"{len(plan.updates[0].micro)} x {s.rows} x {s.length}, {s.supervised} supervised"
                for s in plan.shapes
            ),
        ),
        ("pad share", f"{fill.pad:.1%}"),
        ("shared share", f"{fill.shared:.1%} of real tokens serve several examples of a row"),
        (
            "supervised share",
            f"{fill.supervised:.1%} of real tokens ({fill.idle:.1%} of supervised places idle)",
        ),
        *([("head", head_of(dataset, initial))] if classifies else []),
        ("devices", f"{mesh.devices.size} x {device.device_kind} ({axes})"),
        ("attention", compiled.kernels.get("attention", "xla, of the classified tokens alone")),
        ("cross-entropy", compiled.kernels.get("cross_entropy", "xla (the only one of encoders)")),
        *([("base", described_base(initial)), ("LoRA", compiled.kernels["lora"])] if lora else []),
        ("compilations", f"{len(compiled.updates)}, one a row shape"),
        ("compilation cache", setup.cache),
        ("rematerialisation", compiled.described_remat()),
        (
            "compiled memory",
            f"{arguments + temporary:,.0f} MiB a device ({arguments:,.0f} weights, state and rows;"
            f" {temporary:,.0f} temporary)",
        ),
        *([("process memory", described_process(setup))] if device.platform == "cpu" else []),
    ):
        table.add_row(name, value)
    return table


def described_process(setup: SetUp) -> str:
    """Peak memory of a process on CPU cores: its memory now, with base, state and compiled
    programs, plus the temporary arrays of an update.
    """
    now, temporary = resident(), setup.temporary_bytes
    return (
        f"{(now + temporary) / 2**20:,.0f} MiB at the peak of an update ({now / 2**20:,.0f} held"
        f" now, {temporary / 2**20:,.0f} temporary)"
    )


def described_base(initial: Initial) -> str:
    """Bytes and dtype of the frozen base."""
    projections = [leaf for leaf in jax.tree.leaves(initial.base, is_leaf=is_nf4) if is_nf4(leaf)]
    total, quantised = (
        f"{base_bytes(part) / 2**20:,.1f} MiB" for part in (initial.base, projections)
    )
    if not projections:
        return f"{total} ({initial.dtype})"
    return (
        f"{total} (projections NF4, {quantised}, dequantised in LoRA's products; the rest"
        f" {initial.dtype})"
    )


def head_of(dataset: Dataset, initial: Initial) -> str:
    """Head and marker tokens of an encoder, and its dropout."""
    fresh = f"drawn at random: {', '.join(initial.fresh)}" if initial.fresh else "from the model"
    markers = f"{len(dataset.new_tokens)} new marker tokens"
    return (
        f"{len(dataset.schema.labels)} labels ({fresh}); {markers}; dropout"
        f" {initial.architecture.dropout:g} (config.json)"
    )


def progress_bar(console: Console, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    )


@dataclass
class Clock:
    """Training time without pauses, and the examples and tokens trained in it."""

    dataset: Dataset
    plan: Plan
    start: int
    pauses: float = 0.0

    def __post_init__(self) -> None:
        lengths = self.dataset.train.tokens.lengths
        examples = [
            np.fromiter((i for rows in update.micro for row in rows for i in row), np.int64)
            for update in self.plan.updates
        ]
        self.examples = np.cumsum([0, *map(len, examples)])
        self.tokens = np.cumsum([0, *(int(lengths[indices].sum()) for indices in examples)])
        self.began = time.perf_counter()
        self.last = (self.start, 0.0)

    @property
    def seconds(self) -> float:
        """Seconds since the first step of this process, without pauses."""
        return time.perf_counter() - self.began - self.pauses

    def read(self, step: int) -> dict[str, float]:
        """Examples and real tokens per second since the last reading."""
        last_step, last_seconds = self.last
        seconds = self.seconds
        self.last = (step, seconds)
        passed = max(seconds - last_seconds, 1e-9)
        return {
            "examples_per_second": float(self.examples[step] - self.examples[last_step]) / passed,
            "tokens_per_second": float(self.tokens[step] - self.tokens[last_step]) / passed,
            "seconds": seconds,
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.pauses += time.perf_counter() - began
