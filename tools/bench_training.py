"""Training throughput side by side with peers, on the same weights, examples and prompts.

    python tools/bench_training.py --quick
        # within 10 minutes on two CPU cores
    python tools/bench_training.py --prompts 0shot,2shot,2shot-enumerated --json bench.json
    python tools/bench_training.py --sides a,c,d
        # jaxre with each saving switched off in turn
    python tools/bench_training.py --sides b,c --packed flex_attention,varlen+compile

Sides: (a) the study's recipe, Hugging Face Trainer + PEFT, batches of 4 x 2 accumulation padded to
the longest, gradient checkpointing; (a') the same without checkpointing; (b) TRL's SFTTrainer +
PEFT with best-fit packing, whose attention and loss keep examples apart; (c) jaxre; (d) jaxre with
one saving switched off, for each of VARIANTS.

First every side computes the loss of the same examples, without dropout, by the code that it trains
with: in f32 on dense weights, and again in what is timed where that is bfloat16 or NF4 (but before
torch.compile). If one differs from the first side by more than TOLERANCES, nothing is measured
(exit code 1). On a GPU (b) is the fastest of what `--packed` names: each is tried for a short turn
of the first prompt, what fails or computes another loss is told and left out.

Then the sides take turns of whole updates: each is a process of its own that is stopped while
another one runs, and the first update of a turn is not timed. (a) to (c) take turns together, then
each of (d) with (c). Losses are checked in processes that have ended by then. Of a GPU's memory a
side takes at most SHARE, so that two of them fit. Needs the `bench` extra, and the data and
tokenizers of JAXRE_DATA and JAXRE_MODELS (../shared/data and ../shared/models).
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

from bench_sides import DROPOUT, PROMPTS, RANK, SHAPES, VARIANTS

# Relative, of the losses. In f32 sides differ by the order of their sums. In bfloat16, and on NF4
# weights dequantised to it, each rounds at other places: 1e-5 with two layers on a CPU, where NF4
# in place of dense weights makes 2e-3.
TOLERANCES = {"exact": 1e-4, "timed": 1e-3}
# of a device's memory: of a side among others (all but one or two of them need little), and of one
# by itself
SHARE, ALONE = 0.4, 0.9
# of a packed setting: its turn, and the whole of it with loading and compiling
TRIAL_SECONDS, TRIAL_LIMIT = (
    2.0,
    240.0,
)
TOLD = {
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


class Ended(SystemExit):
    """A side's process has ended, where it should have answered."""


class Side:
    """A side's process, stopped unless it is asked something."""

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: argparse.Namespace,
        prompt: str | None,
        share: float = ALONE,
    ):
        self.log = folder / f"{name.replace(':', '-')}-{prompt}.log"
        given = vars(settings) | {
            "json": None,
            "prompts": settings.prompts if prompt is None else [prompt],
            "share": share,
        }
        script = Path(__file__).with_name("bench_sides.py")
        command = [
            sys.executable,
            str(script),
            json.dumps({"side": name, "folder": str(folder), "settings": given}),
        ]
        # Memory is taken as it is needed, or the sides could not share a device.
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
            told = (
                " (killed; for want of memory? Sides keep theirs: measure fewer at a time)"
                if code == -signal.SIGKILL
                else ""
            )
            raise Ended(f"side {self.name} ended with code {code}{told}:\n" + "\n".join(end))
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
    the other.
    """
    losses = checked(prompt, folder, settings)
    found: dict[str, Any] = {}
    for group in groups_of(settings.sides):
        for name, one in measured(group, prompt, folder, settings).items():
            found.setdefault(name, losses[name] | one)
    return {name: found[name] for name in settings.sides}


def checked(prompt: str, folder: Path, settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The losses of every side and how far each is from the first's: `loss` in f32, `timed_loss` in
    what is timed where that differs.
    """
    losses: dict[str, dict[str, Any]] = {}
    for name in settings.sides:
        with contextlib.closing(Side(name, folder, settings, prompt)) as side:
            side.ready()
            losses[name] = {what: side.ask(f"check {what}") for what in checks_of(settings)}
    wrong = []
    for what in checks_of(settings):
        first = losses[settings.sides[0]][what]
        for name, found in losses.items():
            one = found[what]
            one["relative"] = relative(one["loss"], first["loss"])
            told = "float32" if what == "exact" else dtype_of(vars(settings))
            print(
                f"{prompt}: {name} {told} loss {one['loss']:.7f} ({one['relative']:.1e} relative)",
                file=sys.stderr,
                flush=True,
            )
            if not one["relative"] <= TOLERANCES[what] or one["supervised"] != first["supervised"]:
                wrong.append(f"{name} in {told}")
    if wrong:
        raise SystemExit(
            f"{prompt}: the sides compute different losses ({', '.join(wrong)}), nothing is"
            f" measured: {json.dumps(losses)}"
        )
    named = {"exact": "", "timed": "timed_"}
    return {
        name: {named[what] + key: one[key] for what, one in found.items() for key in one}
        for name, found in losses.items()
    }


