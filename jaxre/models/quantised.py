"""A base whose projections are NF4: from matrices, from a dense base, and back.

The seven projections of every layer are quantised and nothing else, as transformers' `load_in_4bit`
does: embeddings, norms, biases and the head stay dense. NF4 runs along the rows of Hugging Face's
[out, in], so a block is the block of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxre_kernels.nf4 import NF4Weight, dequantise, empty, quantise

from jaxre.errors import InputError
from jaxre.models.architecture import Architecture
from jaxre.models.weights import places, tree_of

_dequantise = jax.jit(partial(dequantise, dtype=jnp.float32))


def is_nf4(leaf: Any) -> bool:
    """Whether a leaf of a base is NF4; the `is_leaf` of functions over trees that must not look into it."""
    return isinstance(leaf, NF4Weight)


def is_quantised(params: dict[str, Any]) -> bool:
    """Whether the projections of a base are NF4."""
    return is_nf4(params["last"]["q"])


def quantise_matrices(shape: tuple[int, ...], matrices: Iterable[np.ndarray], names: Iterable[str]) -> NF4Weight:
    """One array of our pytree as NF4; one matrix is held at a time.

    Args:
      shape: of the dense array, [L-1, I, O] or [I, O].
      matrices: [O, I] of each layer; names: what to call them.

    Raises:
      InputError: a value that is not finite.
    """
    *stack, inputs, outputs = shape
    whole = empty((outputs, inputs), tuple(stack))
    for layer, name, matrix in zip(np.ndindex(*stack), names, matrices, strict=True):  # () alone for the last layer
        try:
            one = quantise(matrix)
        except ValueError as error:
            raise InputError(f"{name} cannot be quantised: {error}; check the model that it comes from") from None
        for field in ("codes", "absmax", "nested_absmax", "offset"):
            getattr(whole, field)[layer] = getattr(one, field)
    return whole


def quantise_base(architecture: Architecture, params: dict[str, Any], place: str) -> dict[str, Any]:
    """A dense base (numpy) with its projections as NF4. They are taken out of `params` one by one, so that both are never whole."""
    arrays = {}
    for weight, path, shape, _ in places(architecture):
        part = params[path[0]] if weight.in_layer else params
        value = part.pop(weight.name)
        if weight.lora:
            layers = list(np.ndindex(shape[:-2]))
            matrices, names = (value[layer].T for layer in layers), (f"{place}: {'.'.join(path)}" for _ in layers)
            value = quantise_matrices(shape, matrices, names)
        arrays[path] = value
    return tree_of(arrays.items())


def dense_shape(weight: NF4Weight | np.ndarray) -> tuple[int, ...]:
    """Shape of a base weight when dense: of a projection [L-1, I, O] or [I, O]."""
    return (*np.shape(weight.offset), *weight.shape[::-1]) if is_nf4(weight) else weight.shape


def layer_matrices(weight: NF4Weight | np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(index, [I, O] f32) of each layer of a projection, dense or NF4."""
    for layer in np.ndindex(dense_shape(weight)[:-2]):
        one = jax.tree.map(lambda leaf: leaf[layer], weight)  # noqa: B023
        yield layer, np.asarray(_dequantise(one)).T if is_nf4(weight) else np.asarray(one, np.float32)


def base_bytes(params: dict[str, Any]) -> int:
    """Bytes of the arrays of a base, as they are stored."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
