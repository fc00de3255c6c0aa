"""The implementation of each op in a run: chosen, reported, or refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxre_kernels import implementations
from jaxre_kernels.implementations import Entry
from jaxre_kernels.lora import dispatch
from jaxre_kernels.nf4 import dequantise, dequantise_tiles, quantise
from refusals import refusal
from tiny import tiny_config
from tiny_encoders import encoder_config

from jaxre.config import Kernels, Mesh
from jaxre.data.dataset import make_plan
from jaxre.models import kernels, sharding
from jaxre.models.kernels import check_kernels, ops_of
from jaxre.objectives import load_dataset
from jaxre.training.compilation import compile_updates
from jaxre.training.initial import initial_state, stored_for_kernels
from jaxre.training.loop import train
from jaxre.training.step import make_optimiser

OPS = ("attention", "lora", "cross_entropy")


def one_device() -> jax.sharding.Mesh:
    return sharding.make_mesh(Mesh(), jax.devices()[:1])


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_for_another_device_is_refused_before_a_run_folder_is_made(
    tiny_model: Path, tmp_path: Path, op: str
) -> None:
    config = tiny_config(tmp_path, tiny_model, kernels={op: "pallas_tpu"})
    assert (
        refusal(lambda: train(config))
        == f"kernels.{op}=pallas_tpu: is for a TPU, this is cpu; leave it out"
    )
    assert not config.run_folder.exists()


def mesh_like(platform: str, capability: str = "0.0", tensor: int = 1) -> SimpleNamespace:
    device = SimpleNamespace(
        platform=platform, compute_capability=capability, device_kind=f"a {platform} {capability}"
    )
    return SimpleNamespace(
        devices=np.array([device]), shape={"data": 1, "fsdp": 1, "tensor": tensor}
    )


@pytest.mark.parametrize(
    ("name", "mesh", "said"),
    [
        ("pallas_gpu", mesh_like("gpu", "8.9"), "is for a Hopper GPU, this is a gpu 8.9"),
        ("pallas_gpu", mesh_like("gpu", "10.0"), "is for a Hopper GPU"),
        ("pallas_gpu_sm80", mesh_like("gpu", "7.5"), "is for an Ampere or Ada GPU"),
        ("pallas_gpu", mesh_like("tpu"), "is for a Hopper GPU"),
        ("pallas_gpu", mesh_like("cuda", "9.0", tensor=2), "set mesh.tensor=1"),
        ("pallas_gpu", mesh_like("cuda", "9.0"), None),
        ("pallas_gpu_sm80", mesh_like("gpu", "9.0"), "is for an Ampere or Ada GPU"),
        ("pallas_gpu_sm80", mesh_like("gpu", "8.9"), None),
        ("pallas_tpu", mesh_like("tpu"), None),
        ("xla", mesh_like("cpu", tensor=2), None),
    ],
)
def test_a_kernel_runs_on_what_it_was_written_for(
    name: str, mesh: SimpleNamespace, said: str | None
) -> None:
    if said is None:
        check_kernels(Kernels(attention=name), mesh)
    else:
        assert said in refusal(lambda: check_kernels(Kernels(attention=name), mesh))


@pytest.mark.parametrize(
    ("version", "kind", "compiles"),
    [
        ((0, 10, 2), "TPU v5 lite", True),
        ((0, 10, 2), "TPU v5p", False),
        ((0, 10, 2), "TPU v6 lite", False),
        ((0, 11, 2), "TPU v6 lite", True),
    ],
)
def test_lora_that_a_jax_cannot_compile_for_a_tpu_is_refused(
    version, kind, compiles, monkeypatch
) -> None:
    """It compiles the other ops for all of them."""
    monkeypatch.setattr(jax, "__version_info__", version)
    mesh = mesh_like("tpu")
    mesh.devices[0].device_kind = kind
    check_kernels(Kernels(attention="pallas_tpu", cross_entropy="pallas_tpu"), mesh)
    if compiles:
        check_kernels(Kernels(lora="pallas_tpu"), mesh)
    else:
        assert f"for a TPU v5e alone, this is {kind}; take jax 0.11" in refusal(
            lambda: check_kernels(Kernels(lora="pallas_tpu"), mesh)
        )


def test_arrays_that_a_kernel_does_not_take_are_refused_when_the_update_is_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        kernels.HARDWARE, "pallas_tpu", kernels.HARDWARE["pallas_tpu"]._replace(platform="cpu")
    )
    ops = ops_of(
        Kernels(attention="pallas_tpu", cross_entropy="pallas_tpu", lora="pallas_tpu"), one_device()
    )
    q, until = jnp.zeros((1, 16, 2, 8), jnp.float16), jnp.zeros((1, 16), jnp.int32)
    said = refusal(lambda: ops.attention(q, q, q, until))
    assert said.startswith("kernels.attention=pallas_tpu: ") and "float16" in said
    x, table = jnp.zeros((1, 16, 8), jnp.float16), jnp.zeros((9, 8), jnp.float16)
    assert "float16" in refusal(
        lambda: ops.cross_entropy(x, table, until, until.astype(jnp.float32))
    )
    assert "float16" in refusal(lambda: ops.lora_group(x, [table.T], [None], None, 1.0, 0.0))


def test_an_update_reports_its_kernels_and_reads_the_table(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = jax.devices()[0].device_kind
    entry = Entry(
        "attention",
        kind,
        "float32",
        {"heads": (8, 8)},
        "xla",
        {"queries": 64},
        "2026-11-22",
        1.5,
        1e-6,
    )
    monkeypatch.setattr(implementations, "read_table", lambda: (entry,))
    config = tiny_config(tmp_path, tiny_model, kernels={"cross_entropy": "xla"})
    mesh, dataset = one_device(), load_dataset(config, tiny_model)
    plan, optimiser = make_plan(config, dataset.train.tokens, shards=1), make_optimiser(config, 4)
    reported = compile_updates(
        config, plan, initial_state(config, np.dtype(np.float32), optimiser, mesh), optimiser, mesh
    ).kernels
    assert set(reported) == set(OPS)
    assert reported["attention"].startswith(
        "xla (the table's: xla (queries 64), measured on cpu on 2026-11-22"
    )
    assert reported["cross_entropy"].startswith("xla (asked for; ")
    assert reported["lora"].startswith("xla (the default; opt-in, unverified: ")


def test_encoders_and_full_fine_tuning_refuse_kernels_that_they_do_not_have(
    tiny_model: Path, tmp_path: Path
) -> None:
    assert "leave them out" in refusal(
        lambda: encoder_config(tmp_path, tiny_model, kernels={"cross_entropy": "xla"})
    )
    assert (
        encoder_config(tmp_path, tiny_model, kernels={"attention": "xla"}).kernels.attention
        == "xla"
    )
    assert "train.method=lora" in refusal(
        lambda: tiny_config(tmp_path, tiny_model, train={"method": "full"}, kernels={"lora": "xla"})
    )
    assert "kernels.attention" in refusal(
        lambda: tiny_config(tmp_path, tiny_model, kernels={"attention": "cudnn"})
    )


@pytest.mark.parametrize("op", OPS)
def test_the_config_offers_what_there_is(op: str) -> None:
    (offered,) = (
        part for part in get_args(Kernels.model_fields[op].annotation) if part is not type(None)
    )
    assert (
        set(get_args(offered))
        == set(implementations.implementations_of(op))
        <= {"xla", *kernels.HARDWARE}
    )


def test_nf4_weights_are_brought_into_a_kernels_form_once(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    one, other = (quantise(draw.standard_normal((16, 128), np.float32)) for _ in range(2))
    base = {
        "last": {"q": one, "norm": np.ones(128)},
        "layers": {"q": jax.tree.map(lambda *leaves: np.stack(leaves), one, other)},
    }
    # as it was
    assert stored_for_kernels(base, Kernels(), "TPU v5e")["last"]["q"].shape == (
        16,
        128,
    )
    packed = stored_for_kernels(base, Kernels(lora="pallas_tpu"), None)
    for tiles, weight in (
        (packed["last"]["q"], one),
        (jax.tree.map(lambda leaf: leaf[1], packed["layers"]["q"]), other),
    ):
        np.testing.assert_array_equal(
            dequantise_tiles(tiles, jnp.float32), dequantise(weight, jnp.float32).T
        )
    narrow = {"last": {"q": quantise(draw.standard_normal((16, 96), np.float32))}}
    said = refusal(lambda: stored_for_kernels(narrow, Kernels(lora="pallas_tpu"), None))
    assert said.startswith("kernels.lora=pallas_tpu: NF4") and "multiple of 64" in said
    # So they are for the kernel that the table lists for the device, except those that it does not
    # support.
    entry = Entry("nf4", "TPU v5e", "bfloat16", {}, "pallas_tpu", {}, "2026-11-23", 2.0, 1e-3)
    monkeypatch.setattr(dispatch, "read_table", lambda: (entry,))
    assert jax.tree.structure(stored_for_kernels(base, Kernels(), "TPU v5e")) == jax.tree.structure(
        packed
    )
    assert jax.tree.structure(stored_for_kernels(base, Kernels(), "TPU v6e")) == jax.tree.structure(
        base
    )
    assert jax.tree.structure(
        stored_for_kernels(base, Kernels(lora="xla"), "TPU v5e")
    ) == jax.tree.structure(base)
    assert stored_for_kernels(narrow, Kernels(), "TPU v5e")["last"]["q"] is narrow["last"]["q"]