def checks_of(settings: argparse.Namespace) -> list[str]:
    return ["exact"] if dtype_of(vars(settings)) == "float32" else ["exact", "timed"]


def dtype_of(settings: dict[str, Any]) -> str:
    return settings["dtype"] + (" NF4" if settings["nf4"] else "")


def relative(loss: float, reference: float) -> float:
    return abs(loss - reference) / abs(reference)


def groups_of(sides: list[str]) -> list[list[str]]:
    """Sides that take turns together: those that are no variant of (c), then each variant with
    (c).
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
                print(
                    f"{prompt}: round {number + 1}, {side.name} {speed:.3f} examples/s",
                    file=sys.stderr,
                    flush=True,
                )
    return {
        name: warm[name] | summary(rounds[name], rounds[group[0]]) | {"against": group[0]}
        for name in group
    }


def fastest_packed(
    prompt: str, folder: Path, settings: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Sets `settings.packed` to the fastest of those that it names, None if none works; returns
    what became of each.
    """
    tried = {
        packed: {"left_out": reason}
        for packed in settings.packed
        if (reason := unfit(packed, settings.dtype))
    }
    for packed in tried:
        tell(packed, tried[packed])
    able = [packed for packed in settings.packed if packed not in tried]
    speeds = dict.fromkeys(able, 0.0)
    if len(able) > 1:
        what, reference = checks_of(settings)[-1], None
        for name in [name for name in settings.sides if name != "b"][:1]:
            with contextlib.closing(Side(name, folder, settings, prompt)) as side:
                side.ready()
                reference = side.ask(f"check {what}")["loss"]
        for packed in able:
            tried[packed] = trial(packed, what, reference, prompt, folder, settings)
            tell(packed, tried[packed])
        speeds = {
            packed: tried[packed]["examples_per_second"]
            for packed in able
            if "left_out" not in tried[packed]
        }
    settings.packed = max(speeds, key=speeds.get, default=None)
    return tried


def tell(packed: str, one: dict[str, Any]) -> None:
    told = (
        f"is left out: {one['left_out']}"
        if "left_out" in one
        else f"{one['examples_per_second']:.3f} examples/s"
    )
    print(f"(b) with {packed} {told}", file=sys.stderr, flush=True)


def unfit(packed: str, dtype: str) -> str | None:
    """Why a packed setting cannot be tried, if so."""
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
    given = argparse.Namespace(**vars(settings) | {"packed": packed, "seconds": TRIAL_SECONDS})
    with contextlib.closing(Side("b", folder, given, prompt, SHARE)) as side:
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


