"""`jaxre profile`: the work of a run, the rates of this machine, the speed of the run, and what
bounds it.

    profile = profile_run(load_config("configs/quickstart.yaml"), steps=10)

Writes `profile.json`, `profile.png` and a trace (TensorBoard, Perfetto) to OUTPUT/NAME-profile,
never a run folder.
"""

from __future__ import annotations

import datetime
import itertools
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from jaxre.checkpoints.source import tokenizer_folder
from jaxre.config import Config, check_config
from jaxre.data.dataset import supervised_of
from jaxre.data.packing import Update
from jaxre.data.rows import Rows
from jaxre.errors import DoesNotFit, InputError
from jaxre.evaluation.evaluate import write_json
from jaxre.models import sharding
from jaxre.models.architecture import EncoderArchitecture
from jaxre.models.kernels import ops_of
from jaxre.models.weights import parameter_count
from jaxre.objectives import load_dataset
from jaxre.profiling.ledger import (
    Work,
    bytes_on_device,
    flops_of,
    program_flops,
    savings_of,
    work_of,
)
from jaxre.profiling.measure import (
    Timed,
    copy_rate,
    datasheet_rate,
    matrix_rate,
    sizes_for,
    square_rate,
    time_updates,
)
from jaxre.profiling.memory import peak_memory
from jaxre.profiling.picture import draw
from jaxre.profiling.updates import Updates, members
from jaxre.training.setup import SetUp, set_up
from jaxre.training.step import make_optimiser, make_update

# Updates whose rows the ledger reads; at 8 examples each, their mean length is within 0.3% of
# SemEval's (one standard error).
COUNTED = 256
ACCUMULATIONS = (1, 2, 4, 8)


def profile_run(config: Config, steps: int = 10) -> dict[str, Any]:
    """Counts, measures `steps` updates, and writes the profile folder.

    Returns:
      The contents of `profile.json`: FLOPs, bytes and seconds per update unless a name says
      otherwise.

    Raises:
      InputError: the config, data or weights cannot be used, or the profile folder contains a run.
    """
    folder = profile_folder(config)
    run = set_up(config)
    make_folder(folder)
    ledger = ledger_of(run)
    shutil.rmtree(folder / "trace", ignore_errors=True)
    timed = time_updates(Updates(run), steps, folder / "trace")
    profile = {
        "config": config.model_dump(mode="json"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": f"{run.mesh.devices.size} x {run.mesh.devices.flat[0].device_kind}",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "flax")},
        },
        "parameters": parameter_count(run.initial.architecture),
        "ledger": ledger,
        "measured": measured(run, timed, ledger),
        "folder": str(folder),
    }
    profile["verdict"] = verdict(profile)
    draw(profile, folder / "profile.png")
    write_json(folder / "profile.json", profile)
    return profile


def profile_folder(config: Config) -> Path:
    """OUTPUT/NAME-profile, beside the run folder, which stays free for training. Raises InputError
    if it contains a run.
    """
    folder = config.run_folder.with_name(config.name + "-profile")
    if (folder / "config.yaml").exists():
        raise InputError(f"{folder}: already contains a run; choose another name (name=...)")
    return folder


