"""The sections of `hardware_check.py`, each a process of its own that appends records to a file, one line of JSON each.

    python tools/hardware_sections.py SECTION FILE SECONDS [--dry] [--sweep]    # "check attention", "time lora", "step", "peers"

A record is what came out for one case and variant, or why it was not run (`left_out`) or failed (`problem`); one is complete before the
next begins, so that what a section has found outlives it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The step's rows; the peers' too.
STEP = {"shape": "qwen2.5-0.5b", "dtype": "bfloat16", "examples": 4000, "rows": 4, "row_length": 8192}
DRY_STEP = {"shape": "tiny", "dtype": "float32", "examples": 60, "rows": 1, "row_length": 1024}
STUDY_BATCH = ("train.batch_tokens=null", "train.batch_examples=8")
LATE = "no time was left"
REFUSED = "does not run here"  # how every dispatch begins to say why it does not take some arrays
SETS = 3  # of inputs, in turn

Emit = Callable[..., None]


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


def check_op(emit: Emit, deadline: float, options: argparse.Namespace, op: str) -> None:
    import jax
    import kernel_cases as cases
    import kernel_timing as timing

    device = about()
    emit(about=device)
    if op == "nf4":
        emit(case="dequantised bits", dtype="float32", implementation="xla", **cases.dequantised_bits())
    for case in cases.CHECKS[op](device["platform"], options.dry):
        inputs = case.inputs(0)
        oracle = timing.Oracle(case, inputs)
        for name, variant in case.variants.items():
            record = {"case": case.name, "dtype": case.dtype, "implementation": name}
            if variant.left_out or time.monotonic() > deadline:
                emit(**record, left_out=variant.left_out or LATE)
                continue
            try:
                with jax.default_matmul_precision("highest"):
                    run = jax.jit(variant.run)
                    found = run(*inputs)
                    # A difference between two runs on the same inputs is a race, or sums whose order is not fixed.
                    repeats = timing.error_of(run(*inputs), found) == 0.0
                emit(**record, **oracle.judge(found), repeats=repeats)
            except Exception as error:  # noqa: BLE001, whatever it is, it is this kernel's result
                emit(**record, **({"left_out": problem(error)} if REFUSED in str(error) else {"passed": False, "problem": problem(error)}))


def time_op(emit: Emit, deadline: float, options: argparse.Namespace, op: str) -> None:
    import kernel_cases as cases
    import kernel_timing as timing

    device = about()
    emit(about=device)
    clock = timing.Clock(options.dry)
    dtype, size = ("float32", 256) if options.dry else ("bfloat16", 8192)
    rates = {"matrix": clock.matrix_rate(dtype, size), "copy": clock.copy_rate()}
    emit(rates=rates)
    for case in cases.TIMINGS[op](device["platform"], options.dry, options.sweep):
        try:
            sets = [case.inputs(seed) for seed in range(SETS)]
            oracle = timing.Oracle(case, sets[0])
        except Exception as error:  # noqa: BLE001, most likely too little memory, which the next case may need less of
            emit(case=case.name, problem=problem(error))
            continue
        timed = {}
        for name, variant in case.variants.items():
            record = {"case": case.name, "dtype": case.dtype, "variant": name, "implementation": variant.implementation}
            if variant.left_out or time.monotonic() > deadline:
                emit(**record, left_out=variant.left_out or LATE)
                continue
            try:
                found = time_variant(case, variant, sets, oracle, clock)
            except Exception as error:  # noqa: BLE001, whatever it is, it is this variant's result
                emit(**record, **{"left_out" if REFUSED in str(error) else "problem": problem(error)})
                continue
            timed[name] = variant.implementation, found
            emit(**record, tiles=variant.tiles, covers=case.covers, **found, of_matrix_rate=found["flops"] / rates["matrix"])
        for target in targets_of(case, timed):
            emit(**target)
        del sets, oracle  # before the next case's


def time_variant(case: Any, variant: Any, sets: list[tuple], oracle: Any, clock: Any) -> dict[str, Any]:
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
        **judged,
    }


def targets_of(case: Any, timed: dict[str, tuple[str | None, dict]]) -> Iterator[dict[str, Any]]:
    """How the fastest right one of ours stands to each opponent that a goal is set against."""
    right = {name: found["seconds"] for name, (implementation, found) in timed.items() if implementation and found["passed"]}
    for opponent, least in case.targets.items():
        if right and opponent in timed:
            fastest = min(right, key=right.get)
            ratio = timed[opponent][1]["seconds"] / right[fastest]
            yield {"target": f"{case.op}: {case.name}", "ours": fastest, "against": opponent, "ratio": ratio, "least": least}


def time_step(emit: Emit, deadline: float, options: argparse.Namespace) -> None:
    """Whole updates of the smallest model with a large head: of packed rows, of the study's batch, on NF4 weights, with every kernel."""
    from bench_sides import run_config, write_inputs

    from jaxre.errors import InputError
    from jaxre.profiling.measure import time_updates
    from jaxre.profiling.prepared import prepare
    from jaxre.profiling.profile import ledger_of, measured

    emit(about=about())
    given = argparse.Namespace(prompts=["0shot"], set=[], nf4=False, **(DRY_STEP if options.dry else STEP))
    rows = f"{given.shape} {given.dtype}, {given.rows} rows of {given.row_length:,}"
    runs = {
        rows: (),
        f"{given.shape} {given.dtype}, batch of 8": (*STUDY_BATCH, "train.row_length=1024"),
        f"{rows}, NF4": ("model.quantise=nf4",),
    }
    if kernels := kernels_here():
        runs |= {f"{name}, kernels": (*runs[name], *kernels) for name in (rows, f"{rows}, NF4")}
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="hardware-check-") as folder:
        try:
            write_inputs(Path(folder), given)
        except (InputError, SystemExit) as error:
            emit(left_out=str(error))
            return
        for name, overrides in runs.items():
            if time.monotonic() > deadline:
                emit(case=name, left_out=LATE)
                continue
            try:
                run = prepare(run_config(Path(folder), "0shot", given, *overrides))
                ledger = ledger_of(run)
                first_loss = float(run.update(run.next_rows()).loss)  # to be compared between the runs of one batch
                found = measured(run, time_updates(run, 2 if options.dry else 20), ledger)
            except Exception as error:  # noqa: BLE001, whatever it is, it is this run's result
                emit(case=name, problem=problem(error))
                continue
            seconds[name] = found["seconds"]
            emit(
                case=name,
                first_loss=first_loss,
                matrix_rate=ledger["matrix_rate"],
                program_flops=ledger["program_flops"],
                needed=ledger["flops"]["total"],
                **found,
            )
            del run
    dense, quantised = seconds.get(rows), seconds.get(f"{rows}, NF4")
    if dense and quantised:
        emit(target="step on NF4 weights", ours="NF4", against="dense weights", ratio=dense / quantised, least=1 / 1.15)


