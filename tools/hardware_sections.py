"""The sections of `hardware_check.py`, each a process of its own that appends records to a file,
one line of JSON each.

    python tools/hardware_sections.py SECTION FILE SECONDS [--dry] [--sweep]
        # "check attention", "time lora", "step", "peers"

A record holds the result of one case and variant, or the reason why it was not run (`left_out`) or
failed (`problem`); it is complete before the next begins, so results survive their process. Cases
with a record are not run again: a restarted section continues where it stopped. It exits itself, to
be restarted (AGAIN), where the device or its memory must be fresh: after a kernel that left the
device unusable, and between runs whose peak memory is reported.
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

# Rows of the step and of the peers.
STEP = {"dtype": "bfloat16", "examples": 4000, "rows": 4, "row_length": 8192}
DRY_STEP = {"dtype": "float32", "examples": 60, "rows": 1, "row_length": 1024}
SMALL, LARGE, DRY_SHAPE = "qwen2.5-0.5b", "qwen2.5-3b", "tiny"
STUDY_BATCH = ("train.batch_tokens=null", "train.batch_examples=8")
# Goals on an H200. With packed rows: shares of the measured matrix rate and of the ledger's floor,
# and examples/s for the study's 200,000 x 2 examples in ten minutes. With the study's batch:
# seconds of an update.
MFU_GOALS = {SMALL: 0.40, LARGE: 0.55}
FLOOR_GOAL = 0.75
STUDY_EXAMPLES = 400_000 / 600
STUDY_UPDATE = 0.012
# (b) is the fastest packed PyTorch.
PEER_GOALS = {
    "jaxre at the study's batch": {"a": 10.0},
    "jaxre with packed rows": {"a": 40.0, "b": 2.0},
}
LATE = "no time was left"
REFUSED = "does not run here"  # in every error of a dispatch about unsupported arrays
SETS = 3  # sets of inputs, used in turn

AGAIN = 75  # exit code of a section that requests a restart


class Records:
    """The records of a section in its file, also those from before a restart."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        # the last line may be truncated
        self.found = [json.loads(line) for line in lines if line.endswith("}")]
        self.keys = {key for record in self.found if (key := key_of(record))}

    def __call__(self, **record: Any) -> None:
        self.found.append(record)
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(record) + "\n")

    def begin(self, record: dict[str, Any]) -> bool:
        """Records that a case begins, so that a case that ends the process is known. Returns False,
        and records nothing, if the case already has a record.
        """
        if key_of(record) in self.keys:
            return False
        self(begun=record)
        return True


def key_of(record: dict[str, Any]) -> tuple | None:
    """The case of a record; None if it is about no case."""
    if "case" not in record:
        return None
    return tuple(
        record.get(name)
        for name in ("case", "dtype", "variant", "implementation", "side", "prompt")
    )


