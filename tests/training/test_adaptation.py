"""Language modelling on raw text, then SFT from that run: what starts where, and that an opened
base is as good as one that is read.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from refusals import refusal
from tiny import tiny_config
from tiny_runs import equal

from jaxre.checkpoints.source import open_model
from jaxre.config import Config
from jaxre.training.log import read_log
from jaxre.training.loop import train

F32 = np.dtype(np.float32)
SHORT = {
    "epochs": 1,
    "max_steps": 2,
    "schedule": "constant",
    "warmup": 0.0,
    "weight_decay": 0.0,
    "row_length": 128,
    "batch_tokens": 512,
}


def language_model(folder: Path, model: Path, method: str) -> Config:
    text = {"sources": [{"dataset": "facts", "split": "train", "limit": 48}]}
    settings = {"objective": "lm", "method": method, "best": "loss", "learning_rate": 1e-2} | SHORT
    return tiny_config(
        folder,
        model,
        f"text-{method}",
        data={"train": None, "validation": None, "labels": None, "text": text},
        train=settings,
    )


def sft(folder: Path, model: Path, name: str, method: str) -> Config:
    data = {"train": {"dataset": "facts", "split": "train", "limit": 24}, "validation": None}
    return tiny_config(
        folder,
        model,
        f"{name}-{method}",
        data=data,
        train=SHORT | {"method": method, "learning_rate": 1e-5},
    )


def curve(run: Path) -> list[tuple[float, float]]:
    return [(one["loss"], one["gradient_norm"]) for one in read_log(run) if one["kind"] == "train"]


def apart(one: dict, other: dict) -> float:
    """Largest difference of two trees of weights."""
    return max(
        float(np.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished language-model run of all weights, each moved by about 0.02."""
    return train(language_model(tmp_path_factory.mktemp("adapted"), tiny_model, "full"))


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_sft_starts_from_the_language_model_run_read_or_opened_before(
    tiny_model: Path, adapted: Path, tmp_path: Path, method: str
) -> None:
    """An opened base is not changed, though full fine-tuning donates what it trains."""
    opened = open_model(adapted, F32)
    before = jax.tree.map(np.copy, opened.base)
    read, again = (
        train(sft(tmp_path, adapted, "read", method)),
        train(sft(tmp_path, adapted, "opened", method), opened=opened),
    )
    assert curve(read) == curve(again) and equal(opened.base, before)
    tuned = [open_model(run, F32) for run in (read, again)]
    assert equal(tuned[0].base, tuned[1].base) and equal(tuned[0].factors, tuned[1].factors)
    # Two updates at 1e-5 move a weight by 2e-5 at most.
    assert (
        apart(tuned[0].base, before)
        <= (0.0 if method == "lora" else 3e-5)
        < 1e-2
        < apart(open_model(tiny_model, F32).base, before)
    )


@pytest.mark.once
def test_an_adapter_of_a_language_model_run_goes_on_in_sft(
    tiny_model: Path, tmp_path: Path
) -> None:
    first = train(language_model(tmp_path, tiny_model, "lora"))
    second = train(sft(tmp_path, first, "on", "lora"))
    begun, ended = open_model(first, F32), open_model(second, F32)
    assert equal(ended.base, open_model(tiny_model, F32).base)
    # a fresh B is zero, that of the first run is not
    assert 0 < apart(begun.factors, ended.factors) < 3e-5
    assert max(float(np.abs(pair["b"]).max()) for pair in begun.factors["last"].values()) > 1e-3
    assert "jaxre convert" in refusal(lambda: train(sft(tmp_path, first, "on", "full")))
