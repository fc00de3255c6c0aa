"""Time and memory of `jaxre convert` on a random bf16 model of full size, beside `cp` of the same
folder.

    python tools/bench_conversion.py ../shared/models/Qwen/Qwen2.5-3B-Instruct runs/conversion
        --rounds 3 --json conversion.json

Every round runs each command once, in a process of its own, in turn; a time ends when the data is
on disk (sync). Memory is the process's largest resident set. The model converted to jaxre and back
must equal the original byte by byte. Needs disk space for five copies of the model.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from jaxre.checkpoints.huggingface import hf_shapes, write_base
from jaxre.checkpoints.peft import save_adapter
from jaxre.config import Lora
from jaxre.models.architecture import read_architecture
from jaxre.models.lora import init_adapter

BF16 = np.dtype(ml_dtypes.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "like", type=Path, help="folder with the config.json (and tokenizer) of a model"
    )
    parser.add_argument("work", type=Path, help="folder to work in; must not exist")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True)
    hf, ours, back, adapter = (options.work / name for name in ("hf", "ours", "back", "adapter"))
    # In a process of its own: a child's largest resident set begins at its parent's.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        size = pool.apply(write_random, (hf, adapter, options.like))

    convert = [sys.executable, "-m", "jaxre.cli", "convert"]
    copy, merged, nf4 = (options.work / name for name in ("copy", "merged", "nf4"))
    commands = {
        "cp": ["cp", "-r", hf, copy],
        "hf to jaxre": [*convert, hf, ours, "--to", "jaxre"],
        "jaxre to hf": [*convert, ours, back, "--to", "hf"],
        "adapter merged to hf": [*convert, adapter, merged, "--to", "hf", "--merge"],
        "hf to jaxre, nf4": [*convert, hf, nf4, "--to", "jaxre", "--quantise", "nf4"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory = dict.fromkeys(commands, 0)
    for _ in range(options.rounds):
        for name, command in commands.items():
            took, resident = measured(command)
            seconds[name].append(took)
            memory[name] = max(memory[name], resident)
        differing = [
            path.name
            for path in hf.glob("*.safetensors*")
            if not filecmp.cmp(path, back / path.name, shallow=False)
        ]
        if differing:
            sys.exit(f"converted back, these files differ: {', '.join(differing)}")
        for made in options.work.iterdir():
            if made not in (hf, adapter):
                shutil.rmtree(made)
    report(options, size, seconds, memory)
    shutil.rmtree(options.work)


def write_random(hf: Path, adapter: Path, like: Path) -> int:
    """Writes a random model of `like`'s architecture and an adapter of rank 16 on it; returns the
    bytes of the weights.
    """
    architecture = read_architecture(like)
    shapes = hf_shapes(architecture)
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(BF16)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for number, (name, shape) in enumerate(shapes.items()):
            yield name, np.resize(np.roll(block, 1009 * number), shape)

    hf.mkdir()
    write_base(hf, architecture, dict.fromkeys(shapes, BF16), tensors(), like)
    lora = Lora(rank=16)
    factors = init_adapter(architecture, lora, jax.random.key(0))
    save_adapter(adapter, architecture, lora, factors, str(hf), hf)
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


def measured(command: list) -> tuple[float, int]:
    """Runs a command; returns the seconds until the data is on disk, and the bytes of the process's
    largest resident set.
    """
    os.sync()
    began = time.perf_counter()
    words = [str(word) for word in command]
    _, status, used = os.wait4(os.posix_spawnp(words[0], words, os.environ), 0)
    os.sync()
    took = time.perf_counter() - began
    if status:
        sys.exit(f"failed: {' '.join(words)}")
    return took, used.ru_maxrss * 1024


def report(
    options: argparse.Namespace, size: int, seconds: dict[str, list[float]], memory: dict[str, int]
) -> None:
    copied = statistics.median(seconds["cp"])
    print(
        f"{options.like.name}: {size / 1e9:.2f} GB in bf16; {options.rounds} rounds;"
        f" {platform.machine()}, Python {platform.python_version()}"
    )
    for name, times in seconds.items():
        took = statistics.median(times)
        print(
            f"{name:22} {took:6.1f} s ({took / copied:4.1f} x cp, {size / 1e6 / took:5.0f} MB/s),"
            f" peak {memory[name] / 1e9:.2f} GB"
        )
    if options.json:
        model = options.like.name
        results = {"model": model, "bytes": size, "seconds": seconds, "peak_bytes": memory}
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
