"""Peak memory of each conversion of a random model, in a process of its own: `python peak_memory.py
FOLDER`.

Prints JSON: bytes of the model, and by how much each conversion raised the process's resident
memory at its peak (Linux: VmHWM, reset before each). What a process holds when it starts is not
counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tiny_decoders import random_factors

from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.huggingface import hf_shapes
from jaxre.checkpoints.peft import save_adapter
from jaxre.config import Lora
from jaxre.models.architecture import read_architecture

FIELDS = {
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def write_model(folder: Path, **fields: int) -> int:
    """A random bf16 model; returns the bytes of its weights."""
    import ml_dtypes

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(FIELDS | fields))
    draw = np.random.default_rng(0)
    shapes = hf_shapes(read_architecture(folder))
    tensors = {
        name: draw.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(value.nbytes for value in tensors.values())


def convert_all(folder: Path) -> dict[str, int]:
    """Growth of the resident memory in each direction; every one is verified too."""
    architecture, lora = read_architecture(folder / "hf"), Lora(rank=4)
    save_adapter(
        folder / "adapter",
        architecture,
        lora,
        random_factors(architecture, lora),
        str(folder / "hf"),
        folder / "hf",
    )
    return {
        "to nf4": growth(
            lambda: convert(folder / "hf", folder / "nf4", "jaxre", quantise="nf4", verify=True)
        ),
        "from nf4": growth(lambda: convert(folder / "nf4", folder / "dense", "hf", verify=True)),
        "hf to jaxre": growth(
            lambda: convert(folder / "hf", folder / "ours", "jaxre", verify=True)
        ),
        "jaxre to hf": growth(lambda: convert(folder / "ours", folder / "back", "hf", verify=True)),
        "to float32": growth(
            lambda: convert(folder / "hf", folder / "wide", "jaxre", dtype="float32", verify=True)
        ),
        "merged": growth(
            lambda: convert(folder / "adapter", folder / "merged", "hf", merge=True, verify=True)
        ),
    }


def growth(call) -> int:
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_model(root / "small/hf", num_hidden_layers=2)
    # what is loaded, started and compiled (matrices of the same shapes) on first use
    convert_all(root / "small")
    size = write_model(root / "large/hf")
    print(json.dumps({"model": size} | convert_all(root / "large")))
