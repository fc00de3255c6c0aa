"""Checks every kernel against f32 on this machine's accelerator, then measures kernels, training
step and peers. Needs no network.

    tools/hardware_check --out runs/h200                     # everything, within 9 minutes
    tools/hardware_check --only attention,lora --minutes 4
    tools/hardware_check --dry                               # tiny shapes on the CPU, no
    measurement

Kernels are checked first, then timed: median of several rounds, inputs in turn, caches flushed,
beside the bare products, cuDNN, splash attention and tokamax where available. Every section is a
process of its own with a share of the time, so a section that fails, hangs or lacks a package costs
the others nothing; the others inherit what it leaves of its share. A kernel that ends its process,
or leaves the device unusable, has failed, and the section continues behind it in a new process.
OUT/hardware_check.json and .md are rewritten after each section. The exit code is 1 if a check
failed or a section with checks did not end.

Attention, cross-entropy, LoRA and NF4 need jax alone. The step needs jaxre's dependencies, and the
peers the `bench` extra; both need the data and tokenizers of JAXRE_DATA and JAXRE_MODELS.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from itertools import repeat
from pathlib import Path
from typing import Any

from hardware_report import failures, markdown
from hardware_sections import AGAIN, unfinished

OPS = ("attention", "cross_entropy", "lora", "nf4")
PARTS = (*OPS, "step", "peers")
# Shares of the time. Checks go first, side by side if there are enough cores.
CHECKS_SHARE = 4.5
SHARES = {
    "time attention": 5.0,
    "time cross_entropy": 2.5,
    "time lora": 3.0,
    "time nf4": 1.5,
    "step": 3.0,
    "peers": 4.0,
}
GRACE = 15  # seconds after its time is over that a section may take to finish
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "libtpu",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "numpy",
    "flax",
    "torch",
    "transformers",
    "peft",
    "trl",
    "bitsandbytes",
    "tokamax",
)
SECTIONS = Path(__file__).with_name("hardware_sections.py")

_running: set[subprocess.Popen] = set()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="time every case with all tile sizes, as `tune_kernels.py` does",
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, stopped)
    results = run_all(parts_of(parser, options.only, PARTS), options)
    sys.exit(1 if failures(results) else 0)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--out", type=Path, default=Path("runs/hardware_check"), metavar="FOLDER")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    return parser


def parts_of(parser: argparse.ArgumentParser, names: str, known: tuple[str, ...]) -> list[str]:
    """The parts named in `names`, in the order in which they run."""
    unknown = [part for part in names.split(",") if part not in known]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    return [part for part in known if part in names.split(",")]


def run_all(parts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Runs the sections of these parts, writes both files, and returns the results."""
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "revision": output_of("git", "describe", "--always", "--dirty"),
        "driver": output_of(
            "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
        ),
        "device": None,
        "versions": versions(),
        "settings": {
            "parts": parts,
            "minutes": options.minutes,
            "dry": options.dry,
            "sweep": options.sweep,
        },
        "sections": {},
    }
    groups = groups_of(parts)
    for number, (sections, share) in enumerate(groups):
        limit = (
            max(1.0, end - time.monotonic() - GRACE)
            * share
            / sum(share for _, share in groups[number:])
        )
        # Several processes can share a GPU, not a TPU.
        workers = min(
            len(sections),
            max(1, (os.cpu_count() or 1) // 4) if results["driver"] or options.dry else 1,
        )
        section_limit = limit * workers / len(sections)
        with ThreadPoolExecutor(workers) as pool:
            ended = list(pool.map(run_section, sections, repeat(section_limit), repeat(options)))
        for section, result in zip(sections, ended, strict=True):
            results["sections"][section] = result
            results["device"] = results["device"] or next(
                (record["about"] for record in result["records"] if "about" in record), None
            )
            print(f"{section}: {result['outcome']} ({result['seconds']:.0f} s)", flush=True)
        (options.out / "hardware_check.json").write_text(
            json.dumps(results, indent=1) + "\n", encoding="utf-8"
        )
        (options.out / "hardware_check.md").write_text(
            "\n".join(markdown(results)) + "\n", encoding="utf-8"
        )
    print(
        "\n".join(["", *markdown(results), f"written to {options.out}/hardware_check.json and .md"])
    )
    return results


def groups_of(parts: list[str]) -> list[tuple[list[str], float]]:
    """Sections that may run side by side, with their share of the time: all checks together, then
    one section after another.
    """
    checks = [f"check {part}" for part in parts if part in OPS]
    timed = [f"time {part}" if part in OPS else part for part in parts]
    return [
        *([(checks, CHECKS_SHARE)] if checks else []),
        *(([section], SHARES[section]) for section in timed),
    ]


def run_section(section: str, limit: float, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a section for at most `limit` seconds and the grace, and returns its outcome and
    records.

    Restarts it if it requests that, or if its process ended during a case: it then continues with
    the next one.
    """
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH")])
        ),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # checks share the device, and so do the peers
        "HF_HUB_OFFLINE": "1",
        **({"JAX_PLATFORMS": "cpu"} if options.dry else {}),
    }
    flags = [f"--{name}" for name in ("dry", "sweep") if getattr(options, name)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hardware-check-") as folder:
        records, log = Path(folder) / "records", Path(folder) / "log"
        while True:
            left = limit - (time.monotonic() - began)
            command = [sys.executable, str(SECTIONS), section, str(records), f"{left:.0f}", *flags]
            outcome = run_process(command, environment, log, left + GRACE)
            lines = records.read_text(encoding="utf-8").splitlines() if records.is_file() else []
            # the last line may be truncated
            run_records = [json.loads(line) for line in lines if line.endswith("}")]
            interrupted = unfinished(run_records)
            if interrupted is not None:
                # A stopped kernel may only have been slow, so it has not failed; the outcome of the
                # section says that it was stopped.
                failed = {} if outcome.startswith("stopped") else {"passed": False}
                run_records.append(
                    {**interrupted, **failed, "problem": f"the section {outcome} while this ran"}
                )
                with records.open("a", encoding="utf-8") as out:
                    out.write(
                        "\n" * bool(lines and not lines[-1].endswith("}"))
                        + json.dumps(run_records[-1])
                        + "\n"
                    )
            if (
                outcome == "done"
                or time.monotonic() - began > limit
                or not (interrupted or outcome == f"ended with code {AGAIN}")
            ):
                break
        log_lines = log.read_text(errors="replace").splitlines()[-40:]
    if outcome == "done":
        reasons = [record["left_out"] for record in run_records if record.keys() == {"left_out"}]
        outcome, log_lines = f"left out: {reasons[0]}" if reasons else outcome, []
    return {
        "outcome": outcome,
        "seconds": time.monotonic() - began,
        "records": [record for record in run_records if "begun" not in record],
        "log": log_lines,
    }


def run_process(command: list[str], environment: dict[str, str], log: Path, limit: float) -> str:
    """Runs a section's process and its children for at most `limit` seconds, and describes how it
    ended.
    """
    with log.open("w") as out:
        # A group of its own, so that its children end with it.
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, process_group=0
        )
    _running.add(process)
    try:
        code = process.wait(limit)
        outcome = f"ended with code {code}" if code else "done"
    except subprocess.TimeoutExpired:
        outcome = f"stopped after {limit:.0f} s"
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    _running.discard(process)
    return outcome


def stopped(*_: Any) -> None:
    for process in _running:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    sys.exit(143)


def versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def output_of(*command: str) -> str | None:
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=10, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() or None


if __name__ == "__main__":
    main()
