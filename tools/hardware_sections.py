"""The sections of `hardware_check.py`, each a process of its own that appends records to a file,
one line of JSON each.

    python tools/hardware_sections.py SECTION FILE SECONDS [--dry] [--sweep]
        # "check attention", "time lora", "step", "peers"

A record is what came out for one case and variant, or why it was not run (`left_out`) or failed
(`problem`); one is complete before the next begins, so that what a section has found outlives it.
What has a record is not run again: a section that left off goes on where it was. It leaves off
itself, to be started again (AGAIN), where the device or its memory has to be as it was: after a
kernel that the device did not survive, and between runs whose peak memory is told.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The step's rows; the peers' too.
STEP = {"dtype": "bfloat16", "examples": 4000, "rows": 4, "row_length": 8192}
DRY_STEP = {"dtype": "float32", "examples": 60, "rows": 1, "row_length": 1024}
SMALL, LARGE, DRY_SHAPE = "qwen2.5-0.5b", "qwen2.5-3b", "tiny"
STUDY_BATCH = ("train.batch_tokens=null", "train.batch_examples=8")
# The goals on an H200. Of packed rows: of the measured matrix rate, of the ledger's floor,
# examples/s of the study's 200,000 x 2 examples in ten minutes. Of the study's batch: seconds of an
# update.
MFU_GOALS = {SMALL: 0.40, LARGE: 0.55}
FLOOR_GOAL = 0.75
STUDY_EXAMPLES = 400_000 / 600
STUDY_UPDATE = 0.012
# (b) is the best packed PyTorch.
PEER_GOALS = {
    "jaxre at the study's batch": {"a": 10.0},
    "jaxre with packed rows": {"a": 40.0, "b": 2.0},
}
LATE = "no time was left"
REFUSED = "does not run here"  # how every dispatch begins to say why it does not take some arrays
SETS = 3  # of inputs, in turn

AGAIN = 75  # the exit code of a section that is to be started again


class Records:
    """The records of a section in its file, also those of before it was started again."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        # the last one may be cut short
        self.found = [json.loads(line) for line in lines if line.endswith("}")]
        self.there = {key for one in self.found if (key := key_of(one))}

    def __call__(self, **record: Any) -> None:
        self.found.append(record)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")

    def begin(self, record: dict[str, Any]) -> bool:
        """Says that this is being run, so that what ends the process is known. False if it has a
        record: it is not to be run.
        """
        if key_of(record) in self.there:
            return False
        self(begun=record)
        return True


def key_of(record: dict[str, Any]) -> tuple | None:
    """What a record is about; None if about no case."""
    if "case" not in record:
        return None
    return tuple(
        record.get(name)
        for name in ("case", "dtype", "variant", "implementation", "side", "prompt")
    )