def heading(found: dict[str, Any]) -> Iterator[str]:
    inputs, settings = found["inputs"], found["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    yield f"{found['date']}; {found['hardware']}; Python {platform.python_version()}, {versions}"
    yield ""
    yield (
        f"{settings['shape']} ({inputs['parameters']:,} parameters, random weights),"
        f" {dtype_of(settings)}, LoRA rank {RANK} on all projections, dropout {DROPOUT},"
        f" SemEval-2010 Task 8; {settings['rows']} rows of {settings['row_length']} an update in"
        f" (b), (c), (d); {settings['rounds']} rounds of at least {settings['seconds']:g} s a side"
    )


def table(found: dict[str, Any], prompt: str) -> Iterator[str]:
    about, sides = found["inputs"]["prompts"][prompt], found["prompts"][prompt]
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
                yield row(name, side, found["settings"]["packed"])


def row(name: str, side: dict[str, Any], packed: str) -> str:
    told = TOLD.get(name, "jaxre, " + name.partition(":")[2]) + (
        f", {packed}" if name == "b" else ""
    )
    if name == "b" and side.get("checkpointing"):
        told += ", gradient checkpointing"
    ratio = f"{side['ratio']:.2f} ({min(side['ratios']):.2f} to {max(side['ratios']):.2f})"
    differs = f"{side['relative']:.0e}" + (
        f" (f32), {side['timed_relative']:.0e}" if "timed_relative" in side else ""
    )
    return (
        f"| ({name}) {told} | {side['examples_per_second']:.2f} | {ratio} |"
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
    """Of the packages, and of a GPU's driver, where there is one."""
    found = {}
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
            found[package] = version(package)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["NVIDIA driver"] = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.split()[0]
    return found


def leave_out(settings: argparse.Namespace) -> None:
    """Removes, and says, the sides whose packages are not there."""
    for name in [name for name in settings.sides if name in NEEDED]:
        needed = (*NEEDED[name], *(["bitsandbytes"] if settings.nf4 else []))
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if missing:
            print(
                f"({name}) is left out: {', '.join(missing)} not installed (pip install"
                " 'jaxre[bench]')",
                file=sys.stderr,
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
        help="a, a', b, c, d (all of its variants) or one of them; the first is compared with",
    )
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
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
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of (c) and (d)"
    )
    parser.add_argument("--quick", action="store_true", help="one prompt, fewer and shorter rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    settings = parser.parse_args()
    settings.rounds = settings.rounds or (2 if settings.quick else 7)
    settings.seconds = settings.seconds or (5.0 if settings.quick else 30.0)
    settings.prompts = (
        settings.prompts.split(",")
        if settings.prompts
        else list(PROMPTS)[: 1 if settings.quick else None]
    )
    settings.sides = [
        name
        for given in settings.sides.split(",")
        for name in (VARIANTS if given == "d" else [given])
    ]
    if "c" not in settings.sides and any(name in VARIANTS for name in settings.sides):
        settings.sides.insert(0, "c")  # which they are measured against
    settings.packed = settings.packed and settings.packed.split(",")
    unknown = [name for name in settings.sides if name not in TOLD and name not in VARIANTS]
    unknown += [name for name in settings.prompts if name not in PROMPTS] + [
        name for name in settings.packed or () if name not in PACKED
    ]
    if unknown:
        parser.error(
            f"{unknown[0]!r} is none of {', '.join([*TOLD, *VARIANTS, *PROMPTS, *PACKED])}"
        )
    leave_out(settings)
    if not settings.sides:
        parser.error("no side is left to measure")
    if settings.json and not settings.json.absolute().parent.is_dir():
        parser.error(f"{settings.json.parent} is not there; name a folder that is")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the sides are ended too
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
                print("(b) is left out: no packed setting works", file=sys.stderr)
                settings.sides.remove("b")
        if not settings.sides:
            raise SystemExit("no side is left to measure")
        found = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
            "hardware": hardware(inputs["device"]),
            "versions": versions(),
            "settings": {key: value for key, value in vars(settings).items() if key != "json"},
            "inputs": inputs,
            "packed": tried,
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
