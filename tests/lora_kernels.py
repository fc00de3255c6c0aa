"""Draws, references and measures for tests of the LoRA kernels.

Relative is max|difference| / max|reference| of a tensor. B is never zero.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxre_kernels.lora import Factors, Projections, group_words, keep_mask, lora_group, token_keys
from jaxre_kernels.nf4 import NF4Weight, dequantise, quantise

SCALE, RATE = 1.5, 0.3

QWEN = {"0.5B": (896, 128, 4864), "3B": (2048, 256, 11008)}  # D, K C, F


def groups(size: str, tokens=4096, rank=32, dtype="bfloat16", nf4=False) -> dict[str, Projections]:
    D, kv, F = QWEN[size]
    shapes = {"qkv": (D, (D, kv, kv)), "o": (D, (D,)), "gate_up": (D, (F, F)), "down": (F, (D,))}
    return {
        name: Projections(
            tokens, inputs, outputs, (rank,) * len(outputs), (nf4,) * len(outputs), dtype
        )
        for name, (inputs, outputs) in shapes.items()
    }


class Inputs(NamedTuple):
    x: np.ndarray
    weights: list
    factors: list
    dys: list


def draws(rows, inputs: int, outputs, ranks, nf4=()) -> Inputs:
    """f32; the projections in `nf4` are quantised, those of rank 0 have no factors."""
    draw = np.random.default_rng(0)

    def normal(*shape):
        return draw.standard_normal(shape).astype(np.float32)

    factors = [
        Factors(normal(inputs, rank), normal(rank, o)) if rank else None
        for o, rank in zip(outputs, ranks, strict=True)
    ]
    weights = [normal(inputs, o) for o in outputs]
    weights = [quantise(weight.T) if i in nf4 else weight for i, weight in enumerate(weights)]
    return Inputs(normal(*rows, inputs), weights, factors, [normal(*rows, o) for o in outputs])


def words_of(rows) -> jax.Array:
    keys = token_keys(0, 3, jnp.full(rows, 77, jnp.uint32), jnp.arange(np.prod(rows)).reshape(rows))
    return group_words(keys, 2, 1)


def gradients(op, x, weights, factors, dys, rate):
    """Outputs, and gradients of x and the factors."""
    words = words_of(x.shape[:-1]) if rate else None
    outputs, back = jax.vjp(
        lambda x, factors: op(x, weights, factors, words, SCALE, rate), x, factors
    )
    return outputs, *back(dys)


@partial(jax.jit, static_argnames="rate")
def xla(inputs, rate):
    return gradients(lora_group, *inputs, rate)


@jax.jit
def autodiff(x, weights, factors, dys, keep):
    """x W + scale (x keep) A B and its gradients, projection by projection; keep is 0 or 1 / (1 -
    rate).
    """

    def run(x, factors):
        return [
            x @ weight + (0 if factor is None else SCALE * ((x * keep) @ factor.a) @ factor.b)
            for weight, factor in zip(weights, factors, strict=True)
        ]

    outputs, back = jax.vjp(run, x, factors)
    return outputs, *back(dys)


def exact(inputs: Inputs, rate: float):
    """x W + scale (x keep) A B in f64; keep is 0 or 1 / (1 - rate)."""
    dense = [
        dequantise(weight, jnp.float32).T if isinstance(weight, NF4Weight) else weight
        for weight in inputs.weights
    ]
    rows, width = inputs.x.shape[:-1], inputs.x.shape[-1]
    keep = (
        np.asarray(keep_mask_of(rows, width, rate)) / (1 - rate)
        if rate
        else np.ones((*rows, width))
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), inputs._replace(weights=dense)
        )
        return jax.device_get(autodiff(*wide, jnp.asarray(keep, jnp.float64)))


def keep_mask_of(rows, width, rate):
    keys = token_keys(0, 3, jnp.full(rows, 77, jnp.uint32), jnp.arange(np.prod(rows)).reshape(rows))
    return keep_mask(keys, 2, 1, width, rate)


def relative(value, reference) -> float:
    value, reference = (np.asarray(array, np.float64) for array in (value, reference))
    assert value.shape == reference.shape
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def largest(found, expected) -> float:
    """The largest relative difference over two trees of one form; NaN where there is one."""
    return float(np.max(jax.tree.leaves(jax.tree.map(relative, found, expected))))


def in_bfloat16(inputs: Inputs) -> Inputs:
    """Casts x, weights and gradients to bf16; factors stay f32, NF4 weights stay NF4."""

    def half(arrays):
        return [
            array if isinstance(array, NF4Weight) else jnp.asarray(array, jnp.bfloat16)
            for array in arrays
        ]

    return inputs._replace(
        x=jnp.asarray(inputs.x, jnp.bfloat16), weights=half(inputs.weights), dys=half(inputs.dys)
    )


def as_near_as_xla(found, inputs: Inputs, rate: float) -> bool:
    """True if a kernel's results in bf16 are as near to the exact results of f32 inputs as XLA's,
    root mean square.
    """

    def distance(value, reference):
        return float(np.sqrt(np.mean((np.asarray(value, np.float64) - reference) ** 2)))

    true = exact(inputs, rate)
    ours, theirs = (
        jax.tree.leaves(jax.tree.map(distance, results, true))
        for results in (found, xla(in_bfloat16(inputs), rate))
    )
    return all(our < 1.02 * their for our, their in zip(ours, theirs, strict=True))


def mask_drawn(rows, width, kernel) -> tuple[np.ndarray, np.ndarray]:
    """Where `kernel(inputs)` keeps a channel, in its outputs and in dx: W = 0, A and B of ones on
    the diagonal, x and dY of ones.
    """
    eye, ones = np.eye(width, dtype=np.float32), np.ones((*rows, width), np.float32)
    outputs, dx, _ = kernel(
        Inputs(ones, [np.zeros((width, width), np.float32)], [Factors(eye, eye)], [ones])
    )
    return np.asarray(outputs[0]) != 0, np.asarray(dx) != 0
