"""The loop: resume, kills, best checkpoint, what a run leaves behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config

from jaxre.checkpoints.peft import load_adapter
from jaxre.checkpoints.run_store import RunStore
from jaxre.checkpoints.source import open_model
from jaxre.config import load_config, save_config
from jaxre.errors import InputError
from jaxre.training.log import read_log
from jaxre.training.loop import train


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(run) if record["kind"] == "train"}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, never interrupted."""
    return train(tiny_config(tmp_path_factory.mktemp("finished"), tiny_model, train={"checkpoint_every": 3, "keep": 99}))


def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= {"config.yaml", "log.jsonl", "tensorboard", "checkpoints", "adapter"}
    kinds = {record["kind"] for record in read_log(finished)}
    assert kinds == {"train", "speed", "validation", "end"}
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert {"train/loss", "validation/f1", "speed/tokens_per_second"} <= set(events.Tags()["tensors"])
    assert len(events.Tensors("train/loss")) == len(losses(finished))


def test_the_loss_falls(finished: Path) -> None:
    found = losses(finished)
    assert found[len(found)] < 0.8 * found[1]


def test_the_best_checkpoint_becomes_the_adapter(finished: Path) -> None:
    config = load_config(finished / "config.yaml")
    validated = {record["step"]: record["f1"] for record in read_log(finished) if record["kind"] == "validation"}
    (end,) = (record for record in read_log(finished) if record["kind"] == "end")
    assert validated[end["best_step"]] == max(validated.values())
    store = RunStore(finished / "checkpoints", 99, "f1")
    saved = store.manager.restore(end["best_step"])
    loaded = open_model(finished, np.dtype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, load_adapter(finished / "adapter", loaded.architecture)[1], saved["trainable"])
    assert config.train.best == "f1"


def test_the_best_is_kept_beside_the_latest(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "checkpoints", keep=1, best="f1")
    state = {"w": jax.numpy.arange(4.0)}
    for step, f1 in enumerate([0.2, 0.9, 0.5, 0.6], 1):
        store.save(step, state, {"loss": 1.0, "f1": f1})
    store.wait()
    assert store.best_step == 2 and store.latest == 4
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == [2, 4]


def test_lowest_loss_is_best_where_there_is_no_f1(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "checkpoints", keep=9, best="loss")
    for step, loss in enumerate([3.0, 1.0, 2.0], 1):
        store.save(step, {"w": jax.numpy.zeros(2)}, {"loss": loss, "f1": loss})
    store.wait()
    assert store.best_step == 2


def test_a_finished_run_started_again_changes_nothing(finished: Path) -> None:
    before = losses(finished)
    adapter = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    assert train(load_config(finished / "config.yaml")) == finished
    assert losses(finished) == before
    assert (finished / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_another_config_on_the_same_folder_is_refused(finished: Path) -> None:
    config = load_config(finished / "config.yaml", ["train.learning_rate=0.5"])
    with pytest.raises(InputError, match=r"train\.learning_rate \(0\.01, now 0\.5\).*name="):
        train(config)


@pytest.mark.parametrize("batch", ["tokens", "examples"])
def test_a_killed_run_continues_the_exact_loss_curve(tiny_model: Path, tmp_path: Path, batch: str) -> None:
    """Killed three times, once with a checkpoint left half-written; every loss equals that of the run that was not."""
    changes = (
        {"train": {"checkpoint_every": 2}}
        if batch == "tokens"
        else {"train": {"checkpoint_every": 2, "batch_tokens": None, "batch_examples": 12, "accumulation": 2}}
    )
    whole = tiny_config(tmp_path, tiny_model, "whole", **changes)
    expected = losses(train(whole))
    broken = tiny_config(tmp_path, tiny_model, "broken", **changes)
    run, path = broken.run_folder, tmp_path / "broken.yaml"
    save_config(broken, path)
    for kill in (3, 7):
        process = subprocess.Popen([sys.executable, "-m", "jaxre.cli", "train", str(path)], stdout=subprocess.DEVNULL)
        while process.poll() is None and max(logged(run), default=0) < kill:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        half = run / "checkpoints" / f"{kill + 1}.orbax-checkpoint-tmp-1"
        half.mkdir()
        (half / "garbage").write_text("half-written")
        with (run / "log.jsonl").open("a") as log:
            log.write('{"kind": "train", "st')
    assert losses(train(broken)) == expected


def logged(run: Path) -> list[int]:
    path = run / "log.jsonl"
    if not path.is_file():
        return []
    return [
        int(line.split('"step": ')[1].split(",")[0]) for line in path.read_text().splitlines() if '"train"' in line and line.endswith("}")
    ]


def test_one_example_is_enough(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny_model, data={"train": {"dataset": "facts", "split": "train", "limit": 1}, "validation": None})
    assert len(losses(train(config))) == 2


def test_full_fine_tuning_writes_a_model(tiny_model: Path, tmp_path: Path) -> None:
    run = train(tiny_config(tmp_path, tiny_model, train={"method": "full", "epochs": 1, "learning_rate": 1e-3}))
    found = losses(run)
    assert found[len(found)] < found[1]
    assert open_model(run, None).factors is None and (run / "model" / "model.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny_model, train={"method": "full", "learning_rate": 1e30, "warmup": 0.0, "clip_norm": 1e9})
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        train(config)
    assert not (config.run_folder / "model").exists()