def make_folder(folder: Path) -> None:
    """Raises InputError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made ({error.strerror}); name a folder that can be written"
            " (output=...)"
        ) from None


def ledger_of(run: SetUp) -> dict[str, Any]:
    """The necessary work of the plan's updates, by part, and the least time for it on this machine;
    means over the first COUNTED updates.
    """
    architecture, config = run.initial.architecture, run.config
    lora = config.lora if config.train.method == "lora" else None
    updates = counted_updates(run)
    encoder = isinstance(architecture, EncoderArchitecture)
    work, positions, row_tokens = Work(0, 0, 0, 0, 0), 0, 0
    for rows in run.host_rows(0, len(updates)):
        update_work = work_of(rows, encoder, None if encoder else architecture.window)
        work += update_work
        positions += rows.tokens.size
        row_tokens += update_work.tokens * rows.tokens.shape[-1]
    train_tokens = run.dataset.train.tokens
    examples = np.concatenate([members(update) for update in updates])
    lengths = train_tokens.lengths[examples]
    flops = {
        part: value / len(updates) for part, value in flops_of(work, architecture, lora).items()
    }
    total = sum(flops.values())

    largest = max(run.plan.shapes, key=lambda shape: shape.rows * shape.length)
    rate = matrix_rate(architecture, largest.rows, largest.length, run.initial.dtype, run.mesh)
    bandwidth = copy_rate(run.mesh)
    state = run.initial.state
    arguments, temporary = run.compiled.memory
    memory = {
        "base": bytes_on_device(run.initial.base),
        "trained": bytes_on_device(state.trainable),
        "optimiser": bytes_on_device(state.optimiser),
        "activations": temporary,
    }
    memory["rows"] = max(0, arguments - memory["base"] - memory["trained"] - memory["optimiser"])
    # Least traffic: each micro-batch reads the weights forward and backward; trained weights and
    # optimiser state are read and written once.
    micro = len(updates[0].micro)
    weights = memory["base"] or memory["trained"]
    traffic = 2 * micro * weights + 2 * (memory["trained"] + memory["optimiser"])
    return {
        "updates": len(updates),
        "examples": len(examples) / len(updates),
        "flops": flops | {"total": total},
        "flops_per_example": total * len(updates) / len(examples),
        "program_flops": executed(run),
        "savings": [
            {
                "name": saving.name,
                "before": saving.before / len(updates),
                "after": saving.after / len(updates),
                "removed": saving.removed,
            }
            for saving in savings_of(
                work, lengths.tolist(), row_tokens / work.tokens, architecture, lora
            )
        ],
        "shares": {
            "pad": 1 - work.tokens / positions,
            "supervised": (
                int(supervised_of(config, train_tokens)[examples].sum()) / int(lengths.sum())
            ),
            "shared": 1 - work.tokens / int(lengths.sum()),
        },
        "memory": memory,
        "matrix_rate": rate,
        "square": {
            "size": sizes_for(run.mesh).square,
            "rate": square_rate(run.initial.dtype, run.mesh),
        },
        "datasheet_rate": datasheet_rate(run.mesh, run.initial.dtype),
        "copy_rate": bandwidth,
        "traffic": traffic,
        "floor": {"products": total / rate, "traffic": traffic / bandwidth},
    }


def counted_updates(run: SetUp) -> tuple[Update, ...]:
    """The updates that the ledger counts: the first COUNTED of the first epoch."""
    return run.plan.updates[: min(COUNTED, run.plan.epoch_ends[0])]


def executed(run: SetUp) -> float | None:
    """FLOPs of the products in the traced update, including padding, masked blocks and
    recomputation; mean over the counted updates. None if a kernel hides some.
    """
    config, initial = run.config, run.initial
    step = make_update(
        config,
        initial.architecture,
        make_optimiser(config, len(run.plan.updates)),
        initial.dtype,
        ops_of(config.kernels, run.mesh),
        run.compiled.remat,
    )
    updates = counted_updates(run)
    flops = {}
    for number, update in enumerate(updates):
        if update.shape not in flops:
            rows = next(run.host_rows(number, number + 1))
            rows = Rows(*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in rows))
            flops[update.shape] = program_flops(
                jax.make_jaxpr(step, static_argnums=3)(
                    initial.state, initial.base, rows, update.shape
                )
            )
    if None in flops.values():
        return None
    return sum(flops[update.shape] for update in updates) / len(updates)


def measured(run: SetUp, timed: Timed, ledger: dict[str, Any]) -> dict[str, Any]:
    """Figures of the timed updates. Model FLOPs per example are the ledger's, though the timed
    examples may be longer or shorter.
    """
    rate = ledger["flops_per_example"] * timed.examples_per_second
    datasheet = ledger["datasheet_rate"]
    return {
        "updates": timed.updates,
        "seconds": timed.seconds,
        "share_of_floor": max(ledger["floor"].values()) / timed.seconds,
        "split": {"input_wait": timed.input_wait, "host": timed.host, "device": timed.device},
        "examples_per_second": timed.examples_per_second,
        "tokens_per_second": timed.tokens_per_second,
        "model_flops_per_second": rate,
        "mfu": rate / ledger["matrix_rate"],
        "mfu_datasheet": rate / datasheet if datasheet else None,
        "compile_seconds": run.compile_seconds,
        "compilations": len(run.compiled.updates),
        "from_cache": run.programs_read,
        "remat": run.compiled.remat,
        "peak_memory": peak_memory(run.mesh.devices.flat[0]),
    }


def verdict(profile: dict[str, Any]) -> str:
    """A paragraph on what bounds the run."""
    ledger, timing = profile["ledger"], profile["measured"]
    seconds, split, floor = timing["seconds"], timing["split"], ledger["floor"]
    # If a kernel hides the program's products, at least the necessary ones.
    times = times_needed(ledger) or 1.0
    waiting, host = split["input_wait"] / sum(split.values()), split["host"] / sum(split.values())
    spent = times * floor["products"] / seconds
    if waiting > 0.1:
        bound = f"Waiting for input bounds this run: {waiting:.0%} of an update."
    elif host > 0.3:
        bound = (
            f"The host bounds this run: {host:.0%} of an update passes before the device has its"
            " work; give it more tokens an update."
        )
    elif spent >= 0.5:
        bound = "The device's products bound this run."
    elif floor["traffic"] > floor["products"]:
        bound = (
            "Reading weights and state bounds this run, not computing with them; give the device"
            " more tokens an update."
        )
    else:
        bound = (
            "The device bounds this run, but not by its products: small or elementwise operations"
            " take most of an update (see the trace)."
        )
    rates = f"{ledger['matrix_rate'] / 1e12:.3g} TFLOP/s, {ledger['copy_rate'] / 1e9:.3g} GB/s"
    text = (
        f"{bound} An update takes {seconds:.3g} s; at the measured rates ({rates}) what the model"
        f" needs would take {timing['share_of_floor']:.0%} of that."
    )
    if ledger["program_flops"] is None:
        return f"{text} The program's products are not counted: a kernel hides them."
    return (
        f"{text} The program multiplies {times:.2f} times what is needed (pads, masked pairs,"
        f" recomputation), {spent:.0%} of the update at that rate; the other"
        f" {max(0.0, 1 - spent):.0%} are operations that are no products, products slower than"
        " alone, and waiting."
    )


def times_needed(ledger: dict[str, Any]) -> float | None:
    """The program's FLOPs over the necessary FLOPs; None if the former are not counted."""
    if ledger["program_flops"] is None:
        return None
    return ledger["program_flops"] / ledger["flops"]["total"]


