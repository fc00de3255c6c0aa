"""configs/models: one run a studied model, with the rank and alpha the study gives it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxre.config import load_config
from jaxre.models.architecture import read_architecture

PRESETS = Path(__file__).parents[2] / "configs/models"
# arXiv:2606.22606: rank and alpha by model.
STUDY = {
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", 16, 32),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", 32, 64),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", 64, 128),
    "smollm3-3b": ("HuggingFaceTB/SmolLM3-3B", 64, 128),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B-Instruct", 64, 128),
}


def test_every_studied_model_has_its_preset():
    assert {path.stem for path in PRESETS.iterdir()} == set(STUDY)


@pytest.mark.parametrize("name", STUDY)
def test_preset_is_a_run_with_the_settings_of_the_study(name, shared_models):
    config, (path, rank, alpha) = load_config(PRESETS / f"{name}.yaml"), STUDY[name]
    lora, train = config.lora, config.train
    assert (config.name, config.model.path) == (name, path)
    assert (lora.rank, lora.alpha, lora.dropout, lora.rslora) == (rank, alpha, 0.05, False)
    assert set(lora.targets) == {"q", "k", "v", "o", "gate", "up", "down"}
    assert (train.method, train.epochs, train.batch_examples, train.row_length) == (
        "lora",
        2,
        8,
        1024,
    )
    assert (
        train.learning_rate,
        train.schedule,
        train.warmup,
        train.weight_decay,
        train.clip_norm,
    ) == (1e-4, "linear", 0.03, 0.01, 1.0)
    assert train.row_length <= read_architecture(shared_models / path).max_length


def test_own_data_takes_the_overrides_that_the_preset_names():
    given = [
        "name=mine",
        "data.train.dataset=train.jsonl",
        "data.train.split=null",
        "data.validation=null",
        "data.test=null",
    ]
    for name in STUDY:
        path = PRESETS / f"{name}.yaml"
        text = path.read_text(encoding="utf-8").replace(" \\\n#", "")
        assert " ".join(given) in " ".join(text.split())
        config = load_config(path, given)
        assert (config.data.train.dataset, config.data.train.split, config.data.validation) == (
            "train.jsonl",
            None,
            None,
        )
