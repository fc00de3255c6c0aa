"""A base whose projections are NF4: from matrices and back.

The seven projections of every layer are quantised and nothing else, as transformers' `load_in_4bit`
does: embeddings, norms, biases and the head stay dense. NF4 runs along the rows of Hugging Face's
[out, in], so a block is the block of bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxre_kernels.nf4 import NF4Tiles, NF4Weight, dequantise, quantise

from jaxre.errors import InputError

_dequantise = jax.jit(partial(dequantise, dtype=jnp.float32))


def is_nf4(leaf: Any) -> bool:
    """Whether a leaf of a base is NF4; the `is_leaf` of functions over trees that must not look
    into it.
    """
    return isinstance(leaf, NF4Weight | NF4Tiles)


def is_quantised(params: dict[str, Any]) -> bool:
    """Whether the projections of a base are NF4."""
    return is_nf4(params["last"]["q"])


def quantise_matrix(matrix: np.ndarray, name: str) -> NF4Weight:
    """A matrix [O, I] as NF4. Raises InputError, with its name, for a value that is not finite."""
    try:
        return quantise(matrix)
    except ValueError as error:
        raise InputError(
            f"{name} cannot be quantised: {error}; check the model that it comes from"
        ) from None


def dequantise_matrix(weight: NF4Weight) -> np.ndarray:
    """[O, I] f32."""
    return np.asarray(_dequantise(weight))


def dense_shape(weight: NF4Weight | np.ndarray) -> tuple[int, ...]:
    """Shape of a base weight when dense: of a projection [L-1, I, O] or [I, O]."""
    return (*np.shape(weight.offset), *weight.shape[::-1]) if is_nf4(weight) else weight.shape


def layer_matrices(weight: NF4Weight | np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(index, [I, O] f32) of each layer of a projection, dense or NF4."""
    for layer in np.ndindex(dense_shape(weight)[:-2]):
        one = jax.tree.map(lambda leaf: leaf[layer], weight)  # noqa: B023
        yield layer, dequantise_matrix(one).T if is_nf4(weight) else np.asarray(one, np.float32)


def base_bytes(params: dict[str, Any]) -> int:
    """Bytes of the arrays of a base, as they are stored."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