def sweep_rows(config: Config, steps: int = 5) -> list[dict[str, Any]]:
    """Compiles and times rows x T (and accumulation) at the same number of tokens or examples per
    update. The fastest comes first; those that do not fit the device's memory have an `error` and
    come last.

    Raises:
      DoesNotFit: nothing fits.
      InputError: as `profile_run` does.
    """
    sharding.split_cpu(config.mesh.cpu_devices)
    longest = int(load_dataset(config, tokenizer_folder(config)).train.tokens.lengths.max())
    shards = sharding.row_shards(sharding.make_mesh(config.mesh))
    fields = config.model_dump(mode="json")
    trials = []
    for changes in candidates(config, longest, shards):
        changed = check_config(fields | {"train": fields["train"] | changes}, "sweep")
        try:
            result = timed_rows(changed, steps)
        except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, DoesNotFit) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            result = {"error": "does not fit the device's memory"}
        trials.append({"settings": changes} | result)
    if all("error" in trial for trial in trials):
        raise DoesNotFit(
            "nothing of the sweep fits the device's memory: lower train.batch_tokens or"
            " train.batch_examples"
        )
    return sorted(trials, key=lambda trial: -trial.get("examples_per_second", 0.0))


def timed_rows(config: Config, steps: int) -> dict[str, Any]:
    """One trial of a sweep. Frees its run when it returns or raises, before the next trial needs as
    much memory.
    """
    run = set_up(config)
    try:
        timed = time_updates(Updates(run), steps)
        return {
            "shapes": [[shape.rows, shape.length, shape.supervised] for shape in run.plan.shapes],
            "examples_per_second": timed.examples_per_second,
            "tokens_per_second": timed.tokens_per_second,
            "compile_seconds": run.compile_seconds,
            "memory": sum(run.compiled.memory),
        }
    finally:
        del run


