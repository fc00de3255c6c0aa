"""Run by test_mesh.py on 8 simulated devices: loss and gradients of one update on one device and on
several meshes.

python mesh_gradients.py MODEL_FOLDER WORK_FOLDER METHOD  -> one JSON line per mesh; METHOD is lora,
full, qlora or full-lm, or lora-pallas, full-pallas or qlora-pallas: there the mesh runs the kernels
for TPUs, interpreted, and one device XLA
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import pallas as pl
from jaxre_kernels.cross_entropy import dispatch
from tiny import tiny_config

from jaxre.data.dataset import make_plan
from jaxre.data.rows import fill_update
from jaxre.models import kernels, sharding
from jaxre.models.kernels import ops_of
from jaxre.models.lora import model_of
from jaxre.objectives import load_dataset
from jaxre.objectives.sft import loss_sum
from jaxre.training.initial import initial_state
from jaxre.training.step import dropout_keys

# Some with the memory policy, so that it is held against one device that keeps everything.
EVERY_AXIS = ({"data": 2, "fsdp": 2, "tensor": 2}, "block")
# For LoRA alone: whether weights train, are NF4 or the loss is in pieces changes how the same axes
# split them, not which axes there are.
MESHES = ({"data": 8}, "none"), ({"fsdp": 8}, "block"), ({"tensor": 8}, "none"), EVERY_AXIS
PALLAS_MESH = ({"data": 2, "fsdp": 4}, "block")


def gradients(config, model: Path, devices: list, remat: str) -> tuple[float, dict]:
    """Loss and gradients of the first update, computed as `make_update` computes them."""
    mesh = sharding.make_mesh(config.mesh, devices)
    dtype = np.dtype(np.float32)
    initial = initial_state(config, dtype, optax.sgd(1.0), mesh)
    dataset = load_dataset(config, model)
    plan = make_plan(config, dataset.train.tokens, shards=1)
    tokens = dataset.train.tokens
    assert config.train.objective == "lm" or plan.fill(tokens.lengths, tokens.supervised).shared > 0
    rows = sharding.put_rows(
        fill_update(tokens, plan.prefixes, plan.updates[0]), sharding.row_sharding(mesh)
    )
    ops = ops_of(config.kernels, mesh)
    trainable = jax.tree.map(perturbed, initial.state.trainable)

    def loss(trainable):
        micro = jax.tree.map(lambda array: array[0], rows)
        keys = dropout_keys(config.seed, jnp.int32(3), micro)
        params, adapter = model_of(trainable, initial.base, config, keys, dtype)
        return loss_sum(
            params, adapter, micro, initial.architecture, ops, plan.updates[0].shape, remat
        ) / jnp.sum(micro.weights)

    value, found = jax.jit(jax.value_and_grad(loss))(trainable)
    return float(value), jax.device_get(found)


def perturbed(leaf: jax.Array) -> jax.Array:
    """The leaf with fixed noise, so that B of no LoRA pair is zero."""
    noise = 0.05 * np.random.default_rng(leaf.size).standard_normal(leaf.shape)
    return jax.device_put(np.asarray(leaf) + noise.astype(np.float32), leaf.sharding)


def interpret_kernels() -> None:
    """Kernels for TPUs run on this CPU from here on."""
    call = pl.pallas_call
    pl.pallas_call = lambda *given, **more: call(*given, **more | {"interpret": True})
    kernels.HARDWARE["pallas_tpu"] = kernels.HARDWARE["pallas_tpu"]._replace(platform="cpu")


def main(model: str, work: str, method: str) -> None:
    reference, part = None, method.partition("-")[2]
    meshes = MESHES if method == "lora" else (PALLAS_MESH if part == "pallas" else EVERY_AXIS,)
    for axes, remat in (({}, "none"), *meshes):
        full = method.startswith("full")
        settings = {"train": {"method": "full" if full else "lora"}}
        if part == "pallas" and axes:
            settings["kernels"] = dict.fromkeys(
                ["attention", "cross_entropy", *([] if full else ["lora"])], "pallas_tpu"
            )
            interpret_kernels()
        if part == "lm":
            settings["data"] = {
                "text": {
                    "sources": [{"dataset": "facts", "split": "train", "limit": 96}],
                    "holdout": 0.1,
                }
            }
            settings["train"] |= {"objective": "lm"}
            # One device takes all logits at once, each of the others 4 to 14 of its positions at a
            # time.
            dispatch.TOKENS = 14 if axes else 1 << 20
        config = tiny_config(Path(work), Path(model), mesh=axes, **settings)
        if method.startswith("qlora"):
            config = config.model_copy(
                update={"model": config.model.model_copy(update={"quantise": "nf4"})}
            )
        found = gradients(config, Path(model), jax.devices() if axes else jax.devices()[:1], remat)
        reference = reference or found
        worst = max(
            float(np.abs(a - b).max() / np.abs(b).max())
            for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(reference[1]), strict=True)
        )
        print(
            json.dumps(
                {
                    "mesh": axes,
                    "loss": abs(found[0] - reference[0]) / reference[0],
                    "gradient": worst,
                }
            ),
            flush=True,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
