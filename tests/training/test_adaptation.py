"""Language modelling on raw text, then SFT from that run: what starts where, and that an opened base is as good as one that is read."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import tiny_config
from tiny_runs import equal

from jaxre.checkpoints.source import Loaded, open_model
from jaxre.config import Config
from jaxre.errors import InputError
from jaxre.training.log import read_log
from jaxre.training.loop import train

F32 = np.dtype(np.float32)
SHORT = {"epochs": 1, "max_steps": 4, "learning_rate": 1e-3}


def language_model(folder: Path, model: Path, name: str = "adapted", **settings: object) -> Config:
    text = {"sources": [{"dataset": "facts", "split": "train", "limit": 96}], "holdout": 0.1}
    train = {"objective": "lm", "method": "full", "row_length": 128, "batch_tokens": 512, "best": "loss"} | SHORT | settings
    return tiny_config(folder, model, name, data={"train": None, "validation": None, "labels": None, "text": text}, train=train)


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished language-model run."""
    return train(language_model(tmp_path_factory.mktemp("adapted"), tiny_model))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_sft_starts_from_the_weights_of_the_language_model_run(tiny_model: Path, adapted: Path, tmp_path: Path, method: str) -> None:
    """Its first loss is that of the folder which the run wrote, and not that of the base before it."""
    curves = {}
    for name, start in (("run", adapted), ("folder", adapted / "model"), ("before", tiny_model)):
        run = train(tiny_config(tmp_path, start, f"{method}-{name}", train=SHORT | {"method": method}))
        curves[name] = [(one["loss"], one["gradient_norm"]) for one in read_log(run) if one["kind"] == "train"]
    assert curves["run"] == curves["folder"] and curves["run"][0] != curves["before"][0]
    tuned = open_model(tmp_path / "runs" / f"{method}-run", F32)
    assert equal(tuned.base, open_model(adapted, F32).base) == (method == "lora")


def test_an_adapter_of_a_language_model_run_goes_on_in_sft(tiny_model: Path, tmp_path: Path) -> None:
    first = train(language_model(tmp_path, tiny_model, "lm-lora", method="lora"))
    second = train(tiny_config(tmp_path, first, "sft", train=SHORT))
    assert equal(open_model(second, F32).base, open_model(tiny_model, F32).base)
    with pytest.raises(InputError, match="jaxre convert"):
        train(tiny_config(tmp_path, first, "sft-full", train=SHORT | {"method": "full"}))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_that_is_open_already_trains_the_same_and_is_not_changed(tiny_model: Path, tmp_path: Path, method: str) -> None:
    opened = open_model(tiny_model, F32)
    before = jax.tree.map(np.copy, opened.base)
    runs = [train(tiny_config(tmp_path, tiny_model, "read", train=SHORT | {"method": method}))]
    for name in ("opened", "opened-again"):
        runs.append(train(tiny_config(tmp_path, tiny_model, name, train=SHORT | {"method": method}), opened=opened))
    found = [[one["loss"] for one in read_log(run) if one["kind"] == "train"] for run in runs]
    assert found[0] == found[1] == found[2]
    assert equal(opened.base, before)
    assert equal(weights(open_model(runs[0], F32)), weights(open_model(runs[2], F32)))


def weights(loaded: Loaded) -> tuple:
    return loaded.base, loaded.factors
