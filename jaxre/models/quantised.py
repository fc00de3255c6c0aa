"""A base whose projections are NF4: conversion from matrices and back.

Only the seven projections of every layer are quantised, as in transformers' `load_in_4bit`:
embeddings, norms, biases and the head stay dense. NF4 runs along the rows of Hugging Face's
[out, in], so a block is a block of bitsandbytes.
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
    """True for an NF4 leaf of a base; also the `is_leaf` of tree functions that must not enter
    one.
    """
    return isinstance(leaf, NF4Weight | NF4Tiles)


def is_quantised(params: dict[str, Any]) -> bool:
    """True if the projections of a base are NF4."""
    return is_nf4(params["last"]["q"])


def quantise_matrix(matrix: np.ndarray, name: str) -> NF4Weight:
    """Quantises a matrix [O, I] to NF4. Raises InputError with its name for a non-finite value."""
    try:
        return quantise(matrix)
    except ValueError as error:
        raise InputError(
            f"{name} cannot be quantised: {error}; check the model that it comes from"
        ) from None


def dequantise_matrix(weight: NF4Weight) -> np.ndarray:
    """Dequantises to a matrix [O, I] in f32."""
    return np.asarray(_dequantise(weight))


def dense_shape(weight: NF4Weight | np.ndarray) -> tuple[int, ...]:
    """Shape of a base weight when dense; [L-1, I, O] or [I, O] for a projection."""
    return (*np.shape(weight.offset), *weight.shape[::-1]) if is_nf4(weight) else weight.shape


def layer_matrices(weight: NF4Weight | np.ndarray) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yields (index, [I, O] f32) for each layer of a projection, dense or NF4."""
    for index in np.ndindex(dense_shape(weight)[:-2]):
        matrix = jax.tree.map(lambda leaf: leaf[index], weight)  # noqa: B023
        dense = dequantise_matrix(matrix).T if is_nf4(weight) else np.asarray(matrix, np.float32)
        yield index, dense


def base_bytes(params: dict[str, Any]) -> int:
    """Bytes of the arrays of a base, as stored."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
