"""jaxre folders: stored arrays, and refused folders."""

from __future__ import annotations

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from refusals import refusal
from tiny_decoders import CONFIGS, build
from tiny_runs import equal

from jaxre.checkpoints import native
from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.huggingface import load_base
from jaxre.checkpoints.native import load_native
from jaxre.checkpoints.source import open_model
from jaxre.errors import InputError


@pytest.fixture
def ours(tiny_base, tmp_path):
    convert(tiny_base, tmp_path / "ours", "jaxre")
    return tmp_path / "ours"


def test_jaxre_folder_of_another_version_is_refused(ours):
    (ours / "jaxre.json").write_text(json.dumps({"format": "jaxre weights", "version": 99}))
    with pytest.raises(
        InputError,
        match="version 99 is not known, this jaxre reads 2; convert the Hugging Face folder again",
    ):
        open_model(ours, None)


def test_jaxre_folder_whose_config_does_not_fit_is_refused_with_every_array(ours):
    config = json.loads((ours / "config.json").read_text())
    (ours / "config.json").write_text(
        json.dumps({**config, "intermediate_size": 50, "tie_word_embeddings": True})
    )
    with pytest.raises(InputError, match="do not fit config") as error:
        open_model(ours, None)
    for problem in (
        "head is not known",
        "last.up has shape [32, 48], expected [32, 50]",
        "layers.down has shape [2, 48, 32], expected [2, 50, 32]",
    ):
        assert problem in str(error.value)


CHUNK = "layers.gate/c/1/0/0"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weights: shutil.rmtree(weights), "no such folder"),
        (
            lambda weights: [shutil.rmtree(path) for path in weights.iterdir()],
            "embed is missing; norm is missing",
        ),
        (lambda weights: (weights / CHUNK).unlink(), "is missing"),
        (
            lambda weights: (weights / CHUNK).write_bytes((weights / CHUNK).read_bytes()[:100]),
            "Not enough data",
        ),
        (
            lambda weights: (weights / CHUNK).write_bytes(
                b"\1" + (weights / CHUNK).read_bytes()[1:]
            ),
            "Digest mismatch",
        ),
        (lambda weights: (weights / "norm/zarr.json").write_text("{"), "Invalid JSON"),
        (lambda weights: (weights / "norm/zarr.json").unlink(), "does not exist"),
    ],
    ids=[
        "no weights",
        "empty weights",
        "lost chunk",
        "cut chunk",
        "flipped bits",
        "broken metadata",
        "no metadata",
    ],
)
def test_damaged_jaxre_folder_is_refused(ours, tmp_path, damage, message):
    damage(ours / "weights")
    for call in (lambda: open_model(ours, None), lambda: convert(ours, tmp_path / "back", "hf")):
        refused = refusal(call)
        assert message in refused and refused.endswith("convert the Hugging Face folder again")
    assert not (tmp_path / "back").exists()


def test_layers_larger_than_a_chunk_are_cut_into_several(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "CHUNK_BYTES", 1000)
    build(CONFIGS["qwen2 tied, biases, grouped heads"], tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours", "jaxre", verify=True)
    files = [path for path in (tmp_path / "ours/weights").rglob("c/**/*") if path.is_file()]
    # and four bytes of checksum
    assert len(files) > 100 and max(path.stat().st_size for path in files) <= 1004
    assert equal(load_native(tmp_path / "ours")[1], load_base(tmp_path / "hf")[1])


def test_jaxre_folder_stores_bfloat16_as_such(tmp_path):
    build(CONFIGS["one layer"], tmp_path / "hf", dtype="bfloat16")
    convert(tmp_path / "hf", tmp_path / "ours", "jaxre")
    _, params = load_native(tmp_path / "ours")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert equal(params, load_base(tmp_path / "hf")[1])
