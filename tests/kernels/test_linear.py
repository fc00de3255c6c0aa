"""Products with dense weights: gradients against autodiff, and which operand of dW is
transposed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxre_kernels.linear import dense_linear

SHAPES = pytest.mark.parametrize(
    "shape",
    [(24, 64), (64, 24), (32, 32), (1, 5)],
    ids=["wider", "narrower", "square", "one channel"],
)


def inputs(tokens, shape, dtype=np.float64):
    draw = np.random.default_rng(0)
    return tuple(
        jnp.asarray(draw.standard_normal(s), dtype)
        for s in ((*tokens, shape[0]), shape, (*tokens, shape[1]))
    )


def value_and_gradients(product, x, weight, dy):
    y, back = jax.vjp(product, x, weight)
    return y, *back(dy)


@SHAPES
@pytest.mark.parametrize("tokens", [(), (7,), (2, 9), (1, 1), (2, 0)], ids=str)
def test_value_and_gradients_equal_those_of_autodiff(tokens, shape):
    with jax.enable_x64(True):
        x, weight, dy = inputs(tokens, shape)
        for ours, theirs in zip(
            value_and_gradients(dense_linear, x, weight, dy),
            value_and_gradients(jnp.matmul, x, weight, dy),
            strict=True,
        ):
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
            np.testing.assert_allclose(ours, theirs, rtol=1e-13, atol=1e-13)


@SHAPES
def test_in_bf16_it_is_as_near_to_f64_as_autodiff(shape):
    args = inputs((2, 9), shape, jnp.bfloat16)
    ours, theirs = (value_and_gradients(product, *args) for product in (dense_linear, jnp.matmul))
    with jax.enable_x64(True):
        exact = value_and_gradients(jnp.matmul, *(jnp.asarray(array, np.float64) for array in args))
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert one.dtype == other.dtype == jnp.bfloat16
        error, allowed = (
            np.sqrt(np.mean((np.asarray(array, np.float64) - np.asarray(truth)) ** 2))
            for array in (one, other)
        )
        # Sums run in another order, and jax 0.12 adds up in bf16 on a CPU.
        assert error <= 1.3 * allowed + 1e-6, (error, allowed)


@SHAPES
def test_the_narrower_array_is_the_first_operand_of_dw(shape):
    # With autodiff it is dY, whatever the widths: this fails there for "wider".
    x, weight, dy = inputs((2, 9), shape, np.float32)
    program = jax.make_jaxpr(lambda *args: value_and_gradients(dense_linear, *args)[2])(
        x, weight, dy
    )
    (dw,) = [
        equation
        for equation in program.eqns
        if "dot_general" in str(equation.primitive) and equation.outvars[0].aval.ndim == 2
    ]
    assert dw.invars[0].aval.shape == (2, 9, min(shape))


def test_nothing_is_kept_but_the_inputs():
    x, weight, _ = inputs((2, 9), (24, 64), np.float32)
    _, back = jax.vjp(dense_linear, x, weight)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(back)) == [(2, 9, 24), (24, 64)]
