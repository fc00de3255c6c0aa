"""QLoRA runs: equal from a model folder and from a stored base, reported before step 1, and
predicted with the base of training.
"""

from __future__ import annotations

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refusal
from rich.console import Console
from tiny import tiny_config

from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.source import open_model
from jaxre.config import Config, check_config
from jaxre.data.dataset import make_plan
from jaxre.data.loader import updates
from jaxre.inference.commands import predict_data
from jaxre.models.quantised import is_nf4, is_quantised
from jaxre.models.sharding import make_mesh
from jaxre.objectives import load_dataset
from jaxre.training.compilation import compile_updates
from jaxre.training.initial import initial_state
from jaxre.training.log import read_log
from jaxre.training.loop import train
from jaxre.training.step import make_optimiser

# Other tests of the second jax line train on NF4 too (test_mesh) and predict with it
# (inference/test_quantised).
pytestmark = pytest.mark.once


def qlora(folder: Path, model: Path, name: str = "run", **changes: dict) -> Config:
    """`tiny_config` with model.quantise=nf4."""
    tree = tiny_config(folder, model, name, **changes).model_dump(mode="json")
    return check_config(tree | {"model": tree["model"] | {"quantise": "nf4"}}, "tiny")


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_log(run) if record["kind"] == "train"]


@pytest.fixture(scope="module")
def store(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    convert(tiny_model, tmp_path_factory.mktemp("store") / "nf4", "jaxre", quantise="nf4")
    return next(path for path in tmp_path_factory.getbasetemp().glob("store*/nf4"))


@pytest.fixture(scope="module")
def said() -> Console:
    return Console(file=io.StringIO(), width=240)


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, said: Console) -> Path:
    changes = {"test": {"dataset": "facts", "split": "test", "limit": 8}}
    return train(qlora(tmp_path_factory.mktemp("run"), tiny_model, data=changes), said)


def test_training_on_nf4_learns_and_is_reported_before_the_first_step(
    run: Path, said: Console
) -> None:
    found = losses(run)
    assert found[-1] < 0.8 * found[0]
    (line,) = (
        line
        for line in said.file.getvalue().partition("validation loss")[0].splitlines()
        if "NF4" in line and "MiB" in line
    )
    base = open_model(run, np.dtype(np.float32)).base
    projections = [leaf for leaf in jax.tree.leaves(base, is_leaf=is_nf4) if is_nf4(leaf)]
    whole, part = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 2**20 for tree in (base, projections)
    )
    assert f"{whole:,.1f} MiB" in line and f"{part:,.1f} MiB" in line and "float32" in line


@pytest.mark.once
def test_a_stored_base_gives_the_same_run_bit_for_bit(
    run: Path, store: Path, tmp_path: Path
) -> None:
    """The store is NF4, so the config need not set model.quantise."""
    assert losses(train(tiny_config(tmp_path, store, "stored"))) == losses(run)


@pytest.mark.once
def test_a_dense_base_gives_another_run(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    found = losses(train(tiny_config(tmp_path, tiny_model, train={"max_steps": 1, "epochs": 2})))
    assert found[0] != losses(run)[0] and abs(found[0] / losses(run)[0] - 1) < 0.1


def test_a_run_is_predicted_with_its_quantised_base_as_its_merged_model_is(
    run: Path, tmp_path: Path
) -> None:
    console = Console(file=io.StringIO())
    ours = predict_data(str(run), None, None, "score", tmp_path / "ours", None, console).rows
    convert(run, tmp_path / "merged", "hf", merge=True)
    merged = predict_data(
        str(tmp_path / "merged"),
        None,
        None,
        "score",
        tmp_path / "theirs",
        unquantised(run, tmp_path),
        console,
    ).rows
    for one, other in zip(ours, merged, strict=True):
        assert one.generated_relation == other.generated_relation
        assert one.score == pytest.approx(other.score, abs=1e-4)


def unquantised(run: Path, folder: Path) -> Path:
    """Writes the run's config for a merged model."""
    path = folder / "config.yaml"
    path.write_text((run / "config.yaml").read_text().replace("quantise: nf4", "quantise: null"))
    return path


@pytest.mark.once
def test_a_run_that_continues_another_takes_its_base(run: Path, tmp_path: Path) -> None:
    said = refusal(lambda: train(tiny_config(tmp_path, run)))
    assert (
        "model.quantise: None here, but the adapter of" in said
        and "was trained with nf4; set it to that" in said
    )
    continued = train(qlora(tmp_path, run, train={"max_steps": 2}))
    assert losses(continued)[0] < losses(run)[0] and is_quantised(open_model(continued, None).base)


def test_full_fine_tuning_of_a_quantised_base_is_refused(
    tiny_model: Path, store: Path, tmp_path: Path
) -> None:
    said = refusal(lambda: qlora(tmp_path, tiny_model, train={"method": "full"}))
    assert "model.quantise=nf4 freezes the base; set train.method=lora" in said
    said = refusal(lambda: train(tiny_config(tmp_path, store, train={"method": "full"})))
    assert (
        "is quantised, which full fine-tuning cannot change; name the model it was made from"
        in said
    )
    assert not (tmp_path / "runs").exists()


def test_the_memory_that_is_printed_counts_the_base_as_it_is_stored(
    tiny_model: Path, tmp_path: Path
) -> None:
    def compiled(config: Config) -> tuple[int, int]:
        optimiser, mesh = make_optimiser(config, 4), make_mesh(config.mesh)
        dataset = load_dataset(config, tiny_model)
        plan = make_plan(config, dataset.train.tokens, shards=1)
        initial = initial_state(config, jnp.float32, optimiser, mesh)
        kept, _ = compile_updates(config, plan, initial, optimiser, mesh).memory
        rows = next(updates(dataset.train.tokens, plan))
        return kept, sum(
            leaf.nbytes for leaf in jax.tree.leaves((initial.state, initial.base, rows))
        )

    kept, held = compiled(qlora(tmp_path, tiny_model))
    assert kept == held
