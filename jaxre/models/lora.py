"""LoRA adapters: target projections, factors, scale, and merging into the base."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxre.config import Config, Lora
from jaxre.models.architecture import Architecture
from jaxre.models.decoder import Adapter
from jaxre.models.quantised import dense_shape, is_nf4, layer_matrices
from jaxre.models.weights import Weight, places


def scale_of(lora: Lora) -> float:
    """alpha / rank (Hu et al. 2021), or alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023)."""
    return lora.alpha / math.sqrt(lora.rank) if lora.rslora else lora.alpha / lora.rank


def targets(
    architecture: Architecture, lora: Lora
) -> list[tuple[Weight, tuple[str, ...], tuple[int, ...], tuple[str | None, ...]]]:
    """The entries of `weights.places` that the adapter targets."""
    return [
        place for place in places(architecture) if place[0].lora and place[0].name in lora.targets
    ]


def model_of(
    trainable: dict, base: dict, config: Config, keys: jax.Array | None, dtype: jnp.dtype
) -> tuple[dict, Adapter | None]:
    """(params, adapter) of the forward pass: LoRA factors beside the base, or the f32 masters cast
    to `dtype`.
    """
    if config.train.method == "full":
        return jax.tree.map(lambda master: master.astype(dtype), trainable), None
    return base, Adapter(trainable, scale_of(config.lora), config.lora.dropout, keys)


def init_adapter(architecture: Architecture, lora: Lora, key: jax.Array) -> dict:
    """Fresh factors in f32: A uniform in +-1/sqrt(inputs) as in PEFT (Kaiming, a = sqrt 5), B zero.

    Returns:
      `{"layers": {name: {"a": [L-1, I, R], "b": [L-1, R, O]}}, "last": {name: {"a": [I, R], "b":
      [R, O]}}}`.
    """
    factors: dict = {"layers": {}, "last": {}}
    for number, (weight, path, shape, _) in enumerate(targets(architecture, lora)):
        *stack, inputs, outputs = shape
        bound = 1 / math.sqrt(inputs)
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (*stack, inputs, lora.rank), jnp.float32, -bound, bound
        )
        factors[path[0]][weight.name] = {
            "a": a,
            "b": jnp.zeros((*stack, lora.rank, outputs), jnp.float32),
        }
    return factors


def adapter_axes(architecture: Architecture, lora: Lora) -> dict:
    """Mesh axes of each factor, in the adapter's form; the rank is never sharded."""
    axes: dict = {"layers": {}, "last": {}}
    for weight, path, _, weight_axes in targets(architecture, lora):
        *stack, inputs, outputs = weight_axes
        axes[path[0]][weight.name] = {"a": (*stack, inputs, None), "b": (*stack, None, outputs)}
    return axes


def merge(params: dict, factors: dict, scale: float) -> dict:
    """Replaces each targeted W of the base (numpy) by W + scale A B, computed in f32 and cast once.

    All projections of an NF4 base become dense, targeted or not: an adapter fits the values it was
    trained on, which are the dequantised ones. PEFT quantises the sum again, which adds another
    error. Merged matrices have the dtype of W, or of the embeddings of an NF4 base. One layer is
    merged at a time, so the host holds the merged stack and one matrix in f32.
    """
    merged = dict(params)
    for part in ("layers", "last"):
        merged[part] = dict(params[part])
        for name, w in params[part].items():
            factor = factors[part].get(name)
            if factor is None and not is_nf4(w):
                continue
            stack = np.empty(dense_shape(w), (params["embed"] if is_nf4(w) else w).dtype)
            for layer, matrix in layer_matrices(w):  # layer is () in "last"
                if factor is not None:
                    a, b = (np.asarray(factor[side][layer]) for side in ("a", "b"))
                    matrix = merge_one(matrix, a, b, scale)
                stack[layer] = matrix
            merged[part][name] = stack
    return merged


def merge_one(w: np.ndarray, left: np.ndarray, right: np.ndarray, scale: float) -> np.ndarray:
    """W + scale left right in f32: W [I, O] with left A [I, R] and right B [R, O], or all three
    transposed.
    """
    merged = left.astype(np.float32) @ right.astype(np.float32)
    merged *= np.float32(scale)
    merged += w.astype(np.float32)
    return merged
