"""`data.dedup` in a run: no training text is held out, whatever the token cache knew before."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny import tiny_config

from jaxre import cli
from jaxre.config import Config, save_config
from jaxre.objectives import load_dataset
from jaxre.relations import sources
from jaxre.relations.labels import task_of


def written(path: Path, texts: list[str]) -> dict:
    rows = [
        {"id": str(at), "text": text, "head": "Ada", "tail": "Bob", "relation": "met"}
        for at, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"dataset": str(path)}


def run_on(folder: Path, model: Path, dedup: bool, train: list[str], held_out: list[str]) -> Config:
    data = {
        "train": written(folder / "train.jsonl", train),
        "validation": written(folder / "held.jsonl", held_out),
    }
    return tiny_config(folder, model, data=data | {"labels": ["met"], "dedup": dedup})


TEXTS = [f"Ada met Bob on day {day}." for day in range(4)]


def test_a_run_with_dedup_trains_on_no_held_out_text(tiny_model: Path, tmp_path: Path) -> None:
    plain = load_dataset(run_on(tmp_path, tiny_model, False, TEXTS, TEXTS[:1]), tiny_model)
    config = run_on(tmp_path, tiny_model, True, TEXTS, TEXTS[:1])
    found = load_dataset(config, tiny_model)
    assert not found.train.from_cache
    assert (len(plain.train.tokens), len(found.train.tokens)) == (4, 3)
    assert not sources.overlap(found.train.examples, found.validation.examples)
    assert load_dataset(config, tiny_model).train.from_cache
    # what a prediction draws demonstrations from
    assert task_of(config, config.data.validation).train == found.train.examples


def test_other_held_out_data_is_other_training_data(tiny_model: Path, tmp_path: Path) -> None:
    load_dataset(run_on(tmp_path, tiny_model, True, TEXTS, TEXTS[:1]), tiny_model)
    again = load_dataset(run_on(tmp_path, tiny_model, True, TEXTS, TEXTS[2:]), tiny_model)
    assert not again.train.from_cache
    assert [example.text for example in again.train.examples] == TEXTS[:2]


def test_prepare_takes_dedup_as_an_option(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sources.say.cache_clear()
    save_config(run_on(tmp_path, tiny_model, False, TEXTS, TEXTS[:1]), tmp_path / "run.yaml")
    monkeypatch.setattr(sys, "argv", ["jaxre", "prepare", str(tmp_path / "run.yaml"), "--dedup"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "validation: 0 examples have a text of train" in capsys.readouterr().out
    assert "data.dedup: 1 of 4 training examples left out" in caplog.text
