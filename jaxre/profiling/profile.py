"""`jaxre profile`: what a run has to compute, what this machine can do, what the run does, and what
bounds it.

    found = profile_run(load_config("configs/quickstart.yaml"), steps=10)

Leaves `profile.json`, `profile.png` and a trace (TensorBoard, Perfetto) in OUTPUT/NAME-profile,
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
from jaxre.data.dataset import load_dataset, supervised_of
from jaxre.data.rows import Rows
from jaxre.errors import DoesNotFit, InputError
from jaxre.evaluation.evaluate import write_json
from jaxre.models.architecture import EncoderArchitecture
from jaxre.models.weights import parameter_count
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
from jaxre.profiling.prepared import Prepared, members, prepare
from jaxre.training import sharding
from jaxre.training.kernels import ops_of
from jaxre.training.loop import prepared
from jaxre.training.step import make_optimiser, make_update

# updates whose rows the ledger reads; at 8 examples each, SemEval's mean length is met within 0.3%
# (one standard error)
COUNTED = 256
ACCUMULATIONS = (1, 2, 4, 8)


def profile_run(config: Config, steps: int = 10) -> dict[str, Any]:
    """Counts, measures `steps` updates, and writes the profile folder.

    Returns:
      What `profile.json` holds: numbers in FLOPs, bytes and seconds an update unless their name
      says otherwise.

    Raises:
      InputError: anything in the config, data or weights that cannot be used; a run of the profile
        folder's name.
    """
    folder = profile_folder(config)
    run = prepare(config)
    make_folder(folder)
    ledger = ledger_of(run)
    shutil.rmtree(folder / "trace", ignore_errors=True)
    timed = time_updates(run, steps, folder / "trace")
    found = {
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
    found["verdict"] = verdict(found)
    draw(found, folder / "profile.png")
    write_json(folder / "profile.json", found)
    return found


def profile_folder(config: Config) -> Path:
    """OUTPUT/NAME-profile, beside the run folder, which stays free for training. Raises InputError
    where that is a run's folder.
    """
    folder = config.run_folder.with_name(config.name + "-profile")
    if (folder / "config.yaml").exists():
        raise InputError(
            f"{folder}: is a run, a profile would be mixed into it; give this config another name"
            " (name=...)"
        )
    return folder


def make_folder(folder: Path) -> None:
    """Raises InputError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made ({error.strerror}); name a folder that can be written"
            " (output=...)"
        ) from None


