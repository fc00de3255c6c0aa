"""Time and memory of `jaxre convert` on a random bf16 model of full size, beside `cp` of the same
folder.

    python tools/bench_conversion.py ../shared/models/Qwen/Qwen2.5-3B-Instruct runs/conversion
        --rounds 3 --json conversion.json

Every round runs each command once, in a process of its own, in turn; a time ends when the disk has
the data (sync). Memory is the process's largest resident set. What comes back from our store is
compared byte by byte with what went in. Needs room for five copies of the model.
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
    asked = parser.parse_args()
    asked.work.mkdir(parents=True)
    hf, ours, back, adapter = (asked.work / name for name in ("hf", "ours", "back", "adapter"))
    # In a process of its own: a child's largest resident set begins at its parent's.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        size = pool.apply(write_random, (hf, adapter, asked.like))

    convert = [sys.executable, "-m", "jaxre.cli", "convert"]
    commands = {
        "cp": ["cp", "-r", hf, asked.work / "copy"],
        "hf to jaxre": [*convert, hf, ours, "--to", "jaxre"],
        "jaxre to hf": [*convert, ours, back, "--to", "hf"],
        "adapter merged to hf": [*convert, adapter, asked.work / "merged", "--to", "hf", "--merge"],
        "hf to jaxre, nf4": [
            *convert,
            hf,
            asked.work / "nf4",
            "--to",
            "jaxre",
            "--quantise",
            "nf4",
        ],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    memory = dict.fromkeys(commands, 0)
    for _ in range(asked.rounds):
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
            sys.exit(f"not what went in: {', '.join(differing)}")
        for made in asked.work.iterdir():
            if made not in (hf, adapter):
                shutil.rmtree(made)
    report(asked, size, seconds, memory)
    shutil.rmtree(asked.work)


def write_random(hf: Path, adapter: Path, like: Path) -> int:
    """A random model of `like`'s architecture and an adapter of rank 16 on it; returns the bytes of
    the weights.
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
    """(seconds until the disk has the data, bytes of the process's largest resident set)."""
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
    asked: argparse.Namespace, size: int, seconds: dict[str, list[float]], memory: dict[str, int]
) -> None:
    copied = statistics.median(seconds["cp"])
    print(
        f"{asked.like.name}: {size / 1e9:.2f} GB in bf16; {asked.rounds} rounds;"
        f" {platform.machine()}, Python {platform.python_version()}"
    )
    for name, times in seconds.items():
        took = statistics.median(times)
        print(
            f"{name:22} {took:6.1f} s ({took / copied:4.1f} x cp, {size / 1e6 / took:5.0f} MB/s),"
            f" peak {memory[name] / 1e9:.2f} GB"
        )
    if asked.json:
        asked.json.write_text(
            json.dumps(
                {"model": asked.like.name, "bytes": size, "seconds": seconds, "peak_bytes": memory},
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
