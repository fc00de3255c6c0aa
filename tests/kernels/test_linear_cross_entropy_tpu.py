"""Linear cross-entropy for TPUs in Pallas's interpreters, against autodiff of the dense formula in
f64.

Blocks have 8 tokens and 16 entries here; on a TPU they have 128 to 512. Relative is max|difference|
/ max|reference| of a tensor.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cross_entropy_kernels import CLOSE, distance, draws, exact, gradients, relative
from interpreters import STRICT
from jaxre_kernels.cross_entropy import Channels, choose, dense_cross_entropy, linear_cross_entropy
from jaxre_kernels.cross_entropy.tpu import blocks_of, pallas_cross_entropy, unsupported

# (tokens, D, V)
SHAPES = {
    "whole blocks": ((16,), 24, 48),
    "tokens that fill no block": ((3, 7), 24, 48),
    "entries that fill no block": ((16,), 24, 37),
    "one token, fewer entries than a block": ((1,), 8, 11),
}


@partial(jax.jit, static_argnames="interpret")
def kernel(inputs, interpret=True):
    """Loss, and gradients by x, head and weights."""
    return gradients(partial(pallas_cross_entropy, blocks=(8, 16), interpret=interpret), *inputs)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_equal_dense_autodiff(shape):
    inputs = draws(*shape)
    for found, expected in zip(kernel(inputs), exact(*inputs), strict=True):
        assert relative(found, expected) < CLOSE


def test_kernels_race_nowhere_and_read_nothing_that_is_not_theirs():
    inputs = draws((11,), 24, 37)
    for found, expected in zip(kernel(inputs, STRICT), exact(*inputs), strict=True):
        assert relative(found, expected) < CLOSE


def test_a_softmax_whose_largest_logit_comes_late_does_not_overflow():
    """Entries in ascending order of their logits, to 1e4; f32 logits of that size are off by
    1e-3.
    """
    x, head, targets, weights = draws((9,), 8, 40)
    x, head = np.abs(x), np.sort(np.abs(head), axis=0) * 1e3
    found, expected = kernel((x, head, targets, weights)), exact(x, head, targets, weights)
    assert (
        all(np.isfinite(leaf).all() for leaf in found) and relative(found[0], expected[0]) < CLOSE
    )
    assert relative(found[1], expected[1]) < 1e-3


def test_bfloat16_is_as_near_to_float32_as_the_dense_formula():
    inputs = draws((32,), 64, 200, scale=0.5)
    half = [jnp.asarray(array, jnp.bfloat16) for array in inputs[:2]] + inputs[2:]
    found, plain = kernel(half), jax.jit(partial(gradients, dense_cross_entropy))(*half)
    assert [leaf.dtype.name for leaf in found] == ["float32", "bfloat16", "bfloat16", "float32"]
    for one, other, true, most in zip(
        found, plain, exact(*inputs), (1.01, 1.02, 1.25, 1.01), strict=True
    ):
        # for the head's gradient what is summed over tokens is rounded
        assert distance(one, true) < most * distance(other, true)


def test_a_frozen_head_takes_two_products_and_no_gradient_of_its_size():
    x, head, targets, weights = map(jnp.asarray, draws((16,), 24, 48))
    op = partial(pallas_cross_entropy, blocks=(8, 16), interpret=True)
    frozen = str(jax.make_jaxpr(jax.grad(op))(x, head, targets, weights))
    trained = str(jax.make_jaxpr(jax.grad(op, argnums=(0, 1)))(x, head, targets, weights))
    assert frozen.count("pallas_call") == 1 and trained.count("pallas_call") == 2
    assert "cross_entropy_dhead" in trained and "cross_entropy_dhead" not in frozen
    for program in (frozen, trained):
        assert "f32[16,48]" not in program  # no logits outside of a block


def test_what_does_not_run_is_said_beforehand():
    why = choose(implementation="pallas_tpu", channels=Channels(2048, "bfloat16"))[1]
    assert why.startswith(
        "asked for; unverified, it has not run on a TPU; 512 tokens and 512 entries"
    )
    assert "float64" in unsupported(64, "float64") and "does not fit" in unsupported(
        10**6, "bfloat16"
    )
    assert blocks_of(8192, "bfloat16") is not None
    for said, options in (
        ("these are on 4: call it inside of shard_map", {"shards": 4}),
        ("not float16", {}),
    ):
        x = jnp.zeros((3, 8), jnp.float16)
        with pytest.raises(ValueError, match=said):
            linear_cross_entropy(
                x, x, jnp.zeros(3, jnp.int32), jnp.ones(3), implementation="pallas_tpu", **options
            )
