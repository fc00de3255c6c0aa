"""A model as inference takes it: weights, architecture, adapter."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxre.models.activations import activations_for
from jaxre.models.architecture import Architecture
from jaxre.models.decoder import Adapter, Tree


@dataclass(frozen=True)
class Model:
    """A decoder ready to run.

    params: base weights in the compute dtype, on the host or on devices, in any sharding.
    factors: LoRA factors as in `decoder.Adapter`, or None; scale: of their products.

    The compiled steps take params and factors as arguments, so a training loop may make a new
    Model of its current factors for every validation without a new compilation.
    """

    params: Tree
    architecture: Architecture
    factors: Tree | None = None
    scale: float = 1.0


def on_device(model: Model) -> tuple[Tree, Tree | None]:
    """(params, factors) as device arrays; what is on devices stays where it is."""
    params = activations_for(model.params, jax.default_backend())
    return jax.tree.map(jnp.asarray, (params, model.factors))


def adapter_of(factors: Tree | None, scale: float) -> Adapter | None:
    """The adapter without dropout, or None."""
    return None if factors is None else Adapter(factors, scale)