def ledger_of(run: Prepared) -> dict[str, Any]:
    """What the updates of the plan need, by part, and the least time it takes here; means over the
    first COUNTED updates.
    """
    architecture, config = run.initial.architecture, run.config
    lora = config.lora if config.train.method == "lora" else None
    updates = run.plan.updates[: min(COUNTED, run.plan.epoch_ends[0])]
    work, room, row_tokens = Work(0, 0, 0, 0, 0), 0, 0
    for rows in prepared(config, run.dataset, run.plan, 0, len(updates), lambda rows: rows):
        encoder = isinstance(architecture, EncoderArchitecture)
        own = work_of(rows, encoder, None if encoder else architecture.window)
        work, room, row_tokens = (
            work + own,
            room + rows.tokens.size,
            row_tokens + own.tokens * rows.tokens.shape[-1],
        )
    lengths = run.dataset.train.tokens.lengths
    chosen = np.concatenate([members(update) for update in updates])
    flops = {
        part: value / len(updates) for part, value in flops_of(work, architecture, lora).items()
    }
    total = sum(flops.values())

    most = max(run.plan.shapes, key=lambda shape: shape.rows * shape.length)
    rate = matrix_rate(architecture, most.rows, most.length, run.initial.dtype, run.mesh)
    bandwidth = copy_rate(run.mesh)
    state = run.initial.state
    kept, temporary = run.compiled.memory
    memory = {
        "base": bytes_on_device(run.initial.base),
        "trained": bytes_on_device(state.trainable),
        "optimiser": bytes_on_device(state.optimiser),
        "activations": temporary,
    }
    memory["rows"] = max(0, kept - memory["base"] - memory["trained"] - memory["optimiser"])
    # Least traffic: the weights are read forward and backward by each micro-batch, what is trained
    # is read and written once.
    micro = len(updates[0].micro)
    weights = memory["base"] or memory["trained"]
    traffic = 2 * micro * weights + 2 * (memory["trained"] + memory["optimiser"])
    return {
        "updates": len(updates),
        "examples": len(chosen) / len(updates),
        "flops": flops | {"total": total},
        "flops_per_example": total * len(updates) / len(chosen),
        "program_flops": executed(run),
        "savings": [
            {
                "name": one.name,
                "before": one.before / len(updates),
                "after": one.after / len(updates),
                "removed": one.removed,
            }
            for one in savings_of(
                work, lengths[chosen].tolist(), row_tokens / work.tokens, architecture, lora
            )
        ],
        "shares": {
            "pad": 1 - work.tokens / room,
            "supervised": (
                int(supervised_of(config, run.dataset.train.tokens)[chosen].sum())
                / int(lengths[chosen].sum())
            ),
            "shared": 1 - work.tokens / int(lengths[chosen].sum()),
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


def executed(run: Prepared) -> float | None:
    """FLOPs of the products of the traced update, the mean over the counted updates' shapes: pads,
    masked blocks and recomputation too. None where a kernel hides some.
    """
    config, initial = run.config, run.initial
    optimiser = make_optimiser(config, len(run.plan.updates))
    update = make_update(
        config,
        initial.architecture,
        optimiser,
        initial.dtype,
        ops_of(config.kernels, run.mesh),
        run.compiled.remat,
    )
    updates = run.plan.updates[: min(COUNTED, run.plan.epoch_ends[0])]
    flops = {}
    for number, one in enumerate(updates):
        if one.shape not in flops:
            rows = next(
                iter(prepared(config, run.dataset, run.plan, number, number + 1, lambda rows: rows))
            )
            rows = Rows(*(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in rows))
            flops[one.shape] = program_flops(
                jax.make_jaxpr(update, static_argnums=3)(
                    initial.state, initial.base, rows, one.shape
                )
            )
    if None in flops.values():
        return None
    return sum(flops[one.shape] for one in updates) / len(updates)


def measured(run: Prepared, timed: Timed, ledger: dict[str, Any]) -> dict[str, Any]:
    """Figures of the updates that were timed. Model FLOPs are the ledger's per example; the timed
    ones may be longer or shorter.
    """
    rate = ledger["flops_per_example"] * timed.examples_per_second
    sheet = ledger["datasheet_rate"]
    return {
        "updates": timed.updates,
        "seconds": timed.seconds,
        "share_of_floor": max(ledger["floor"].values()) / timed.seconds,
        "split": {"input_wait": timed.input_wait, "host": timed.host, "device": timed.device},
        "examples_per_second": timed.examples_per_second,
        "tokens_per_second": timed.tokens_per_second,
        "model_flops_per_second": rate,
        "mfu": rate / ledger["matrix_rate"],
        "mfu_datasheet": rate / sheet if sheet else None,
        "compile_seconds": run.compile_seconds,
        "compilations": len(run.compiled.updates),
        "from_cache": run.cached,
        "remat": run.compiled.remat,
        "peak_memory": peak_memory(run.mesh.devices.flat[0]),
    }


def verdict(found: dict[str, Any]) -> str:
    """What bounds the run, in a paragraph."""
    ledger, timing = found["ledger"], found["measured"]
    seconds, split, floor = timing["seconds"], timing["split"], ledger["floor"]
    # Where a kernel hides what the program multiplies, at least what is needed.
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
    told = (
        f"{bound} An update takes {seconds:.3g} s; at the measured rates ({rates}) what the model"
        f" needs would take {timing['share_of_floor']:.0%} of that."
    )
    if ledger["program_flops"] is None:
        return f"{told} The program's products are not counted: a kernel hides them."
    return (
        f"{told} The program multiplies {times:.2f} times what is needed (pads, masked pairs,"
        f" recomputation), {spent:.0%} of the update at that rate; the other"
        f" {max(0.0, 1 - spent):.0%} are operations that are no products, products slower than"
        " alone, and waiting."
    )


def times_needed(ledger: dict[str, Any]) -> float | None:
    """What the program multiplies over what is needed; None where that is not counted."""
    return (
        None
        if ledger["program_flops"] is None
        else ledger["program_flops"] / ledger["flops"]["total"]
    )


def sweep_rows(config: Config, steps: int = 5) -> list[dict[str, Any]]:
    """Compiles and times rows x T (and accumulation) at the same tokens or examples an update, the
    fastest first.

    What does not fit the device's memory has an `error` and comes last.

    Raises:
      DoesNotFit: nothing fits.
      InputError: as `profile_run`.
    """
    sharding.split_cpu(config.mesh.cpu_devices)
    longest = int(load_dataset(config, tokenizer_folder(config)).train.tokens.lengths.max())
    tried = []
    for changes in candidates(
        config, longest, sharding.row_shards(sharding.make_mesh(config.mesh))
    ):
        one = check_config(
            config.model_dump(mode="json")
            | {"train": config.train.model_dump(mode="json") | changes},
            "sweep",
        )
        try:
            found = timed_rows(one, steps)
        except (DoesNotFit, jax.errors.JaxRuntimeError) as error:
            if not isinstance(error, DoesNotFit) and "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = {"error": "does not fit the device's memory"}
        tried.append({"settings": changes} | found)
    if all("error" in one for one in tried):
        raise DoesNotFit(
            "nothing of the sweep fits the device's memory: lower train.batch_tokens or"
            " train.batch_examples"
        )
    return sorted(tried, key=lambda one: -one.get("examples_per_second", 0.0))


def timed_rows(config: Config, steps: int) -> dict[str, Any]:
    """One try of a sweep. Its run is gone when this returns or raises, before the next one takes as
    much memory.
    """
    run = prepare(config)
    try:
        timed = time_updates(run, steps)
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
    """Settings of `train` that a sweep tries: a quarter to four times the config's row length, and
    accumulations for a batch of tokens.

    Args:
      longest: tokens of the longest example, so that all lengths train on the same examples.
      shards: the devices that share the rows.
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


def overrides_of(tried: dict[str, Any]) -> str:
    """The settings of one try, as the command line takes them."""
    return " ".join(f"train.{name}={value}" for name, value in tried["settings"].items())


def sweep_table(tried: list[dict[str, Any]]) -> Table:
    """What `sweep_rows` found."""
    table = Table(title="rows of the same batch, the fastest first")
    table.add_column("settings", overflow="fold")
    for column in ("examples/s", "real tokens/s", "MiB a device", "compilation, s"):
        table.add_column(column, justify="right")
    for one in tried:
        settings = overrides_of(one)
        if "error" in one:
            table.add_row(settings, one["error"])
            continue
        speeds = (f"{one[name]:,.4g}" for name in ("examples_per_second", "tokens_per_second"))
        table.add_row(
            settings, *speeds, f"{one['memory'] / 2**20:,.0f}", f"{one['compile_seconds']:.3g}"
        )
    return table


def profile_table(found: dict[str, Any]) -> Table:
    """What `profile_run` found."""
    ledger, timing = found["ledger"], found["measured"]
    shares, memory, split, times = (
        ledger["shares"],
        ledger["memory"],
        timing["split"],
        times_needed(ledger),
    )

    def of(parts: dict[str, float], unit: float, name: str) -> str:
        return ", ".join(f"{part} {value / unit:,.4g} {name}" for part, value in parts.items())

    table = Table(title=f"profile of {found['config']['name']}", show_header=False)
    for name, value in (
        ("device", found["device"]),
        (
            "FLOPs an update",
            of({part: value for part, value in ledger["flops"].items() if value}, 1e9, "G"),
        ),
        *(
            (f"saved: {one['name']}", f"{one['removed']:.1%} of {one['before'] / 1e9:,.4g} G")
            for one in ledger["savings"]
        ),
        (
            "the program multiplies",
            f"{times:.2f} x what the model needs" if times else "not counted, a kernel hides it",
        ),
        (
            "shares",
            (
                f"pad {shares['pad']:.1%}, supervised {shares['supervised']:.1%}, shared"
                f" {shares['shared']:.1%}"
            ),
        ),
        ("memory a device", of(memory, 2**20, "MiB")),
        (
            "measured rates",
            (
                f"{ledger['matrix_rate'] / 1e12:.4g} TFLOP/s (products of the model's shapes),"
                f" {ledger['square']['rate'] / 1e12:.4g} TFLOP/s (square ones of"
                f" {ledger['square']['size']:,}), {ledger['copy_rate'] / 1e9:.4g} GB/s"
            ),
        ),
        ("floor of an update", of(ledger["floor"], 1e-3, "ms")),
        (
            "an update takes",
            f"{timing['seconds'] * 1e3:,.4g} ms; one at a time {of(split, 1e-3, 'ms')}",
        ),
        ("the floor's share of that", f"{timing['share_of_floor']:.1%}"),
        (
            "speed",
            (
                f"{timing['examples_per_second']:,.4g} examples/s,"
                f" {timing['tokens_per_second']:,.4g} real tokens/s"
            ),
        ),
        ("MFU, needed FLOPs against the measured rate", f"{timing['mfu']:.1%}"),
        *(
            [("MFU against the datasheet's rate", f"{timing['mfu_datasheet']:.1%}")]
            if timing["mfu_datasheet"]
            else []
        ),
        (
            "compilation",
            (
                f"{timing['compile_seconds']:.3g} s for {timing['compilations']} row shapes"
                f" ({timing['from_cache']} from the cache)"
            ),
        ),
        ("rematerialisation", timing["remat"]),
        ("peak memory", f"{timing['peak_memory'] / 2**20:,.0f} MiB"),
    ):
        table.add_row(name, value)
    return table