def unfinished(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What was begun last and has no record."""
    begun = [one["begun"] for one in records if "begun" in one]
    return (
        begun[-1] if begun and key_of(begun[-1]) not in {key_of(one) for one in records} else None
    )


def leave_if_lost() -> None:
    """Ends the process, to be started again, where a kernel has left the device of this one
    unusable.
    """
    import jax
    import jax.numpy as jnp

    try:
        jax.block_until_ready(jnp.zeros(8) + 1)
    except Exception:  # noqa: BLE001, whatever it is, nothing more can be run here
        sys.exit(AGAIN)


def in_order(variants: dict[str, Any]) -> list[tuple[str, Any]]:
    """XLA and opponents first, ours that may break the device last."""
    return sorted(variants.items(), key=lambda item: item[0].startswith("pallas"))


def about() -> dict[str, Any]:
    import jax

    device = jax.devices()[0]
    return {
        "platform": jax.default_backend(),
        "kind": device.device_kind,
        "count": jax.device_count(),
        "runtime": " ".join(device.client.platform_version.split()),
        "memory": (device.memory_stats() or {}).get("bytes_limit"),
    }


def problem(error: BaseException) -> str:
    """One line of an exception, short."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]


def check_op(emit: Records, deadline: float, options: argparse.Namespace, op: str) -> None:
    import jax
    import kernel_cases as cases
    import kernel_timing as timing

    if op == "nf4" and emit.begin(
        record := {"case": "dequantised bits", "dtype": "float32", "implementation": "xla"}
    ):
        emit(**record, **cases.dequantised_bits())
    for case in cases.CHECKS[op](options.dry):
        oracle = None
        for name, variant in in_order(case.variants):
            record = {"case": case.name, "dtype": case.dtype, "implementation": name}
            if not emit.begin(record):
                continue
            if variant.left_out or time.monotonic() > deadline:
                emit(**record, left_out=variant.left_out or LATE)
                continue
            try:
                if oracle is None:
                    inputs = case.inputs(0)
                    oracle = timing.Oracle(case, inputs)
                with jax.default_matmul_precision("highest"):
                    run = jax.jit(variant.run)
                    found = run(*inputs)
                    # A difference between two runs on the same inputs is a race, or sums whose
                    # order is not fixed.
                    repeats = timing.error_of(run(*inputs), found) == 0.0
                emit(**record, **oracle.judge(found), repeats=repeats)
            except Exception as error:  # noqa: BLE001, whatever it is, it is this kernel's result
                emit(
                    **record,
                    **(
                        {"left_out": problem(error)}
                        if REFUSED in str(error)
                        else {"passed": False, "problem": problem(error)}
                    ),
                )
                leave_if_lost()


def time_op(emit: Records, deadline: float, options: argparse.Namespace, op: str) -> None:
    import kernel_cases as cases
    import kernel_timing as timing

    clock = timing.Clock(options.dry)
    dtype, size = ("float32", 256) if options.dry else ("bfloat16", 8192)
    rates = next((one["rates"] for one in emit.found if "rates" in one), None)
    if rates is None:
        rates = {"matrix": clock.matrix_rate(dtype, size), "copy": clock.copy_rate()}
        emit(rates=rates)
    for case in cases.TIMINGS[op](options.dry, options.sweep):
        begun, sets = False, None
        for name, variant in in_order(case.variants):
            record = {
                "case": case.name,
                "dtype": case.dtype,
                "variant": name,
                "implementation": variant.implementation,
            }
            if not emit.begin(record):
                continue
            begun = True
            if variant.left_out or time.monotonic() > deadline:
                emit(**record, left_out=variant.left_out or LATE)
                continue
            try:
                if sets is None:
                    sets = [case.inputs(seed) for seed in range(SETS)]
                    oracle = timing.Oracle(case, sets[0])
                found = time_variant(case, variant, sets, oracle, clock)
            except Exception as error:  # noqa: BLE001, whatever it is, it is this variant's result
                emit(
                    **record, **{"left_out" if REFUSED in str(error) else "problem": problem(error)}
                )
                leave_if_lost()
                continue
            emit(
                **record,
                tiles=variant.tiles,
                covers=case.covers,
                **found,
                of_matrix_rate=found["flops"] / rates["matrix"],
            )
        timed = {
            one["variant"]: one
            for one in emit.found
            if one.get("case") == case.name and "seconds" in one
        }
        for target in targets_of(case, timed) if begun else ():
            emit(**target)
        oracle = sets = None  # before the next case's


def time_variant(
    case: Any, variant: Any, sets: list[tuple], oracle: Any, clock: Any
) -> dict[str, Any]:
    import jax

    began = time.perf_counter()
    run = jax.jit(variant.run).lower(*sets[0]).compile()
    compiling = time.perf_counter() - began
    judged = oracle.judge(run(*sets[0])) if variant.compared else {}
    median, least, most = clock.seconds(run, sets)
    memory = run.memory_analysis()
    return {
        "seconds": median,
        "least": least,
        "most": most,
        "flops": case.flops / median,
        "bytes": case.moved / median,
        "compile_seconds": compiling,
        "temporary": getattr(memory, "temp_size_in_bytes", None),
        "host_bound": clock.host_bound,
        **judged,
    }


def targets_of(case: Any, timed: dict[str, dict]) -> Iterator[dict[str, Any]]:
    """How the fastest right one of ours stands to each opponent that a goal is set against; one
    that is wrong is none.
    """
    right = {
        name: one["seconds"]
        for name, one in timed.items()
        if one["implementation"] and one["passed"]
    }
    for opponent, least in case.targets.items():
        if right and opponent in timed and timed[opponent].get("passed", True):
            fastest = min(right, key=right.get)
            ratio = timed[opponent]["seconds"] / right[fastest]
            yield {
                "target": f"{case.op}: {case.name}",
                "ours": fastest,
                "against": opponent,
                "ratio": ratio,
                "least": least,
            }


def time_step(emit: Records, deadline: float, options: argparse.Namespace) -> None:
    """Whole updates of packed rows and of the study's batch, with XLA's ops and with the device's
    kernels, on dense and on NF4 weights.

    One run a process: the peak memory of a device is that of all that its process ran.
    """
    runs = step_runs(options.dry)
    for name, (shape, overrides) in runs.items():
        record = {"case": name}
        if not emit.begin(record):
            continue
        if time.monotonic() > deadline:
            emit(**record, left_out=LATE)
            continue
        try:
            emit(
                **record,
                **timed_step(options.records.parent / shape, shape, overrides, options.dry),
            )
        except Exception as error:  # noqa: BLE001, whatever it is, it is this run's result
            emit(**record, problem=problem(error))
        sys.exit(AGAIN)
    for goal in step_goals(
        {one["case"]: one for one in emit.found if "seconds" in one}, options.dry
    ):
        emit(**goal)


def step_runs(dry: bool) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> shape of the model and settings of each run, the most wanted first."""
    given = DRY_STEP if dry else STEP
    kernels = tuple(kernels_here())
    runs = {}
    for shape in (DRY_SHAPE,) if dry else (SMALL, LARGE):
        rows = f"{shape} {given['dtype']}, {given['rows']} rows of {given['row_length']:,}"
        settings = {
            rows: (),
            f"{shape} {given['dtype']}, batch of 8": (*STUDY_BATCH, "train.row_length=1024"),
        }
        settings[f"{rows}, NF4"] = ("model.quantise=nf4",)
        for name, overrides in settings.items():
            runs[name] = shape, overrides
            if kernels:
                runs[f"{name}, kernels"] = shape, (*overrides, *kernels)
    return runs


def timed_step(folder: Path, shape: str, overrides: tuple[str, ...], dry: bool) -> dict[str, Any]:
    """What `jaxre profile` measures of a run; its inputs are written into `folder` where they are
    not there.
    """
    from bench_sides import run_config, write_inputs

    from jaxre.profiling.measure import time_updates
    from jaxre.profiling.prepared import prepare
    from jaxre.profiling.profile import ledger_of, measured

    given = argparse.Namespace(
        prompts=["0shot"], set=[], nf4=False, shape=shape, **(DRY_STEP if dry else STEP)
    )
    if not (folder / "written").is_file():
        # what a process left that was ended while it wrote
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_inputs(folder, given)
        (folder / "written").touch()
    run = prepare(run_config(folder, "0shot", given, *overrides))
    ledger = ledger_of(run)
    # to be compared between the runs of one batch
    first_loss = float(run.update(run.next_rows()).loss)
    found = measured(run, time_updates(run, 2 if dry else 20), ledger)
    about = {name: ledger[name] for name in ("matrix_rate", "square", "program_flops")}
    return found | about | {"first_loss": first_loss, "needed": ledger["flops"]["total"]}


def step_goals(found: dict[str, dict], dry: bool) -> Iterator[dict[str, Any]]:
    """How the runs stand to the goals; of each kind the fastest of XLA's ops and the kernels."""

    def fastest(name: str) -> tuple[str, dict] | None:
        return min(
            ((case, one) for case, one in found.items() if case.removesuffix(", kernels") == name),
            key=lambda it: it[1]["seconds"],
            default=None,
        )

    given = DRY_STEP if dry else STEP
    for shape in (DRY_SHAPE,) if dry else (SMALL, LARGE):
        rows = f"{shape} {given['dtype']}, {given['rows']} rows of {given['row_length']:,}"
        dense, nf4, batch = (
            fastest(name)
            for name in (rows, f"{rows}, NF4", f"{shape} {given['dtype']}, batch of 8")
        )
        goals = []
        if dense:
            case, one = dense
            goals += [
                (
                    "share of the ledger's floor",
                    case,
                    "the floor",
                    one["share_of_floor"],
                    FLOOR_GOAL,
                )
            ]
            goals += [
                (
                    "MFU on real tokens",
                    case,
                    "the measured matrix rate",
                    one["mfu"],
                    MFU_GOALS.get(shape, 0.0),
                )
            ]
        if dense and shape == SMALL:
            goals += [
                (
                    "the study's 400,000 examples in ten minutes",
                    case,
                    "667 examples/s",
                    one["examples_per_second"] / STUDY_EXAMPLES,
                    1.0,
                )
            ]
        if batch and shape == SMALL:
            goals += [
                (
                    "an update of the study's batch",
                    batch[0],
                    "12 ms",
                    STUDY_UPDATE / batch[1]["seconds"],
                    1.0,
                )
            ]
        if dense and nf4:
            goals += [
                (
                    "an update on NF4 weights",
                    nf4[0],
                    dense[0],
                    dense[1]["seconds"] / nf4[1]["seconds"],
                    1 / 1.15,
                )
            ]
        for target, ours, against, ratio, least in goals:
            yield {
                "target": target,
                "ours": ours,
                "against": against,
                "ratio": ratio,
                "least": least,
            }


def kernels_here() -> list[str]:
    """The settings that ask for the kernel of each op that was written for this device."""
    import jax
    from jaxre_kernels.implementations import HARDWARE, implementations_of, runs_on

    device = jax.devices()[0]
    there = [
        (op, name)
        for op in ("attention", "lora", "cross_entropy")
        for name in implementations_of(op)
    ]
    return [
        f"kernels.{op}={name}" for op, name in there if name in HARDWARE and runs_on(name, device)
    ]


def time_peers(emit: Records, deadline: float, options: argparse.Namespace) -> None:
    """`bench_training.py`, first with jaxre at the study's own batch, which is what (a) takes, then
    with packed rows.
    """
    shape = DRY_STEP if options.dry else STEP
    model = DRY_SHAPE if options.dry else SMALL
    turns = "--rounds 1 --seconds 0.5" if options.dry else "--rounds 2 --seconds 5"
    common = (
        f"--quick --shape {model} --dtype {shape['dtype']} --examples {shape['examples']} {turns}"
    ).split()
    # PyTorch packs rows of its own length; of its ways to attend within them these two know where
    # an example ends.
    packed = (
        ["--sides", "a',c"]
        if options.dry
        else ["--sides", "a,a',b,c", "--packed", "varlen,flex_attention"]
    )
    batch = ["--sides", "a',c" if options.dry else "a,a',c", "--row-length", "1024"]
    batch += [part for setting in STUDY_BATCH for part in ("--set", setting)]
    rows = [*packed, "--rows", str(shape["rows"]), "--row-length", str(shape["row_length"])]
    for name, extra in zip(PEER_GOALS, (batch, rows), strict=True):
        if any(one.get("case") == name for one in emit.found):
            continue
        with tempfile.TemporaryDirectory(prefix="hardware-check-") as folder:
            path, log = Path(folder) / "found.json", Path(folder) / "log"
            command = [
                sys.executable,
                str(Path(__file__).with_name("bench_training.py")),
                *common,
                *extra,
                "--json",
                str(path),
            ]
            with log.open("w") as out:
                process = subprocess.Popen(command, stdout=out, stderr=out)
            try:
                code = process.wait(max(1.0, deadline - time.monotonic()))
                ended = f"it ended with code {code}" if code else None
            except subprocess.TimeoutExpired:
                process.terminate()  # it ends its sides
                process.wait()
                ended = LATE
            told = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            for line in told:
                if "is left out" in line:
                    emit(case=name, left_out=line)
            found = json.loads(path.read_text())["prompts"] if path.is_file() else {}
            if ended:
                emit(case=name, problem=f"{ended}: {' '.join(told[-3:])[-600:]}")
        kept = (
            "examples_per_second",
            "tokens_per_second",
            "ratio",
            "ratios",
            "examples_per_update",
            "peak_bytes",
            "relative",
        )
        for prompt, measured in found.items():
            for side, values in measured.items():
                emit(case=name, prompt=prompt, side=side, **{key: values[key] for key in kept})
            for side, least in PEER_GOALS[name].items():
                if side in measured and "c" in measured:
                    ratio = (
                        measured["c"]["examples_per_second"] / measured[side]["examples_per_second"]
                    )
                    emit(
                        target=f"training: {name}, {prompt}",
                        ours="c",
                        against=side,
                        ratio=ratio,
                        least=least,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section")
    parser.add_argument("records", type=Path)
    parser.add_argument("seconds", type=float, help="after which nothing more is begun")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    what, *op = options.section.split(" ")
    emit = Records(options.records)
    try:
        device = about()
        if not emit.found:
            emit(about=device)
        if device["platform"] == "cpu" and not options.dry:
            emit(left_out="no accelerator is here (--dry runs every part on a CPU)")
            return
        {"check": check_op, "time": time_op, "step": time_step, "peers": time_peers}[what](
            emit, deadline, options, *op
        )
    except ModuleNotFoundError as error:
        emit(left_out=f"{error.name} is not installed")


if __name__ == "__main__":
    main()