def unfinished(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The case that began last, if it has no record."""
    last = next((record["begun"] for record in reversed(records) if "begun" in record), None)
    return last if last and key_of(last) not in map(key_of, records) else None


def leave_if_lost() -> None:
    """Exits, for a restart, if a kernel has left the device unusable for this process."""
    import jax
    import jax.numpy as jnp

    try:
        jax.block_until_ready(jnp.zeros(8) + 1)
    except Exception:  # noqa: BLE001, after any error nothing more can run here
        sys.exit(AGAIN)


def in_order(variants: dict[str, Any]) -> list[tuple[str, Any]]:
    """XLA and opponents first; our kernels, which may break the device, last."""
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
    """An exception in one short line."""
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
                    outputs = run(*inputs)
                    # A difference between two runs on the same inputs is a race, or sums whose
                    # order is not fixed.
                    repeats = timing.error_of(run(*inputs), outputs) == 0.0
                emit(**record, **oracle.judge(outputs), repeats=repeats)
            except Exception as error:  # noqa: BLE001, any error is this kernel's result
                if REFUSED in str(error):
                    emit(**record, left_out=problem(error))
                else:
                    emit(**record, passed=False, problem=problem(error))
                leave_if_lost()


def time_op(emit: Records, deadline: float, options: argparse.Namespace, op: str) -> None:
    import kernel_cases as cases
    import kernel_timing as timing

    clock = timing.Clock(options.dry)
    dtype, size = ("float32", 256) if options.dry else ("bfloat16", 8192)
    rates = next((earlier["rates"] for earlier in emit.found if "rates" in earlier), None)
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
                measurement = time_variant(case, variant, sets, oracle, clock)
            except Exception as error:  # noqa: BLE001, any error is this variant's result
                outcome = "left_out" if REFUSED in str(error) else "problem"
                emit(**record, **{outcome: problem(error)})
                leave_if_lost()
                continue
            emit(
                **record,
                tiles=variant.tiles,
                covers=case.covers,
                **measurement,
                of_matrix_rate=measurement["flops"] / rates["matrix"],
            )
        timed = {
            earlier["variant"]: earlier
            for earlier in emit.found
            if earlier.get("case") == case.name and "seconds" in earlier
        }
        for target in targets_of(case, timed) if begun else ():
            emit(**target)
        oracle = sets = None  # frees memory before the next case


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
    """Compares our fastest correct variant with each opponent that has a goal; a wrong opponent
    sets none.
    """
    right = {
        name: record["seconds"]
        for name, record in timed.items()
        if record["implementation"] and record["passed"]
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
    """Times whole updates of packed rows and of the study's batch, with XLA's ops and with the
    device's kernels, on dense and on NF4 weights.

    One run a process: the peak memory of a device covers everything that its process ran.
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
        except Exception as error:  # noqa: BLE001, any error is this run's result
            emit(**record, problem=problem(error))
        sys.exit(AGAIN)
    for goal in step_goals(
        {record["case"]: record for record in emit.found if "seconds" in record}, options.dry
    ):
        emit(**goal)


def step_runs(dry: bool) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Name -> shape of the model and settings of each run, the most important first."""
    step = DRY_STEP if dry else STEP
    kernels = tuple(kernels_here())
    runs = {}
    for shape in (DRY_SHAPE,) if dry else (SMALL, LARGE):
        rows = f"{shape} {step['dtype']}, {step['rows']} rows of {step['row_length']:,}"
        settings = {
            rows: (),
            f"{shape} {step['dtype']}, batch of 8": (*STUDY_BATCH, "train.row_length=1024"),
            f"{rows}, NF4": ("model.quantise=nf4",),
        }
        for name, overrides in settings.items():
            runs[name] = shape, overrides
            if kernels:
                runs[f"{name}, kernels"] = shape, (*overrides, *kernels)
    return runs


def timed_step(folder: Path, shape: str, overrides: tuple[str, ...], dry: bool) -> dict[str, Any]:
    """Measures a run as `jaxre profile` does; writes its inputs into `folder` if missing."""
    from bench_sides import run_config, write_inputs

    from jaxre.profiling.measure import time_updates
    from jaxre.profiling.profile import ledger_of, measured
    from jaxre.profiling.updates import Updates
    from jaxre.training.setup import set_up

    settings = argparse.Namespace(
        prompts=["0shot"],
        set=[],
        nf4=False,
        model=f"random:{shape}",
        **(DRY_STEP if dry else STEP),
    )
    if not (folder / "written").is_file():
        # remove what an interrupted process wrote
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_inputs(folder, settings)
        (folder / "written").touch()
    run = set_up(run_config(folder, "0shot", settings, *overrides))
    ledger = ledger_of(run)
    # comparable between the runs of one batch
    first_loss = float(run.update(run.next_rows()).loss)
    results = measured(run, time_updates(Updates(run), 2 if dry else 20), ledger)
    about = {name: ledger[name] for name in ("matrix_rate", "square", "program_flops")}
    return results | about | {"first_loss": first_loss, "needed": ledger["flops"]["total"]}


def step_goals(found: dict[str, dict], dry: bool) -> Iterator[dict[str, Any]]:
    """Compares the runs with the goals; of each kind the fastest of XLA's ops and the kernels."""

    def fastest(name: str) -> tuple[str, dict] | None:
        return min(
            ((case, run) for case, run in found.items() if case.removesuffix(", kernels") == name),
            key=lambda item: item[1]["seconds"],
            default=None,
        )

    def goal(target: str, ours: str, against: str, ratio: float, least: float) -> dict[str, Any]:
        return {"target": target, "ours": ours, "against": against, "ratio": ratio, "least": least}

    step = DRY_STEP if dry else STEP
    for shape in (DRY_SHAPE,) if dry else (SMALL, LARGE):
        rows = f"{shape} {step['dtype']}, {step['rows']} rows of {step['row_length']:,}"
        if dense := fastest(rows):
            case, run = dense
            share, mfu = run["share_of_floor"], run["mfu"]
            yield goal("share of the ledger's floor", case, "the floor", share, FLOOR_GOAL)
            least = MFU_GOALS.get(shape, 0.0)
            yield goal("MFU on real tokens", case, "the measured matrix rate", mfu, least)
            if shape == SMALL:
                target = "the study's 400,000 examples in ten minutes"
                ratio = run["examples_per_second"] / STUDY_EXAMPLES
                yield goal(target, case, "667 examples/s", ratio, 1.0)
        if shape == SMALL and (batch := fastest(f"{shape} {step['dtype']}, batch of 8")):
            ratio = STUDY_UPDATE / batch[1]["seconds"]
            yield goal("an update of the study's batch", batch[0], "12 ms", ratio, 1.0)
        if dense and (nf4 := fastest(f"{rows}, NF4")):
            ratio = dense[1]["seconds"] / nf4[1]["seconds"]
            yield goal("an update on NF4 weights", nf4[0], dense[0], ratio, 1 / 1.15)


def kernels_here() -> list[str]:
    """The settings that select the kernel of each op that was written for this device."""
    import jax
    from jaxre_kernels.implementations import HARDWARE, implementations_of, runs_on

    device = jax.devices()[0]
    return [
        f"kernels.{op}={name}"
        for op in ("attention", "lora", "cross_entropy")
        for name in implementations_of(op)
        if name in HARDWARE and runs_on(name, device)
    ]


def time_peers(emit: Records, deadline: float, options: argparse.Namespace) -> None:
    """Runs `bench_training.py`, first with jaxre at the study's own batch, which (a) uses too, then
    with packed rows.
    """
    shape = DRY_STEP if options.dry else STEP
    model = DRY_SHAPE if options.dry else SMALL
    turns = "--rounds 1 --seconds 0.5" if options.dry else "--rounds 2 --seconds 5"
    common = (
        f"--quick --model random:{model} --dtype {shape['dtype']}"
        f" --examples {shape['examples']} {turns}"
    ).split()
    # PyTorch packs rows of its own length; of its attentions within them, these two know where an
    # example ends.
    packed = (
        ["--sides", "a',c"]
        if options.dry
        else ["--sides", "a,a',b,c", "--packed", "varlen,flex_attention"]
    )
    batch = ["--sides", "a',c" if options.dry else "a,a',c", "--row-length", "1024"]
    batch += [part for setting in STUDY_BATCH for part in ("--set", setting)]
    rows = [*packed, "--rows", str(shape["rows"]), "--row-length", str(shape["row_length"])]
    for name, extra in zip(PEER_GOALS, (batch, rows), strict=True):
        if any(record.get("case") == name for record in emit.found):
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
                failure = f"it ended with code {code}" if code else None
            except subprocess.TimeoutExpired:
                process.terminate()  # ends its sides too
                process.wait()
                failure = LATE
            log_lines = [
                line for line in log.read_text(errors="replace").splitlines() if line.strip()
            ]
            for line in log_lines:
                if "is left out" in line:
                    emit(case=name, left_out=line)
            prompts = json.loads(path.read_text())["prompts"] if path.is_file() else {}
            if failure:
                emit(case=name, problem=f"{failure}: {' '.join(log_lines[-3:])[-600:]}")
        reported = (
            "examples_per_second",
            "tokens_per_second",
            "ratio",
            "ratios",
            "examples_per_update",
            "peak_bytes",
            "relative",
        )
        for prompt, measured in prompts.items():
            for side, values in measured.items():
                emit(case=name, prompt=prompt, side=side, **{key: values[key] for key in reported})
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
    parser.add_argument("seconds", type=float, help="time limit after which no case begins")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    kind, *op = options.section.split(" ")
    emit = Records(options.records)
    try:
        device = about()
        if not emit.found:
            emit(about=device)
        if device["platform"] == "cpu" and not options.dry:
            emit(left_out="this machine has no accelerator (--dry runs every part on a CPU)")
            return
        {"check": check_op, "time": time_op, "step": time_step, "peers": time_peers}[kind](
            emit, deadline, options, *op
        )
    except ModuleNotFoundError as error:
        emit(left_out=f"{error.name} is not installed")


if __name__ == "__main__":
    main()
