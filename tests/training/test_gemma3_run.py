"""A run of Gemma 3: trained, validated, predicted, and merged into what transformers loads."""

from __future__ import annotations

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import refusal
from rich.console import Console
from tiny import tiny_config, write_tiny_model
from tiny_decoders import ground_truth, our_logits, relative, their_logits, tokens_of

from jaxre.checkpoints.convert import convert
from jaxre.checkpoints.source import open_model
from jaxre.config import Config, Kernels
from jaxre.inference.commands import predict_data
from jaxre.models import decoder, kernels, sharding
from jaxre.models.lora import scale_of
from jaxre.models.ops import Ops
from jaxre.training.log import read_log
from jaxre.training.loop import train

pytestmark = pytest.mark.once

GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def configured(folder: Path, model: Path, **changes: dict) -> Config:
    test = {"test": {"dataset": "facts", "split": "test", "limit": 8}}
    return tiny_config(folder, model, data=test, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("gemma3") / "model", **GEMMA3)


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(configured(tmp_path_factory.mktemp("run"), model), Console(file=io.StringIO()))


def test_a_run_learns(run: Path) -> None:
    losses = [record["loss"] for record in read_log(run) if record["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("source", ["run", "adapter"])
def test_the_merged_folder_loads_in_transformers_with_the_same_logits(
    run: Path, model: Path, tmp_path: Path, source: str
) -> None:
    torch, peft = ground_truth("torch"), ground_truth("peft")
    from transformers import AutoModelForCausalLM

    convert(run if source == "run" else run / "adapter", tmp_path / "merged", "hf", merge=True)
    loaded = open_model(run, None)
    merged, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype="auto", attn_implementation="eager", output_loading_info=True
    )
    assert merged.dtype == torch.float32 and not any(report.values())
    tokens = tokens_of(500, 2, 48)
    ours = our_logits(
        loaded.architecture,
        loaded.base,
        tokens,
        factors=loaded.factors,
        scale=scale_of(loaded.lora),
    )
    assert relative(ours, their_logits(merged.eval(), tokens)) < 1e-4
    beside = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto", attn_implementation="eager"),
        run / "adapter",
    ).eval()
    assert relative(ours, their_logits(beside, tokens)) < 1e-4
    # The adapter matters.
    assert relative(our_logits(loaded.architecture, loaded.base, tokens), ours) > 1e-2


def test_a_run_is_predicted_as_its_merged_model_is(run: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    convert(run, tmp_path / "merged", "hf", merge=True)
    given = {"run": str(run), "merged": str(tmp_path / "merged")}
    for mode in ("score", "generate"):
        ours, merged = (
            predict_data(
                path, None, None, mode, tmp_path / f"{name}-{mode}", run / "config.yaml", console
            ).rows
            for name, path in given.items()
        )
        for one, other in zip(ours, merged, strict=True):
            assert one.generated_relation == other.generated_relation
            assert one.score == pytest.approx(other.score, abs=1e-4)


def test_kernels_without_windows_are_refused_by_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, model, kernels={"attention": "pallas_tpu"})
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    loaded, chosen = open_model(model, np.dtype(np.float32)), {}
    params = jax.tree.map(jnp.asarray, loaded.base)
    rows = jax.ShapeDtypeStruct((1, 32), np.int32)

    def traced(ops: Ops) -> None:
        jax.eval_shape(
            lambda rows: decoder.forward(params, rows, rows, rows, loaded.architecture, ops=ops),
            rows,
        )

    traced(kernels.ops_of(Kernels(), mesh, chosen))
    assert all(name.startswith("xla") for name in chosen["attention"])
    monkeypatch.setattr(kernels, "check_kernels", lambda *_: None)  # this is a CPU
    said = refusal(lambda: traced(kernels.ops_of(config.kernels, mesh)))
    assert "kernels.attention=pallas_tpu" in said and "it knows no sliding window" in said