def candidates(config: Config, longest: int, shards: int) -> list[dict[str, int]]:
    """Settings of `train` for a sweep: a quarter to four times the config's row length, and for a
    batch of tokens several accumulations.

    Args:
      longest: tokens of the longest example; shorter rows would train on other examples.
      shards: number of devices that share the rows.
    """
    train = config.train
    lengths = [
        length
        for length in (train.row_length * factor // 4 for factor in (1, 2, 4, 8, 16))
        if length >= max(longest, 8)
    ]
    if train.batch_examples is not None:
        return [{"row_length": length} for length in lengths]
    return [
        {"row_length": length, "accumulation": accumulation}
        for length, accumulation in itertools.product(lengths, ACCUMULATIONS)
        if train.batch_tokens % (length * accumulation * shards) == 0
    ]


def overrides_of(trial: dict[str, Any]) -> str:
    """The settings of a trial as command-line overrides."""
    return " ".join(f"train.{name}={value}" for name, value in trial["settings"].items())


def sweep_table(trials: list[dict[str, Any]]) -> Table:
    """Tabulates the result of `sweep_rows`."""
    table = Table(title="rows of the same batch, the fastest first")
    table.add_column("settings", overflow="fold")
    for column in ("examples/s", "real tokens/s", "MiB a device", "compilation, s"):
        table.add_column(column, justify="right")
    for trial in trials:
        settings = overrides_of(trial)
        if "error" in trial:
            table.add_row(settings, trial["error"])
            continue
        speeds = (f"{trial[name]:,.4g}" for name in ("examples_per_second", "tokens_per_second"))
        table.add_row(
            settings, *speeds, f"{trial['memory'] / 2**20:,.0f}", f"{trial['compile_seconds']:.3g}"
        )
    return table


def profile_table(profile: dict[str, Any]) -> Table:
    """Tabulates the result of `profile_run`."""
    ledger, timing = profile["ledger"], profile["measured"]
    flops = {part: value for part, value in ledger["flops"].items() if value}
    shares, square, times = ledger["shares"], ledger["square"], times_needed(ledger)

    def listed(parts: dict[str, float], unit: float, name: str) -> str:
        return ", ".join(f"{part} {value / unit:,.4g} {name}" for part, value in parts.items())

    table = Table(title=f"profile of {profile['config']['name']}", show_header=False)
    table.add_row("device", profile["device"])
    table.add_row("FLOPs an update", listed(flops, 1e9, "G"))
    for saving in ledger["savings"]:
        removed = f"{saving['removed']:.1%} of {saving['before'] / 1e9:,.4g} G"
        table.add_row(f"saved: {saving['name']}", removed)
    table.add_row(
        "the program multiplies",
        f"{times:.2f} x what the model needs" if times else "not counted, a kernel hides it",
    )
    table.add_row(
        "shares",
        f"pad {shares['pad']:.1%}, supervised {shares['supervised']:.1%}, shared"
        f" {shares['shared']:.1%}",
    )
    table.add_row("memory a device", listed(ledger["memory"], 2**20, "MiB"))
    table.add_row(
        "measured rates",
        f"{ledger['matrix_rate'] / 1e12:.4g} TFLOP/s (products of the model's shapes),"
        f" {square['rate'] / 1e12:.4g} TFLOP/s (square ones of {square['size']:,}),"
        f" {ledger['copy_rate'] / 1e9:.4g} GB/s",
    )
    table.add_row("floor of an update", listed(ledger["floor"], 1e-3, "ms"))
    split = listed(timing["split"], 1e-3, "ms")
    table.add_row("an update takes", f"{timing['seconds'] * 1e3:,.4g} ms; one at a time {split}")
    table.add_row("the floor's share of that", f"{timing['share_of_floor']:.1%}")
    table.add_row(
        "speed",
        f"{timing['examples_per_second']:,.4g} examples/s,"
        f" {timing['tokens_per_second']:,.4g} real tokens/s",
    )
    table.add_row("MFU, needed FLOPs against the measured rate", f"{timing['mfu']:.1%}")
    if timing["mfu_datasheet"]:
        table.add_row("MFU against the datasheet's rate", f"{timing['mfu_datasheet']:.1%}")
    table.add_row(
        "compilation",
        f"{timing['compile_seconds']:.3g} s for {timing['compilations']} row shapes"
        f" ({timing['from_cache']} from the cache)",
    )
    table.add_row("rematerialisation", timing["remat"])
    table.add_row("peak memory", f"{timing['peak_memory'] / 2**20:,.0f} MiB")
    return table
