"""A run on several datasets: validation scores each with its own labels, and what it leaves
predicts each with its own.
"""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refusal
from rich.console import Console
from tiny import tiny_config, write_tiny_model

from jaxre.config import Config, check_config
from jaxre.data.dataset import Dataset, make_plan
from jaxre.evaluation.predictions import read_predictions
from jaxre.inference.commands import predict_data, predict_text
from jaxre.models.sharding import make_mesh
from jaxre.objectives import load_dataset
from jaxre.objectives.sft import Scored, Validation
from jaxre.training.initial import initial_state
from jaxre.training.log import read_log
from jaxre.training.loop import described_validation, train
from jaxre.training.step import make_optimiser


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def table(folder: Path, name: str, labels: list[str], count: int) -> dict:
    rows = [
        {
            "text": f"{name} {n} met Bob.",
            "head": name,
            "tail": "Bob",
            "relation": labels[n % len(labels)],
        }
        for n in range(count)
    ]
    (folder / f"{name}.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return {"dataset": str(folder / f"{name}.jsonl")}


def mixed(folder: Path, model: Path, *names: str) -> Config:
    tables = {
        "Ada": table(folder, "Ada", ["met", "left"], 7),
        "Eve": table(folder, "Eve", ["saw", "none", "heard"], 5),
    }
    data = {
        "train": {"sources": list(tables.values())},
        "validation": {"sources": [tables[name] for name in names]},
        "labels": None,
    }
    return tiny_config(folder, model, data=data, train={"batch_tokens": 1024})


def figures(config: Config, model: Path) -> dict[str, float]:
    dataset, mesh = load_dataset(config, model), make_mesh(config.mesh)
    plan = make_plan(config, dataset.train.tokens, 1)
    initial = initial_state(
        config, np.dtype("float32"), make_optimiser(config, len(plan.updates)), mesh, dataset
    )
    # An adapter that does something, else whichever label the base happens to prefer wins
    # everywhere.
    trained = jax.tree.map(
        lambda leaf: (
            leaf + 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape, jnp.float32)
        ),
        initial.state.trainable,
    )
    return Validation(config, dataset, initial.architecture, np.dtype("float32"), mesh).run(
        trained, initial.base
    )


@pytest.mark.once
def test_validation_scores_each_dataset_with_its_own_labels_and_reports_the_mean(
    model: Path, tmp_path: Path
) -> None:
    both = figures(mixed(tmp_path, model, "Ada", "Eve"), model)
    alone = figures(mixed(tmp_path, model, "Eve"), model)
    assert {key: both[f"{key}/Eve"] for key in ("f1", "accuracy", "collapsed")} == {
        key: alone[key] for key in ("f1", "accuracy", "collapsed")
    }
    for key in ("f1", "accuracy"):
        assert both[key] == pytest.approx((both[f"{key}/Ada"] + both[f"{key}/Eve"]) / 2)
    assert set(alone) == {"loss", "f1", "accuracy", "collapsed"}
    line = described_validation(both)
    assert "f1/Ada" in line and "accuracy/Ada" not in line


@pytest.mark.once
@pytest.mark.parametrize("row_length", [512, 65])  # with 65 some examples are left out
def test_the_scores_of_the_labels_hold_the_loss(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_length: int
) -> None:
    config = mixed(tmp_path, model, "Ada", "Eve")
    train = config.train.model_copy(
        update={"row_length": row_length, "batch_tokens": 2 * row_length}
    )
    config = config.model_copy(update={"train": train})
    passes, scored = [], Validation._scored

    def without_answers(self: Validation, dataset: Dataset) -> list[Scored]:
        nothing = np.zeros((2, 0), np.int64)
        return [dataclasses.replace(one, answers=nothing) for one in scored(self, dataset)]

    def counted(self: Validation, *given: object) -> dict[str, float]:
        passes.append(self.packed is not None)
        return run(self, *given)

    run = Validation.run
    monkeypatch.setattr(Validation, "run", counted)
    ours = figures(config, model)
    monkeypatch.setattr(Validation, "_scored", without_answers)
    theirs = figures(config, model)
    assert passes == [False, True]
    assert ours == pytest.approx(theirs, rel=1e-5)
    dropped = load_dataset(config, model).validation.dropped
    assert bool(dropped) == (row_length == 65)


def test_a_dataset_that_collapsed_is_named() -> None:
    line = described_validation(
        {
            "loss": 1.0,
            "f1": 0.5,
            "collapsed": True,
            "f1/a": 0.0,
            "collapsed/a": True,
            "f1/b": 1.0,
            "collapsed/b": False,
        }
    )
    assert line.endswith("COLLAPSED: one label is predicted for every example of a")


# ---- on the shipped base
# ---------------------------------------------------------------------------


@pytest.mark.once
def test_a_mixture_of_benchmarks_from_data_to_predictions(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXRE_DATA", str(shared_data))
    tree = {
        "name": "mixed",
        "output": str(tmp_path / "runs"),
        "model": {"path": "facts-base"},
        "data": {
            "train": {
                "name": "re_mixed",
                "sources": [
                    {"dataset": "facts", "split": "train", "limit": 8},
                    {"dataset": "conll04", "split": "train", "limit": 8},
                ],
                "limit": 10,
            },
            "test": {"dataset": "conll04", "split": "test", "limit": 3},
            "labels": {"conll04": {"dataset": "conll04", "split": "test"}},
            "cache": str(tmp_path / "cache"),
        },
        "prompt": {"system": None, "user": "{marked}\n{head} -> {tail}:", "shots": 1},
        "predict": {"batch_tokens": 1024, "prompt": {"enumerate": True, "shots": 0}},
        "train": {"epochs": 1, "max_steps": 1, "batch_tokens": 512, "row_length": 512},
    }
    said = io.StringIO()
    console = Console(file=said, width=300)
    run = train(check_config(tree, "test"), console)
    flag = "LABELS FROM THE TEST SPLIT: those of conll04 are collected from conll04/test"
    assert flag in said.getvalue()
    (record,) = [record for record in read_log(run) if record["kind"] == "data"]
    assert (
        "of 8 of conll04/train (general)" in record["notices"][0] and flag in record["notices"][1]
    )

    plain = predict_data(str(run), None, None, "score", None, None, console)
    styled = predict_data(str(run), None, None, "score", None, None, console, style="shots2-labels")
    assert said.getvalue().count(flag) == 3
    assert [path.path.name for path in (plain, styled)] == [
        "conll04-test-score.parquet",
        "conll04-test-score-shots2-labels.parquet",
    ]
    labels = {"Kill", "Live_In", "Located_In", "OrgBased_In", "Work_For", "none"}
    for rows, shots, style in (
        (plain.rows, "0", ""),
        (read_predictions(styled.path), "2", "shots2-labels"),
    ):
        assert {
            (row.model_shot, row.prompt_shot, row.prompt_style, row.gen_type) for row in rows
        } == {("1", shots, style, "gen_constrained")}
        assert all(set(row.probabilities) == labels for row in rows) and {
            row.tuned_dataset_name for row in rows
        } == {"re_mixed"}
        assert all(("- Kill: the head" in row.prompt) == bool(style) for row in rows)
    text = "<e1>Ada</e1> lives in <e2>London</e2>."
    assert "say whose labels the text has with --data NAME" in refusal(
        lambda: predict_text(str(run), text, "score", None)
    )
