"""Language modelling on raw text, then SFT from that run: what starts where, and that an opened base is as good as one that is read."""

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
SHORT = {"epochs": 1, "max_steps": 2, "learning_rate": 1e-3, "row_length": 128, "batch_tokens": 512}


def language_model(folder: Path, model: Path, method: str) -> Config:
    text = {"sources": [{"dataset": "facts", "split": "train", "limit": 48}]}
    settings = {"objective": "lm", "method": method, "best": "loss"} | SHORT
    return tiny_config(
        folder, model, f"text-{method}", data={"train": None, "validation": None, "labels": None, "text": text}, train=settings
    )


def sft(folder: Path, model: Path, name: str, method: str) -> Config:
    data = {"train": {"dataset": "facts", "split": "train", "limit": 24}, "validation": None}
    return tiny_config(folder, model, f"{name}-{method}", data=data, train=SHORT | {"method": method})


def curve(run: Path) -> list[tuple[float, float]]:
    return [(one["loss"], one["gradient_norm"]) for one in read_log(run) if one["kind"] == "train"]


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished language-model run of all weights."""
    return train(language_model(tmp_path_factory.mktemp("adapted"), tiny_model, "full"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_sft_starts_from_the_language_model_run_read_or_opened_before(tiny_model: Path, adapted: Path, tmp_path: Path, method: str) -> None:
    """An opened base is not changed, though full fine-tuning donates what it trains; it gives the same run a second time."""
    opened = open_model(adapted, F32)
    before = jax.tree.map(np.copy, opened.base)
    read = train(sft(tmp_path, adapted, "read", method))
    again = [train(sft(tmp_path, adapted, name, method), opened=opened) for name in ("first", "second")]
    assert curve(read) == curve(again[0]) == curve(again[1])
    assert curve(read)[0] != curve(train(sft(tmp_path, tiny_model, "unadapted", method)))[0]
    assert equal(opened.base, before)
    tuned = [open_model(run, F32) for run in (read, again[1])]
    assert equal(tuned[0].base, tuned[1].base) and equal(tuned[0].factors, tuned[1].factors)
    assert equal(tuned[0].base, before) == (method == "lora")


def test_an_adapter_of_a_language_model_run_goes_on_in_sft(tiny_model: Path, tmp_path: Path) -> None:
    first = train(language_model(tmp_path, tiny_model, "lora"))
    second = train(sft(tmp_path, first, "on", "lora"))
    assert curve(second)[0] != curve(train(sft(tmp_path, tiny_model, "fresh", "lora")))[0]
    assert equal(open_model(second, F32).base, open_model(tiny_model, F32).base)
    assert "jaxre convert" in refusal(lambda: train(sft(tmp_path, first, "on", "full")))
