"""Run by test_step_aot.py: whole training steps compiled ahead of time for devices that are not
here.

python step_program.py CASES  -> for each case a line `STEP {"arguments", "peak", "kernels"}`; the
first two are bytes a chip. CASES is a JSON list of the arguments of `step`. Nothing is allocated:
weights and rows are shapes.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jaxre_kernels.nf4 import NF4Weight
from jaxre_kernels.nf4 import forms as nf4_forms

from jaxre.config import check_config
from jaxre.data.packing import RowShape
from jaxre.models import sharding
from jaxre.models.architecture import architecture_of
from jaxre.models.kernels import ops_of
from jaxre.models.lora import init_adapter
from jaxre.models.quantised import is_nf4
from jaxre.models.weights import places, tree_of
from jaxre.training.compilation import compile_update
from jaxre.training.initial import Initial, stored_for_kernels
from jaxre.training.step import State, make_optimiser

DTYPE = jnp.dtype(jnp.bfloat16)


def step(target: str, model: dict, rows: int, length: int, supervised: int, settings: dict) -> dict:
    """The update of a LoRA run on rows [rows, length], of the fields of a config.json and of a
    config.

    target: "v5e:2x4", or a file with what XLA has to know of a GPU.
    """
    config = check_config(settings, "step")
    architecture = architecture_of(model, "step")
    mesh = sharding.make_mesh(config.mesh, devices_of(target))
    optimiser = make_optimiser(config, 1000)
    chosen: dict = {}
    ops = ops_of(config.kernels, mesh, chosen)
    shape = RowShape(rows, length, supervised, 64, 512)
    compiled = compile_update(
        config,
        initial_of(config, architecture, optimiser, mesh),
        optimiser,
        mesh,
        ops,
        shape,
        1,
        config.train.remat,
    )
    analysis = compiled.memory_analysis()
    return {
        "arguments": analysis.argument_size_in_bytes,
        "peak": analysis.peak_memory_in_bytes,
        "kernels": {op: list(chosen[op]) for op in chosen},
    }


def devices_of(target: str) -> list:
    if Path(target).is_file():
        description = topologies.get_topology_desc(
            "", platform="cuda", target_config=Path(target).read_text(), topology="1x1x1"
        )
    else:
        description = topologies.get_topology_desc(target, platform="tpu")
    return list(description.devices)


def initial_of(config, architecture, optimiser, mesh) -> Initial:
    """The result of `initial_state` for a LoRA run, as shapes with shardings."""
    base = tree_of(
        (path, weight_of(weight, shape, config.model.quantise))
        for weight, path, shape, _ in places(architecture)
    )
    base = placed(
        base, sharding.quantised_shardings(base, sharding.base_shardings(architecture, mesh), mesh)
    )
    base = jax.tree.map(partial(as_stored, mesh=mesh, kernels=config.kernels), base, is_leaf=is_nf4)
    factors = jax.eval_shape(
        lambda key: init_adapter(architecture, config.lora, key), jax.random.key(0)
    )
    shardings = sharding.adapter_shardings(architecture, config.lora, factors, mesh)
    moments = jax.eval_shape(optimiser.init, factors)
    state = State(jax.ShapeDtypeStruct((), jnp.int32), factors, moments)
    lie = State(
        sharding.replicated(mesh),
        shardings,
        sharding.optimiser_shardings(optimiser, moments, shardings, mesh),
    )
    return Initial(architecture, base, placed(state, lie), np.dtype(DTYPE), ())


def weight_of(weight, shape: tuple[int, ...], quantise: str | None):
    if weight.lora is None or quantise is None:
        return jax.ShapeDtypeStruct(shape, DTYPE)
    matrix = shape[:-3:-1]  # [out, in]
    return NF4Weight(
        **{
            name: jax.ShapeDtypeStruct(*form)
            for name, form in nf4_forms(matrix, shape[:-2]).items()
        },
        shape=matrix,
    )


def as_stored(leaf, mesh, kernels):
    if not is_nf4(leaf):
        return leaf
    shapes = jax.eval_shape(lambda weight: stored_for_kernels(weight, kernels, None), leaf)
    return placed(shapes, jax.tree.map(lambda _: sharding.replicated(mesh), shapes))


def placed(tree, shardings):
    return jax.tree.map(
        lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
        tree,
        shardings,
    )


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print("STEP", json.dumps(step(**case)), flush=True)
