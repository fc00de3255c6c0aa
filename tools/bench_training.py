"""Training throughput side by side with peers, on the same weights, examples and prompts.

    python tools/bench_training.py --quick
        # within 10 minutes on two CPU cores
    python tools/bench_training.py --prompts 0shot,2shot,2shot-enumerated --json bench.json
    python tools/bench_training.py --sides a,c,d
        # jaxre with each saving switched off in turn
    python tools/bench_training.py --sides b,c --packed flex_attention,varlen+compile

Sides: (a) the study's recipe, Hugging Face Trainer + PEFT, batches of 4 x 2 accumulation padded to
the longest, gradient checkpointing; (a') the same without checkpointing; (b) TRL's SFTTrainer +
PEFT with best-fit packing, whose attention and loss isolate examples; (c) jaxre; (d) jaxre with one
saving switched off, for each of VARIANTS.

First every side computes the loss of the same examples, without dropout, with its training code: in
f32 on dense weights, and again in the timed precision if that is bfloat16 or NF4 (but before
torch.compile). If a side differs from the first by more than TOLERANCES, nothing is measured (exit
code 1). Then (a) and (c) train --curve updates on the same examples, without dropout, and the table
compares their losses, in bfloat16 too. On a GPU (b) is the fastest setting of `--packed`: each is
tried for a short turn of the first prompt; settings that fail or compute another loss are reported
and left out.

Then the sides take turns of whole updates: each is a process of its own that is stopped while
another runs, and the first update of a turn is not timed. (a) to (c) take turns together, then each
of (d) with (c). The processes that checked losses have ended by then. A side uses at most SHARE of
a GPU's memory, so that two fit. Needs the `bench` extra, and the data and tokenizers of JAXRE_DATA
and JAXRE_MODELS (../shared/data and ../shared/models).
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
import threading
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench_sides import BATCH, DROPOUT, PROMPTS, RANDOM, RANK, SHAPES, VARIANTS, default_model

# Relative differences of losses. In f32 sides differ by the order of their sums. In bfloat16, and
# on NF4 weights dequantised to it, they round in different places: 1e-5 with two layers on a CPU,
# where NF4 in place of dense weights changes the loss by 2e-3.
TOLERANCES = {"exact": 1e-4, "timed": 1e-3}
# Relative difference of any loss of a curve: AdamW may divide by small numbers, which amplifies
# differences.
CURVE_TOLERANCE = 1e-3
# Shares of a device's memory: of a side among others (all but one or two of them need little), and
# of a side by itself.
SHARE, ALONE = 0.4, 0.9
# Of the trial of a packed setting: its timed turn, and all of it with loading and compiling.
TRIAL_SECONDS, TRIAL_LIMIT = 2.0, 240.0
DESCRIPTIONS = {
    "a": "HF Trainer + PEFT, 4 x 2 padded, gradient checkpointing",
    "a'": "HF Trainer + PEFT, 4 x 2 padded",
    "b": "TRL SFTTrainer + PEFT, packed",
    "c": "jaxre",
}
TRAINER = ("torch", "transformers", "peft", "accelerate")
NEEDED = {"a": TRAINER, "a'": TRAINER, "b": (*TRAINER, "datasets", "trl")}
# (b)'s attention, and whether torch.compile compiles the model. `varlen` is PyTorch's own
# FlashAttention over packed examples; with `sdpa`, whose mask is dense, a micro-batch is one row.
PACKED = tuple(
    name + how
    for name in ("flash_attention_2", "varlen", "flex_attention", "sdpa")
    for how in ("", "+compile")
)
ONLY_HALF = ("flash_attention_2", "varlen")  # take no f32


def report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Ended(SystemExit):
    """A side's process ended instead of answering."""


