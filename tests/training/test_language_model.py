"""The language-model objective with its head in chunks: losses and gradients of the dense head,
less memory, reported before step 1.
"""

from __future__ import annotations

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxre_kernels.cross_entropy import dispatch
from rich.console import Console
from tiny import tiny_config, write_tiny_model
from tiny_decoders import random_factors, relative

from jaxre.config import Config
from jaxre.data.dataset import make_plan
from jaxre.data.rows import fill_update
from jaxre.models import sharding
from jaxre.models.lora import model_of
from jaxre.objectives import load_dataset
from jaxre.objectives.sft import loss_sum
from jaxre.training.initial import initial_state
from jaxre.training.log import read_log
from jaxre.training.loop import train

TEXT = {"text": {"sources": [{"dataset": "facts", "split": "train", "limit": 96}], "holdout": 0.2}}
CHUNK = 100  # tokens at a time, of the 512 of an update


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("untied"), tie_word_embeddings=False)


def language_model(
    folder: Path, model: Path, /, name: str = "run", quantise: str | None = None, **train: object
) -> Config:
    settings = {"objective": "lm", "row_length": 128, "batch_tokens": 512, "remat": "none"} | train
    return tiny_config(folder, model, name, data=TEXT, model={"quantise": quantise}, train=settings)


CASES = {
    "tied, trained": ("tied", {"method": "full"}),
    "untied, trained": ("untied", {"method": "full"}),
    "tied, frozen": ("tied", {"method": "lora"}),
    "untied, frozen, nf4": ("untied", {"method": "lora", "quantise": "nf4"}),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_those_of_the_dense_head(
    tiny_model: Path, untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    folder = {"tied": tiny_model, "untied": untied}[CASES[case][0]]
    config = language_model(tmp_path, folder, **CASES[case][1])
    mesh = sharding.make_mesh(config.mesh)
    dataset = load_dataset(config, folder)
    initial = initial_state(config, np.dtype(np.float32), optax.sgd(1.0), mesh, dataset)
    tokens, plan = dataset.train.tokens, make_plan(config, dataset.train.tokens, shards=1)
    rows = jax.tree.map(
        lambda array: jnp.asarray(array[0]), fill_update(tokens, plan.prefixes, plan.updates[0])
    )
    trainable = initial.state.trainable
    if config.train.method == "lora":
        trainable = jax.tree.map(jnp.asarray, random_factors(initial.architecture, config.lora))

    def loss(trainable: dict, base: dict) -> jax.Array:
        params, adapter = model_of(trainable, base, config, None, np.dtype(np.float32))
        return (
            loss_sum(params, adapter, rows, initial.architecture, shape=plan.updates[0].shape)
            / rows.weights.sum()
        )

    found = {}
    for tokens_at_once in (1 << 20, CHUNK):
        monkeypatch.setattr(dispatch, "TOKENS", tokens_at_once)
        assert (dispatch.positions_at_once(rows.targets.shape) < rows.targets.shape[1]) == (
            tokens_at_once == CHUNK
        )
        found[tokens_at_once] = jax.tree_util.tree_leaves_with_path(
            jax.jit(jax.value_and_grad(loss))(trainable, initial.base)
        )
    for (path, ours), (_, reference) in zip(found[CHUNK], found[1 << 20], strict=True):
        # A bias of the keys shifts all scores of a query equally: its gradient is rounding.
        if "k_bias" not in jax.tree_util.keystr(path):
            assert relative(ours, reference) < 1e-5, path  # f32, sums in another order


@pytest.mark.once
def test_a_run_has_the_losses_of_the_dense_head_and_reports_its_choice(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves, said = {}, {}
    for tokens_at_once in (1 << 20, CHUNK):
        monkeypatch.setattr(dispatch, "TOKENS", tokens_at_once)
        console = Console(file=io.StringIO(), width=300)
        config = language_model(
            tmp_path, tiny_model, f"run-{tokens_at_once}", method="full", max_steps=4
        )
        run = train(config, console)
        curves[tokens_at_once] = [
            (one["loss"], one["gradient_norm"]) for one in read_log(run) if one["kind"] == "train"
        ]
        said[tokens_at_once] = console.file.getvalue()
    np.testing.assert_allclose(curves[CHUNK], curves[1 << 20], rtol=1e-4)  # four updates in f32
    assert len(curves[CHUNK]) == 4
    assert "all logits at once" in said[1 << 20] and "positions at a time, logits of" in said[CHUNK]
