"""Run folders as training leaves them, without the training."""

from __future__ import annotations

import jax
import numpy as np
from safetensors.numpy import load_file
from tiny_decoders import random_factors

from jaxre.checkpoints.huggingface import save_base
from jaxre.checkpoints.peft import save_adapter
from jaxre.checkpoints.source import open_model
from jaxre.config import Lora, check_config, save_config

LORA = Lora(rank=4, alpha=10.0, targets=("q", "down"))


def equal(one, other) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and jax.tree.all(
        jax.tree.map(np.array_equal, one, other)
    )


def bits(folder) -> dict:
    """name -> (dtype, shape, bytes) of every tensor of a Hugging Face folder."""
    return {
        name: (value.dtype, value.shape, value.tobytes())
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def make_run(folder, base, method: str, result: bool = True, **model):
    """Writes a run folder as training leaves it."""
    settings = {
        "name": "study-1",
        "model": {"path": str(base), **model},
        "data": {"train": {"dataset": "facts", "split": "train"}},
    }
    config = check_config(
        {**settings, "train": {"method": method, "batch_examples": 8}, "lora": LORA.model_dump()},
        "test",
    )
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    opened = open_model(base, None)
    if result and method == "lora":
        save_adapter(
            folder / "adapter",
            opened.architecture,
            LORA,
            random_factors(opened.architecture, LORA),
            str(base),
            opened.folder,
        )
    if result and method == "full":
        save_base(
            folder / "model",
            opened.architecture,
            jax.tree.map(lambda leaf: leaf * 2, opened.base),
            opened.folder,
        )
    return folder