class Side:
    """A side's process, stopped except while it executes a command."""

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: argparse.Namespace,
        prompt: str | None,
        share: float = ALONE,
    ):
        self.log = folder / f"{name.replace(':', '-')}-{prompt}.log"
        side_settings = vars(settings) | {
            "json": None,
            "prompts": settings.prompts if prompt is None else [prompt],
            "share": share,
        }
        script = Path(__file__).with_name("bench_sides.py")
        command = [
            sys.executable,
            str(script),
            json.dumps({"side": name, "folder": str(folder), "settings": side_settings}),
        ]
        # Without preallocation, so that the sides can share a device.
        environment = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_CLIENT_MEM_FRACTION": str(share),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=environment,
            )
        self.name = name

    def ready(self) -> dict[str, Any]:
        answer = self.answer()
        self.stop()
        return answer

    def ask(self, command: str) -> dict[str, Any]:
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # if it has ended, `answer` raises
            self.process.stdin.write(command + "\n")
        answer = self.answer()
        self.stop()
        return answer

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            end = self.log.read_text(errors="replace").strip().splitlines()[-12:]
            code = self.process.wait()
            hint = (
                " (killed; for want of memory? Sides keep theirs: measure fewer at a time)"
                if code == -signal.SIGKILL
                else ""
            )
            raise Ended(f"side {self.name} ended with code {code}{hint}:\n" + "\n".join(end))
        return json.loads(line)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def bench_prompt(prompt: str, folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Checks the losses of one kind of prompt, then measures in rounds, one group of sides after
    another.
    """
    losses = checked(prompt, folder, settings)
    results: dict[str, Any] = {}
    if settings.curve and {"a", "c"} <= set(settings.sides):
        losses["c"]["curve"] = curves(prompt, folder, settings)
    for group in groups_of(settings.sides):
        for name, measurement in measured(group, prompt, folder, settings).items():
            results.setdefault(name, losses[name] | measurement)
    return {name: results[name] for name in settings.sides}


def checked(prompt: str, folder: Path, settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The losses of every side and their relative differences to the first side's: `loss` in f32,
    `timed_loss` in the timed precision if that differs.
    """
    losses: dict[str, dict[str, Any]] = {}
    for name in settings.sides:
        with contextlib.closing(Side(name, folder, settings, prompt)) as side:
            side.ready()
            losses[name] = {what: side.ask(f"check {what}") for what in checks_of(settings)}
    wrong = []
    for what in checks_of(settings):
        first = losses[settings.sides[0]][what]
        precision = "float32" if what == "exact" else dtype_of(vars(settings))
        for name, checks in losses.items():
            check = checks[what]
            difference = check["relative"] = relative(check["loss"], first["loss"])
            report(
                f"{prompt}: {name} {precision} loss {check['loss']:.7f} ({difference:.1e} relative)"
            )
            if not difference <= TOLERANCES[what] or check["supervised"] != first["supervised"]:
                wrong.append(f"{name} in {precision}")
    if wrong:
        raise SystemExit(
            f"{prompt}: the sides compute different losses ({', '.join(wrong)}), nothing is"
            f" measured: {json.dumps(losses)}"
        )
    prefixes = {"exact": "", "timed": "timed_"}
    return {
        name: {
            prefixes[what] + key: value
            for what, check in checks.items()
            for key, value in check.items()
        }
        for name, checks in losses.items()
    }


def curves(prompt: str, folder: Path, settings: argparse.Namespace) -> dict[str, Any]:
    """Trains (a) and (c) on the same updates without dropout; returns their losses, and the
    relative differences to (a)'s in f32.
    """
    losses: dict[str, list[float]] = {}
    for name in ("c", "a"):  # (c)'s plan determines the examples of an update
        with contextlib.closing(Side(name, folder, settings, prompt)) as side:
            side.ready()
            for what in checks_of(settings):
                losses[f"{name} {what}"] = side.ask(f"curve {what}")["losses"]
    truth = losses["a exact"]
    apart = {
        name: [relative(loss, reference) for loss, reference in zip(curve, truth, strict=True)]
        for name, curve in losses.items()
    }
    worst = max(apart["c exact"])
    if not worst <= CURVE_TOLERANCE:
        raise SystemExit(
            f"{prompt}: (a) and (c) train differently (losses up to {worst:.1e} apart, relative),"
            f" nothing is measured: {json.dumps(losses)}"
        )
    return {"losses": losses, "apart": apart}


def described_curves(comparison: dict[str, Any], dtype: str) -> Iterator[str]:
    """The table of `curves`."""
    truth, apart = comparison["losses"]["a exact"], comparison["apart"]
    yield ""
    yield (
        f"{len(truth)} updates of {BATCH} examples, no dropout: the loss of (a) in f32 goes from"
        f" {truth[0]:.4f} to {truth[-1]:.4f}"
    )
    yield ""
    yield "| side | loss differs from (a) in f32, median | at most |"
    yield "|---|---|---|"
    for name, differences in apart.items():
        side, what = name.split()
        precision = "f32" if what == "exact" else dtype
        if name != "a exact":
            median, most = statistics.median(differences), max(differences)
            yield f"| ({side}) {precision} | {median:.1e} | {most:.1e} |"


def checks_of(settings: argparse.Namespace) -> list[str]:
    return ["exact"] if dtype_of(vars(settings)) == "float32" else ["exact", "timed"]


def dtype_of(settings: dict[str, Any]) -> str:
    return settings["dtype"] + (" NF4" if settings["nf4"] else "")


def relative(loss: float, reference: float) -> float:
    return abs(loss - reference) / abs(reference)


def groups_of(sides: list[str]) -> list[list[str]]:
    """Groups of sides that take turns together: all that are not variants of (c), then each variant
    with (c).
    """
    others = [name for name in sides if name not in VARIANTS]
    variants = [["c", name] for name in sides if name in VARIANTS]
    return variants if variants and others == ["c"] else [others, *variants]


def measured(
    group: list[str], prompt: str, folder: Path, settings: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        share = SHARE if len(group) > 1 else ALONE
        sides = [
            stack.enter_context(contextlib.closing(Side(name, folder, settings, prompt, share)))
            for name in group
        ]
        for side in sides:
            side.ready()
        warm = {side.name: side.ask("warm") for side in sides}
        rounds: dict[str, list] = {side.name: [] for side in sides}
        for number in range(settings.rounds):
            for side in sides:
                rounds[side.name].append(side.ask("round"))
                speed = rounds[side.name][-1]["examples"] / rounds[side.name][-1]["seconds"]
                report(f"{prompt}: round {number + 1}, {side.name} {speed:.3f} examples/s")
    return {
        name: warm[name] | summary(rounds[name], rounds[group[0]]) | {"against": group[0]}
        for name in group
    }


def fastest_packed(
    prompt: str, folder: Path, settings: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Sets `settings.packed` to its fastest setting, None if none works; returns the outcome of
    each trial.
    """
    tried = {
        packed: {"left_out": reason}
        for packed in settings.packed
        if (reason := unfit(packed, settings.dtype))
    }
    for packed in tried:
        report_trial(packed, tried[packed])
    candidates = [packed for packed in settings.packed if packed not in tried]
    speeds = dict.fromkeys(candidates, 0.0)
    if len(candidates) > 1:
        what, reference = checks_of(settings)[-1], None
        for name in [name for name in settings.sides if name != "b"][:1]:
            with contextlib.closing(Side(name, folder, settings, prompt)) as side:
                side.ready()
                reference = side.ask(f"check {what}")["loss"]
        for packed in candidates:
            tried[packed] = trial(packed, what, reference, prompt, folder, settings)
            report_trial(packed, tried[packed])
        speeds = {
            packed: tried[packed]["examples_per_second"]
            for packed in candidates
            if "left_out" not in tried[packed]
        }
    settings.packed = max(speeds, key=speeds.get, default=None)
    return tried


def report_trial(packed: str, result: dict[str, Any]) -> None:
    outcome = (
        f"is left out: {result['left_out']}"
        if "left_out" in result
        else f"{result['examples_per_second']:.3f} examples/s"
    )
    report(f"(b) with {packed} {outcome}")


def unfit(packed: str, dtype: str) -> str | None:
    """Why a packed setting cannot be tried; None if it can."""
    attention = packed.partition("+")[0]
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        return "flash_attn not installed"
    return "takes no float32" if attention in ONLY_HALF and dtype == "float32" else None


def trial(
    packed: str,
    what: str,
    reference: float | None,
    prompt: str,
    folder: Path,
    settings: argparse.Namespace,
) -> dict[str, Any]:
    """(b)'s loss and speed with one packed setting, or why it is `left_out`."""
    trial_settings = argparse.Namespace(
        **vars(settings) | {"packed": packed, "seconds": TRIAL_SECONDS}
    )
    with contextlib.closing(Side("b", folder, trial_settings, prompt, SHARE)) as side:
        timer = threading.Timer(TRIAL_LIMIT, side.process.kill)
        timer.start()
        try:
            side.ready()
            loss = side.ask(f"check {what}")["loss"]
            differs = 0.0 if reference is None else relative(loss, reference)
            if not differs <= TOLERANCES[what]:
                return {"left_out": f"its loss differs by {differs:.1e}", "loss": loss}
            warm, turn = side.ask("warm"), side.ask("round")
        except Ended as ended:
            late = "" if timer.is_alive() else f"not ready after {TRIAL_LIMIT:.0f} s; "
            return {"left_out": late + " ".join(str(ended).split())[-600:]}
        finally:
            timer.cancel()
    return warm | {
        "loss": loss,
        "examples_per_second": turn["examples"] / turn["seconds"],
        "peak_bytes": turn["peak"],
    }


def summary(rounds: list[dict], first: list[dict]) -> dict[str, Any]:
    """Medians over the rounds; the ratio is the median of each round's ratio to the first side's
    turn of that round.
    """

    def speed(turn: dict, what: str) -> float:
        return turn[what] / turn["seconds"]

    ratios = [
        speed(ours, "examples") / speed(theirs, "examples")
        for ours, theirs in zip(rounds, first, strict=True)
    ]
    return {
        "examples_per_second": statistics.median(speed(turn, "examples") for turn in rounds),
        "tokens_per_second": statistics.median(speed(turn, "tokens") for turn in rounds),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "examples_per_update": statistics.fmean(
            turn["examples"] / turn["updates"] for turn in rounds
        ),
        "peak_bytes": max(turn["peak"] for turn in rounds),
        "rounds": rounds,
    }


def heading(results: dict[str, Any]) -> Iterator[str]:
    inputs, settings = results["inputs"], results["settings"]
    versions = {"Python": platform.python_version(), **results["versions"]}
    described = ", ".join(f"{name} {number}" for name, number in versions.items())
    yield f"{results['date']}; {results['hardware']}; {described}"
    yield ""
    yield (
        f"{settings['model']} ({inputs['parameters']:,} parameters),"
        f" {dtype_of(settings)}, LoRA rank {RANK} on all projections, dropout {DROPOUT},"
        f" SemEval-2010 Task 8; {settings['rows']} rows of {settings['row_length']} an update in"
        f" (b), (c), (d); {settings['rounds']} rounds of at least {settings['seconds']:g} s a side"
    )


def table(results: dict[str, Any], prompt: str) -> Iterator[str]:
    about, sides = results["inputs"]["prompts"][prompt], results["prompts"][prompt]
    yield ""
    yield (
        f"**{prompt}**: {about['tokens']:.0f} tokens an example (longest {about['longest']}),"
        f" {about['supervised']:.1f} supervised"
    )
    for against in dict.fromkeys(side["against"] for side in sides.values()):
        yield ""
        yield (
            f"| side | examples/s | x {against} (rounds) | real tokens/s | examples an update |"
            " peak MiB | loss differs by |"
        )
        yield "|---|---|---|---|---|---|---|"
        for name, side in sides.items():
            if side["against"] == against:
                yield row(name, side, results["settings"]["packed"])

    if "curve" in sides.get("c", {}):
        yield from described_curves(sides["c"]["curve"], dtype_of(results["settings"]))


def row(name: str, side: dict[str, Any], packed: str) -> str:
    description = DESCRIPTIONS.get(name, "jaxre, " + name.partition(":")[2]) + (
        f", {packed}" if name == "b" else ""
    )
    if name == "b" and side.get("checkpointing"):
        description += ", gradient checkpointing"
    ratio = f"{side['ratio']:.2f} ({min(side['ratios']):.2f} to {max(side['ratios']):.2f})"
    differs = f"{side['relative']:.0e}" + (
        f" (f32), {side['timed_relative']:.0e}" if "timed_relative" in side else ""
    )
    return (
        f"| ({name}) {description} | {side['examples_per_second']:.2f} | {ratio} |"
        f" {side['tokens_per_second']:,.0f} | {side['examples_per_update']:.1f} |"
        f" {side['peak_bytes'] / 2**20:,.0f} | {differs} |"
    )


def hardware(device: str) -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cpu = f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"
    return cpu if device == "cpu" else f"{device}, {cpu}"


def versions() -> dict[str, str]:
    """Versions of the packages, and of the driver of a GPU."""
    installed = {}
    packages = (
        "jax",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "trl",
        "bitsandbytes",
        "flash-attn",
        "triton",
    )
    for package in (*packages, "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        with contextlib.suppress(PackageNotFoundError):
            installed[package] = version(package)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        installed["NVIDIA driver"] = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.split()[0]
    return installed


def leave_out(settings: argparse.Namespace) -> None:
    """Removes, and reports, the sides whose packages are not installed."""
    for name in [name for name in settings.sides if name in NEEDED]:
        needed = (*NEEDED[name], *(["bitsandbytes"] if settings.nf4 else []))
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if missing:
            report(
                f"({name}) is left out: {', '.join(missing)} not installed (pip install"
                " 'jaxre[bench]')"
            )
            settings.sides.remove(name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts",
        default=None,
        help=f"of {','.join(PROMPTS)}; all if not given, the first with --quick",
    )
    parser.add_argument(
        "--sides",
        default="a,a',b,c",
        help="a, a', b, c, d (all variants) or a variant; the first is the reference",
    )
    parser.add_argument(
        "--model",
        default=default_model(),
        help=(
            "folder, GGUF file, run, named base, or random weights:"
            f" {', '.join(RANDOM + name for name in SHAPES)} (default: %(default)s)"
        ),
    )
    parser.add_argument("--rows", type=int, default=2, help="rows an update of the packed sides")
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--examples", type=int, default=2000, help="of the training split")
    parser.add_argument("--rounds", type=int, default=None, help="7, or 2 with --quick")
    parser.add_argument(
        "--seconds", type=float, default=None, help="least length of a turn: 30, or 5 with --quick"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of base weights and products",
    )
    parser.add_argument(
        "--nf4",
        action="store_true",
        help="base weights NF4 in the timed part (bitsandbytes in (a) to (b))",
    )
    parser.add_argument(
        "--packed",
        metavar="NAMES",
        help=f"of {','.join(PACKED)}: (b) is the fastest; all on a GPU, else sdpa",
    )
    parser.add_argument(
        "--curve",
        type=int,
        metavar="UPDATES",
        help="also train (a) and (c) on the same updates without dropout; 50, or 0 with --quick",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of (c) and (d)"
    )
    parser.add_argument("--quick", action="store_true", help="one prompt, fewer and shorter rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    settings = parser.parse_args()
    settings.rounds = settings.rounds or (2 if settings.quick else 7)
    settings.seconds = settings.seconds or (5.0 if settings.quick else 30.0)
    if settings.curve is None:
        settings.curve = 0 if settings.quick else 50
    if settings.curve * BATCH > settings.examples:
        parser.error(f"--curve {settings.curve} needs --examples {settings.curve * BATCH} or more")
    settings.prompts = (
        settings.prompts.split(",")
        if settings.prompts
        else list(PROMPTS)[: 1 if settings.quick else None]
    )
    settings.sides = [
        name
        for option in settings.sides.split(",")
        for name in (VARIANTS if option == "d" else [option])
    ]
    if "c" not in settings.sides and any(name in VARIANTS for name in settings.sides):
        settings.sides.insert(0, "c")  # the reference of the variants
    settings.packed = settings.packed and settings.packed.split(",")
    for names, known in (
        (settings.sides, [*DESCRIPTIONS, *VARIANTS]),
        (settings.prompts, PROMPTS),
        (settings.packed or (), PACKED),
    ):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{unknown[0]!r} is none of {', '.join(known)}")
    leave_out(settings)
    if not settings.sides:
        parser.error("no side is left to measure")
    if settings.json and not settings.json.absolute().parent.is_dir():
        parser.error(f"{settings.json.parent} does not exist; name an existing folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the sides end too
    folder = Path(tempfile.mkdtemp(prefix="bench-training-"))
    try:
        with contextlib.closing(Side("prepare", folder, settings, None)) as worker:
            inputs = worker.ready()
        settings.packed = settings.packed or (
            list(PACKED) if inputs["platform"] == "gpu" else ["sdpa"]
        )
        tried = {}
        if "b" in settings.sides:
            tried = fastest_packed(settings.prompts[0], folder, settings)
            if settings.packed is None:
                report("(b) is left out: no packed setting works")
                settings.sides.remove("b")
        if not settings.sides:
            raise SystemExit("no side is left to measure")
        results = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "hardware": hardware(inputs["device"]),
            "versions": versions(),
            "settings": {key: value for key, value in vars(settings).items() if key != "json"},
            "inputs": inputs,
            "packed": tried,
            "prompts": {},
        }
        print("\n".join(heading(results)))
        for prompt in settings.prompts:
            # Printed and saved at once: a later prompt may run out of memory.
            results["prompts"][prompt] = bench_prompt(prompt, folder, settings)
            print("\n".join(table(results, prompt)), flush=True)
            if settings.json:
                settings.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
