"""The loop: resume, kills, best checkpoint, files of a run."""

from __future__ import annotations

import io
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refusal
from rich.console import Console
from safetensors.numpy import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import ARCHITECTURE, tiny_config, write_tiny_model

from jaxre.checkpoints.peft import load_adapter
from jaxre.checkpoints.run_store import RunStore
from jaxre.checkpoints.source import open_model
from jaxre.config import load_config, save_config
from jaxre.data.dataset import make_plan
from jaxre.data.loader import updates
from jaxre.errors import InputError
from jaxre.models.sharding import make_mesh
from jaxre.objectives import load_dataset
from jaxre.training.compilation import compile_updates
from jaxre.training.initial import initial_state, start_reading
from jaxre.training.log import RunLog, read_log
from jaxre.training.loop import check_finite, train
from jaxre.training.run_folder import first_difference
from jaxre.training.step import Metrics, make_optimiser


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_log(run) if record["kind"] == "train"}


def drawn(run: Path, tag: str) -> list[int]:
    """The steps of a TensorBoard curve."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    return [event.step for event in events.Tensors(tag)]


@pytest.fixture(scope="module")
def said() -> Console:
    """Output of the finished run."""
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, said: Console) -> Path:
    """A whole run, never interrupted."""
    return train(
        tiny_config(
            tmp_path_factory.mktemp("finished"),
            tiny_model,
            train={"checkpoint_every": 3, "keep": 99},
        ),
        said,
    )


def test_a_run_leaves_what_the_design_says(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= {
        "config.yaml",
        "log.jsonl",
        "tensorboard",
        "checkpoints",
        "adapter",
    }
    kinds = {record["kind"] for record in read_log(finished)}
    assert kinds == {"truncation", "train", "speed", "validation", "end"}
    assert drawn(finished, "train/loss") == list(losses(finished))
    assert drawn(finished, "validation/f1") and drawn(finished, "speed/tokens_per_second")


def test_what_was_chosen_is_printed_before_the_first_step(finished: Path, said: Console) -> None:
    before, _, during = said.file.getvalue().partition("validation loss")
    for line in (
        "trained",
        "frozen",
        "pad share",
        "supervised share",
        "attention",
        "LoRA",
        "compilations",
        "compiled memory",
        "MiB",
    ):
        assert line in before, line
    left = r"(-:--:--|\d+:\d\d:\d\d)"
    assert re.search(rf"loss \d+\.\d{{4}}  \d+\.\d examples/s  \d+ tokens/s +{left}", during)
    assert "examples whose text also occurs in train: 0 of 16 in validation" in before


def test_the_loss_falls(finished: Path) -> None:
    found = losses(finished)
    assert found[len(found)] < 0.8 * found[1]


def test_the_best_checkpoint_becomes_the_adapter(finished: Path) -> None:
    config = load_config(finished / "config.yaml")
    validated = {
        record["step"]: record["f1"]
        for record in read_log(finished)
        if record["kind"] == "validation"
    }
    (end,) = (record for record in read_log(finished) if record["kind"] == "end")
    assert validated[end["best_step"]] == max(validated.values())
    store = RunStore(finished / "checkpoints", 99, "f1")
    saved = store.manager.restore(end["best_step"])
    loaded = open_model(finished, np.dtype(np.float32))
    jax.tree.map(
        np.testing.assert_array_equal,
        load_adapter(finished / "adapter", loaded.architecture)[1],
        saved["trainable"],
    )
    assert config.train.best == "f1"


def test_the_best_and_the_latest_checkpoint_stay(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "checkpoints", keep=1, best="f1")
    state = {"w": jax.numpy.arange(4.0)}
    for step, f1 in enumerate([0.2, 0.9, 0.5, 0.6], 1):
        store.save(step, state, {"loss": 1.0, "f1": f1})
    store.wait()
    assert store.best_step == 2 and store.latest == 4
    assert sorted(
        int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()
    ) == [2, 4]


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
    assert losses(finished) == before and drawn(finished, "train/loss") == list(before)
    assert [record["kind"] for record in read_log(finished)].count("end") == 1
    assert (finished / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_another_config_on_the_same_folder_is_refused(finished: Path) -> None:
    config = load_config(finished / "config.yaml", ["train.learning_rate=0.5"])
    with pytest.raises(InputError, match=r"train\.learning_rate \(0\.01, now 0\.5\).*name="):
        train(config)


@pytest.mark.once
def test_a_killed_run_continues_the_exact_loss_curve(
    tiny_model: Path, tmp_path: Path, finished: Path
) -> None:
    """Killed with a checkpoint and a log record half-written; every loss equals that of the
    uninterrupted run.
    """
    expected = losses(finished)
    broken = tiny_config(tmp_path, tiny_model, "broken", train={"checkpoint_every": 2})
    run, path = broken.run_folder, tmp_path / "broken.yaml"
    save_config(broken, path)
    kill = 5
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxre.cli", "train", str(path)], stdout=subprocess.DEVNULL
    )
    while process.poll() is None and max(logged(run), default=0) < kill:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    half = run / "checkpoints" / f"{kill + 1}.orbax-checkpoint-tmp-1"
    half.mkdir(exist_ok=True)
    (half / "garbage").write_text("half-written")
    with (run / "log.jsonl").open("a") as log:
        log.write('{"kind": "train", "st')
    assert losses(train(broken)) == expected
    assert drawn(run, "train/loss") == list(expected)
    kinds = [
        (record["kind"], record["step"]) for record in read_log(run) if record["kind"] != "speed"
    ]
    assert sorted(kinds) == sorted(
        (one["kind"], one["step"]) for one in read_log(finished) if one["kind"] != "speed"
    )


@pytest.mark.slow
def test_a_run_is_one_process_and_goes_on_after_ctrl_c(
    tiny_model: Path, tmp_path: Path, finished: Path
) -> None:
    config = tiny_config(tmp_path, tiny_model, "stopped", train={"checkpoint_every": 3, "keep": 99})
    path = tmp_path / "stopped.yaml"
    save_config(config, path)
    # A shell's background jobs, and what they start, ignore SIGINT.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "jaxre.cli", "train", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not logged(config.run_folder):
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # it must not end before the second one has tried
    said = refusal(lambda: train(config))
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert "another process trains in it" in said
    assert (
        process.returncode == 130
        and "goes on from the last checkpoint" in errors
        and "Traceback" not in errors
    )
    assert losses(train(config)) == losses(finished)


@pytest.mark.once
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_memory_that_is_printed_is_that_of_weights_state_and_rows(
    tiny_model: Path, tmp_path: Path, method: str
) -> None:
    config = tiny_config(tmp_path, tiny_model, train={"method": method})
    dataset, mesh = load_dataset(config, tiny_model), make_mesh(config.mesh)
    plan, optimiser = make_plan(config, dataset.train.tokens, shards=1), make_optimiser(config, 4)
    initial = initial_state(config, jnp.float32, optimiser, mesh)
    kept, temporary = compile_updates(config, plan, initial, optimiser, mesh).memory
    rows = next(updates(dataset.train.tokens, plan))
    if method == "full":
        rows = rows._replace(owner=np.zeros(0))  # dropout's only; XLA leaves out what is not used
    held = sum(
        leaf.nbytes
        for leaf in jax.tree.leaves(
            (initial.state, initial.base if method == "lora" else None, rows)
        )
    )
    assert kept == held
    # The logits of the supervised positions are the least that must be held beside it.
    shape = plan.shapes[0]
    assert temporary >= shape.rows * shape.supervised * ARCHITECTURE["vocab_size"] * 4


@pytest.mark.slow
def test_a_run_by_examples_continues_the_exact_loss_curve(tiny_model: Path, tmp_path: Path) -> None:
    changes = {
        "checkpoint_every": 2,
        "keep": 99,
        "batch_tokens": None,
        "batch_examples": 12,
        "accumulation": 2,
        "epochs": 1,
    }
    config = tiny_config(tmp_path, tiny_model, train=changes)
    expected = losses(train(config))
    forget_after(config.run_folder, 4)
    assert losses(train(config)) == expected and len(expected) > 4


def test_a_run_killed_before_its_first_checkpoint_logs_its_data_once(tmp_path: Path) -> None:
    for _ in range(2):
        log = RunLog(tmp_path, 0)
        log.write("truncation", 0, {"cut": 1})
        log.write("train", 1, {"loss": 1.0})
        log.close()
    assert [record["kind"] for record in read_log(tmp_path)] == ["truncation", "train"]


def forget_after(run: Path, step: int) -> None:
    """Removes the checkpoints after a step, as if the run had been killed there."""
    for checkpoint in (run / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)


def logged(run: Path) -> list[int]:
    path = run / "log.jsonl"
    if not path.is_file():
        return []
    return [
        int(line.split('"step": ')[1].split(",")[0])
        for line in path.read_text().splitlines()
        if '"train"' in line and line.endswith("}")
    ]


@pytest.mark.once
def test_one_example_is_enough(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        tiny_model,
        data={"train": {"dataset": "facts", "split": "train", "limit": 1}, "validation": None},
    )
    assert len(losses(train(config))) == 2


@pytest.mark.once
def test_full_fine_tuning_writes_a_model(tiny_model: Path, tmp_path: Path) -> None:
    run = train(
        tiny_config(
            tmp_path, tiny_model, train={"method": "full", "epochs": 1, "learning_rate": 1e-3}
        )
    )
    found = losses(run)
    assert found[len(found)] < found[1]
    assert open_model(run, None).factors is None and (run / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_in_bf16_the_masters_stay_f32_and_the_losses_near(tiny_model: Path, tmp_path: Path) -> None:
    """Cosine schedule, as no other run here; the rate is small enough that rounding does not lead
    to another minimum.
    """
    changes = {"schedule": "cosine", "learning_rate": 1e-3}
    wide, narrow = (
        train(
            tiny_config(
                tmp_path,
                tiny_model,
                dtype,
                model={"dtype": dtype},
                data={"validation": None},
                train=changes,
            )
        )
        for dtype in ("float32", "bfloat16")
    )
    found, expected = (np.array(list(losses(run).values())) for run in (narrow, wide))
    np.testing.assert_allclose(found, expected, rtol=0.01)
    assert not np.array_equal(found, expected)  # the products were in bf16
    stored = load_file(narrow / "adapter" / "adapter_model.safetensors")
    assert {str(array.dtype) for array in stored.values()} == {"float32"}
    # An f32 master holds what bf16 cannot.
    assert any(
        not np.array_equal(array, array.astype(jnp.bfloat16).astype(np.float32))
        for array in stored.values()
    )


def test_a_language_model_of_one_layer_is_trained_from_scratch_and_resumed(
    tiny_model: Path, tmp_path: Path
) -> None:
    """One layer has an empty stack, which TensorStore does not hold."""
    config = tiny_config(
        tmp_path,
        tiny_model,
        data={
            "text": {
                "sources": [{"dataset": "facts", "split": "train", "limit": 96}],
                "holdout": 0.2,
            }
        },
        train={
            "method": "full",
            "objective": "lm",
            "learning_rate": 1e-3,
            "evaluate_every": 2,
            "keep": 99,
        },
    )
    architecture = ARCHITECTURE | {"num_hidden_layers": 1}
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"architecture": architecture})}
    )
    run = train(config)
    expected, written = losses(run), (run / "model" / "model.safetensors").read_bytes()
    validated = [record for record in read_log(run) if record["kind"] == "validation"]
    assert expected[len(expected)] < expected[1] and all(
        set(record) == {"kind", "step", "loss"} for record in validated
    )
    forget_after(run, 2)
    assert losses(train(config)) == expected
    assert (run / "model" / "model.safetensors").read_bytes() == written


def test_an_adapter_of_one_projection_and_one_layer_is_trained(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=1)
    data = {"train": {"dataset": "facts", "split": "train", "limit": 24}, "validation": None}
    run = train(
        tiny_config(
            tmp_path,
            model,
            data=data,
            lora={"targets": ["q"]},
            train={"epochs": 1, "batch_tokens": 512},
        )
    )
    loaded = open_model(run, np.dtype(np.float32))
    assert (
        loaded.lora.targets == ("q",)
        and set(loaded.factors["last"]) == {"q"}
        and np.any(loaded.factors["last"]["q"]["b"])
    )


def test_a_run_may_go_on_with_what_does_not_change_it() -> None:
    old = {
        "output": "runs",
        "mesh": {"data": None},
        "data": {"test": None, "cache": "a", "train": 1},
    }
    new = {
        "output": "/else",
        "mesh": {"data": 2},
        "data": {"test": {"dataset": "facts"}, "cache": "b", "train": 1},
    }
    assert first_difference(old, new) is None
    assert (
        first_difference(old, old | {"data": {"test": None, "cache": "a", "train": 2}})
        == "data.train (1, now 2)"
    )


def test_a_gradient_that_is_not_finite_is_found_in_the_step_it_happened(tmp_path: Path) -> None:
    """The loss of that step is finite, the state after it is not."""
    with pytest.raises(InputError, match="gradient norm is inf at step 4"):
        check_finite(
            [Metrics(1.0, 1.0), Metrics(1.0, float("inf")), Metrics(1.0, 1.0)], 5, tmp_path
        )


def test_a_loss_that_is_not_finite_stops_the_run(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        tiny_model,
        train={"method": "full", "learning_rate": 1e30, "warmup": 0.0, "clip_norm": 1e9},
    )
    with pytest.raises(InputError, match=r"train\.learning_rate"):
        train(config)
    assert not (config.run_folder / "model").exists()


def test_weights_that_do_not_load_are_refused_when_they_are_used(tmp_path: Path) -> None:
    """A separate thread reads them while the data is prepared."""
    read = start_reading(tiny_config(tmp_path, tmp_path / "absent"), np.dtype(np.float32))
    assert "absent" in refusal(read)


@pytest.mark.once
def test_examples_longer_than_a_row_are_listed_in_the_log(tiny_model: Path, tmp_path: Path) -> None:
    """Dropped, counted and listed: every example is either trained on or named."""
    config = tiny_config(
        tmp_path,
        tiny_model,
        data={"validation": None},
        train={"epochs": 1, "row_length": 96, "batch_tokens": 1536},
    )
    records = {record["kind"]: record for record in read_log(train(config))}
    record, cut = records["too_long"], records["truncation"]
    kept = load_dataset(config, tiny_model).train
    assert 0 < len(record["train"]) < 96 and set(record["train"]) == set(kept.dropped)
    assert len(record["train"]) + len(kept.tokens) == 96
    assert (cut["examples"], cut["cut"], cut["limit"]) == (96, len(record["train"]), 96)
