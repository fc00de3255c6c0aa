"""The state a run starts from: base weights, trainable factors or masters, optimiser moments, all on the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxre.checkpoints.huggingface import load_base
from jaxre.config import Config
from jaxre.models.architecture import Architecture, architecture_of
from jaxre.models.lora import init_adapter
from jaxre.models.module import init_weights
from jaxre.training import sharding
from jaxre.training.step import State

Tree = Any


@dataclass(frozen=True)
class Initial:
    """`base` is the frozen base of a LoRA run in the compute dtype, or empty where all of it is trained."""

    architecture: Architecture
    base: Tree
    state: State
    dtype: np.dtype


def initial_state(
    config: Config, folder: Path, dtype: np.dtype, optimiser: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> Initial:
    """Weights are found in this order: `model.architecture` (random, from the run's seed), else the model's folder.

    Raises:
      InputError: weights that do not fit their config.json.
    """
    full = config.train.method == "full"
    if config.model.architecture is not None:
        architecture = architecture_of(config.model.architecture, "model.architecture")
        params = jax.tree.map(np.asarray, init_weights(architecture, config.seed))
        params = params if full else jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    else:
        architecture, params = load_base(folder, np.dtype(np.float32) if full else dtype)
    if full:
        trainable, base = params, {}
        shardings = sharding.base_shardings(architecture, mesh)
    else:
        trainable = jax.tree.map(np.asarray, init_adapter(architecture, config.lora, jax.random.key(config.seed)))
        base = sharding.put(params, sharding.base_shardings(architecture, mesh))
        shardings = sharding.adapter_shardings(architecture, config.lora, trainable, mesh)
    trainable = sharding.put(trainable, shardings)
    shapes = jax.eval_shape(optimiser.init, trainable)
    moments = jax.jit(optimiser.init, out_shardings=sharding.optimiser_shardings(optimiser, shapes, shardings, mesh))(trainable)
    step = sharding.put(jnp.zeros((), jnp.int32), sharding.replicated(mesh))
    return Initial(architecture, base, State(step, trainable, moments), dtype)
