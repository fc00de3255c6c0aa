"""Training throughput side by side with peers, on the same weights, examples and prompts.

    python tools/bench_training.py --quick                          # within 10 minutes on two CPU cores
    python tools/bench_training.py --prompts 0shot,2shot,2shot-enumerated --json bench.json
    python tools/bench_training.py --sides a,c,d                    # jaxre with each saving switched off in turn

Sides: (a) the study's recipe, Hugging Face Trainer + PEFT, batches of 4 x 2 accumulation padded to the longest, gradient
checkpointing; (a') the same without checkpointing; (b) TRL's SFTTrainer + PEFT with best-fit packing, whose attention
and loss keep examples apart; (c) jaxre; (d) jaxre with one saving switched off, for each of VARIANTS.

First every side computes the loss of the same examples, without dropout in f32, by the code that it trains with; if one
differs from (a) by more than 1e-4 relative, nothing is measured (exit code 1). Then the sides take turns of whole
updates: each is a process of its own that is stopped while another one runs, and the first update of a turn is not timed.
Needs the `bench` extra, and the data and tokenizers of JAXRE_DATA and JAXRE_MODELS (../shared/data and ../shared/models).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench_sides import DROPOUT, PROMPTS, RANK, SHAPES, VARIANTS

TOLERANCE = 1e-4  # relative, of the losses
TOLD = {
    "a": "HF Trainer + PEFT, 4 x 2 padded, gradient checkpointing",
    "a'": "HF Trainer + PEFT, 4 x 2 padded",
    "b": "TRL SFTTrainer + PEFT, packed",
    "c": "jaxre",
}
NEEDED = {"a": ("torch", "peft", "accelerate"), "a'": ("torch", "peft", "accelerate"), "b": ("torch", "peft", "accelerate", "trl")}


class Side:
    """A side's process, stopped unless it is asked something."""

    def __init__(self, name: str, folder: Path, settings: argparse.Namespace, prompt: str | None):
        self.log = folder / f"{name.replace(':', '-')}-{prompt}.log"
        given = vars(settings) | {"json": None, "prompts": settings.prompts if prompt is None else [prompt]}
        script = Path(__file__).with_name("bench_sides.py")
        command = [sys.executable, str(script), json.dumps({"side": name, "folder": str(folder), "settings": given})]
        # Memory is taken as it is needed, or the sides could not share a device.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, env=environment
            )
        self.name = name

    def ready(self) -> dict[str, Any]:
        found = self.answer()
        self.stop()
        return found

    def ask(self, command: str) -> dict[str, Any]:
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it has ended, which `answer` tells
            self.process.stdin.write(command + "\n")
        found = self.answer()
        self.stop()
        return found

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            end = self.log.read_text(errors="replace").strip().splitlines()[-12:]
            code = self.process.wait()
            told = " (killed; for want of memory? Sides keep theirs: measure fewer at a time)" if code == -signal.SIGKILL else ""
            raise SystemExit(f"side {self.name} ended with code {code}{told}:\n" + "\n".join(end))
        return json.loads(line)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def bench_prompt(prompt: str, folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Checks the losses of one kind of prompt, then measures in rounds."""
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(contextlib.closing(Side(name, folder, settings, prompt))) for name in settings.sides]
        for side in sides:
            side.ready()
        losses = {side.name: side.ask("check") for side in sides}
        reference = losses[settings.sides[0]]["loss"]
        for name, found in losses.items():
            found["relative"] = abs(found["loss"] - reference) / abs(reference)
            print(f"{prompt}: {name} loss {found['loss']:.7f} ({found['relative']:.1e} relative)", file=sys.stderr, flush=True)
        wrong = [name for name, found in losses.items() if not found["relative"] <= TOLERANCE]
        if wrong or len({found["supervised"] for found in losses.values()}) > 1:
            raise SystemExit(f"{prompt}: the sides compute different losses, nothing is measured: {json.dumps(losses)}")
        warm = {side.name: side.ask("warm") for side in sides}
        rounds: dict[str, list] = {side.name: [] for side in sides}
        for number in range(settings.rounds):
            for side in sides:
                rounds[side.name].append(side.ask("round"))
                speed = rounds[side.name][-1]["examples"] / rounds[side.name][-1]["seconds"]
                print(f"{prompt}: round {number + 1}, {side.name} {speed:.3f} examples/s", file=sys.stderr, flush=True)
    return {name: losses[name] | warm[name] | summary(rounds[name], rounds[settings.sides[0]]) for name in settings.sides}


def summary(rounds: list[dict], first: list[dict]) -> dict[str, Any]:
    """Medians over the rounds; the ratio is the median of each round's ratio to the first side's turn of that round."""

    def speed(turn: dict, what: str) -> float:
        return turn[what] / turn["seconds"]

    ratios = [speed(ours, "examples") / speed(theirs, "examples") for ours, theirs in zip(rounds, first, strict=True)]
    return {
        "examples_per_second": statistics.median(speed(turn, "examples") for turn in rounds),
        "tokens_per_second": statistics.median(speed(turn, "tokens") for turn in rounds),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "examples_per_update": statistics.fmean(turn["examples"] / turn["updates"] for turn in rounds),
        "peak_bytes": max(turn["peak"] for turn in rounds),
        "rounds": rounds,
    }


def heading(found: dict[str, Any]) -> Iterator[str]:
    inputs, settings = found["inputs"], found["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    yield f"{found['date']}; {found['hardware']}; Python {platform.python_version()}, {versions}"
    yield ""
    dtype = settings["dtype"] + (" NF4" if settings["nf4"] else "")
    yield (
        f"{settings['shape']} ({inputs['parameters']:,} parameters, random weights), {dtype}, LoRA rank {RANK} on all projections, "
        f"dropout {DROPOUT}, SemEval-2010 Task 8; {settings['rows']} rows of {settings['row_length']} an update in (b), (c), (d); "
        f"{settings['rounds']} rounds of at least {settings['seconds']:g} s a side"
    )


def table(found: dict[str, Any], prompt: str) -> Iterator[str]:
    about, sides = found["inputs"]["prompts"][prompt], found["prompts"][prompt]
    yield ""
    yield f"**{prompt}**: {about['tokens']:.0f} tokens an example (longest {about['longest']}), {about['supervised']:.1f} supervised"
    yield ""
    yield f"| side | examples/s | x {next(iter(sides))} (rounds) | real tokens/s | examples an update | peak MiB | loss differs by |"
    yield "|---|---|---|---|---|---|---|"
    for name, side in sides.items():
        told = TOLD.get(name, "jaxre, " + name.partition(":")[2])
        ratio = f"{side['ratio']:.2f} ({min(side['ratios']):.2f} to {max(side['ratios']):.2f})"
        yield (
            f"| ({name}) {told} | {side['examples_per_second']:.2f} | {ratio} | {side['tokens_per_second']:,.0f} "
            f"| {side['examples_per_update']:.1f} | {side['peak_bytes'] / 2**20:,.0f} | {side['relative']:.0e} |"
        )


def hardware(device: str) -> str:
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"
    return cpu if device == "cpu" else f"{device}, {cpu}"


def versions() -> dict[str, str]:
    found = {}
    for package in ("jax", "torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", default=None, help=f"of {','.join(PROMPTS)}; all if not given, the first with --quick")
    parser.add_argument(
        "--sides", default="a,a',b,c", help="a, a', b, c, d (all of its variants) or one of them; the first is compared with"
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=2, help="rows an update of the packed sides")
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--examples", type=int, default=2000, help="of the training split")
    parser.add_argument("--rounds", type=int, default=None, help="7, or 2 with --quick")
    parser.add_argument("--seconds", type=float, default=None, help="least length of a turn: 30, or 5 with --quick")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of base weights and products")
    parser.add_argument("--nf4", action="store_true", help="base weights NF4 in the timed part (needs a GPU and bitsandbytes)")
    parser.add_argument("--compile", action="store_true", help="torch.compile in (b)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of (c) and (d)")
    parser.add_argument("--quick", action="store_true", help="one prompt, fewer and shorter rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    settings = parser.parse_args()
    settings.rounds = settings.rounds or (2 if settings.quick else 7)
    settings.seconds = settings.seconds or (5.0 if settings.quick else 30.0)
    settings.prompts = settings.prompts.split(",") if settings.prompts else list(PROMPTS)[: 1 if settings.quick else None]
    settings.sides = [name for given in settings.sides.split(",") for name in (VARIANTS if given == "d" else [given])]
    unknown = [name for name in settings.sides if name not in TOLD and name not in VARIANTS] + [
        p for p in settings.prompts if p not in PROMPTS
    ]
    if unknown:
        parser.error(f"{unknown[0]!r} is none of {', '.join([*TOLD, *VARIANTS, *PROMPTS])}")
    for name in list(settings.sides):
        missing = [package for package in NEEDED.get(name, ()) if importlib.util.find_spec(package) is None]
        if missing:
            print(f"({name}) is left out: {', '.join(missing)} not installed (pip install 'jaxre[bench]')", file=sys.stderr)
            settings.sides.remove(name)
    if not settings.sides:
        parser.error("no side is left to measure")
    if settings.json and not settings.json.absolute().parent.is_dir():
        parser.error(f"{settings.json.parent} is not there; name a folder that is")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the sides are ended too
    folder = Path(tempfile.mkdtemp(prefix="bench-training-"))
    try:
        with contextlib.closing(Side("prepare", folder, settings, None)) as worker:
            inputs = worker.ready()
        found = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "hardware": hardware(inputs["device"]),
            "versions": versions(),
            "settings": {key: value for key, value in vars(settings).items() if key != "json"},
            "inputs": inputs,
            "prompts": {},
        }
        print("\n".join(heading(found)))
        for prompt in settings.prompts:
            # Told and kept at once: a later prompt may need more memory than there is.
            found["prompts"][prompt] = bench_prompt(prompt, folder, settings)
            print("\n".join(table(found, prompt)), flush=True)
            if settings.json:
                settings.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