def kernels_here() -> list[str]:
    """The settings that ask for the kernel of each op that was written for this device."""
    import jax
    from jaxre_kernels.implementations import implementations_of

    from jaxre.training.kernels import HARDWARE, runs_on

    device = jax.devices()[0]
    there = [(op, name) for op in ("attention", "lora", "cross_entropy") for name in implementations_of(op)]
    return [f"kernels.{op}={name}" for op, name in there if name in HARDWARE and runs_on(name, device)]


def time_peers(emit: Emit, deadline: float, options: argparse.Namespace) -> None:
    """`bench_training.py`, first with jaxre at the study's own batch, which is what (a) takes, then with packed rows."""
    shape = DRY_STEP if options.dry else STEP
    sides = "--rounds 1 --seconds 0.5 --sides a',c" if options.dry else "--rounds 2 --seconds 5 --sides a,a',b,c"
    common = f"--quick --shape {shape['shape']} --dtype {shape['dtype']} --examples {shape['examples']} {sides}".split()
    batch = ["--row-length", "1024", *(part for setting in STUDY_BATCH for part in ("--set", setting))]
    rows = ["--rows", str(shape["rows"]), "--row-length", str(shape["row_length"])]
    for name, extra in {"jaxre at the study's batch": batch, "jaxre with packed rows": rows}.items():
        with tempfile.TemporaryDirectory(prefix="hardware-check-") as folder:
            path, log = Path(folder) / "found.json", Path(folder) / "log"
            command = [sys.executable, str(Path(__file__).with_name("bench_training.py")), *common, *extra, "--json", str(path)]
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
        kept = ("examples_per_second", "tokens_per_second", "ratio", "ratios", "examples_per_update", "peak_bytes", "relative")
        for prompt, measured in found.items():
            for side, values in measured.items():
                emit(case=name, prompt=prompt, side=side, **{key: values[key] for key in kept})
            if "a" in measured and "c" in measured:
                emit(target=f"training: {name}, {prompt}", ours="c", against="a", ratio=measured["c"]["ratio"], least=10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section")
    parser.add_argument("records", type=Path)
    parser.add_argument("seconds", type=float, help="after which nothing more is begun")
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    what, *op = options.section.split(" ")
    with options.records.open("a", encoding="utf-8") as out:

        def emit(**record: Any) -> None:
            out.write(json.dumps(record) + "\n")
            out.flush()

        try:
            {"check": check_op, "time": time_op, "step": time_step, "peers": time_peers}[what](emit, deadline, options, *op)
        except ModuleNotFoundError as error:
            emit(left_out=f"{error.name} is not installed")


if __name__ == "__main__":
    main()
