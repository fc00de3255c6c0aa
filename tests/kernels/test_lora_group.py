"""The LoRA projections of one input and their gradients against autodiff of the plain formula and
against torch.

Relative is max|difference| / max|reference| of a tensor. B is never zero.
"""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxre_kernels.lora import Factors, group_words, keep_mask, lora_group, token_keys
from jaxre_kernels.nf4 import dequantise, quantise
from lora_kernels import RATE, SCALE, autodiff

ROWS, INPUTS, RANK = (2, 9), 64, 8
OUTPUTS = (96, 32, 32)  # q, k and v: wider than the input, and narrower

TARGETS = pytest.mark.parametrize(
    "targets", [(0, 1, 2), (0, 2), (1,), ()], ids=["q k v", "q v", "k", "none"]
)
RATES = pytest.mark.parametrize("rate", [0.0, RATE], ids=["no dropout", "dropout"])


class Inputs(NamedTuple):
    x: np.ndarray
    weights: list
    factors: list
    dys: list


def draws(
    targets=(0, 1, 2), rows=ROWS, inputs=INPUTS, outputs=OUTPUTS, rank=RANK, dtype=np.float32
) -> Inputs:
    draw = np.random.default_rng(0)

    def normal(*shape):
        return draw.standard_normal(shape).astype(dtype)

    factors = [
        Factors(normal(inputs, rank), normal(rank, o)) if i in targets else None
        for i, o in enumerate(outputs)
    ]
    return Inputs(
        normal(*rows, inputs),
        [normal(inputs, o) for o in outputs],
        factors,
        [normal(*rows, o) for o in outputs],
    )


def keys_of(rows) -> jax.Array:
    return token_keys(0, 3, jnp.full(rows, 77, jnp.uint32), jnp.arange(np.prod(rows)).reshape(rows))


def ours(x, weights, factors, dys, rate=0.0):
    """Outputs, and gradients of x and the factors."""
    words = group_words(keys_of(x.shape[:-1]), 2, 1) if rate else None
    outputs, back = jax.vjp(
        lambda x, factors: lora_group(x, weights, factors, words, SCALE, rate), x, factors
    )
    return outputs, *back(dys)


ours_jitted = jax.jit(ours, static_argnames="rate")


def scaled_mask(rows, inputs, rate):
    return (
        keep_mask(keys_of(rows), 2, 1, inputs, rate) / (1 - rate)
        if rate
        else jnp.ones((*rows, inputs))
    )


def relative(value, reference) -> float:
    value, reference = (np.asarray(array, np.float64) for array in (value, reference))
    assert value.shape == reference.shape
    return float(np.abs(value - reference).max() / np.abs(reference).max())


def largest(found, expected) -> float:
    """The largest relative difference over two trees of one form."""
    return max(jax.tree.leaves(jax.tree.map(relative, found, expected)))


@TARGETS
@RATES
def test_outputs_and_gradients_equal_autodiff_of_the_plain_formula(targets, rate):
    with jax.enable_x64(True):
        inputs = jax.tree.map(jnp.asarray, draws(targets, dtype=np.float64))
        expected = autodiff(*inputs, scaled_mask(ROWS, INPUTS, rate).astype(jnp.float64))
        assert largest(ours_jitted(*inputs, rate=rate), expected) < 1e-13


@pytest.mark.parametrize(
    ("rows", "width", "outputs", "rank"),
    [((7,), 24, (16,), 4), ((1, 1), 16, (16, 16), 1), ((3, 5), 8, (4, 12), 16)],
    ids=str,
)
def test_groups_of_any_size_equal_torch(rows, width, outputs, rank):
    """As PEFT's Linear.forward writes it: base(x) + B(A(dropout(x))) * scaling; f32, sums of at
    most 24 products.
    """
    torch = (
        importlib.import_module("torch")
        if sys.version_info < (3, 12)
        else pytest.importorskip("torch")
    )
    inputs = draws(range(len(outputs)), rows, width, outputs, rank)
    keep = torch.tensor(np.asarray(scaled_mask(rows, width, RATE)))
    x, *factors = (
        torch.tensor(array, requires_grad=True)
        for array in (inputs.x, *(part for pair in inputs.factors for part in pair))
    )
    theirs = []
    for i, (weight, dy) in enumerate(zip(inputs.weights, inputs.dys, strict=True)):
        a, b = factors[2 * i : 2 * i + 2]
        theirs.append(
            torch.nn.functional.linear(x, torch.tensor(weight.T)) + ((x * keep) @ a @ b) * SCALE
        )
        theirs[-1].backward(torch.tensor(dy), retain_graph=True)
    expected = (
        [y.detach().numpy() for y in theirs],
        x.grad.numpy(),
        [part.grad.numpy() for part in factors],
    )
    outputs, dx, dfactors = ours_jitted(*jax.tree.map(jnp.asarray, inputs), rate=RATE)
    assert largest((outputs, dx, jax.tree.leaves(dfactors)), expected) < 2e-6


@RATES
def test_nf4_weights_give_what_their_dequantised_values_give(rate):
    """A dense projection beside two NF4 ones."""
    inputs = draws((0, 2))
    quantised = [quantise(weight.T) for weight in inputs.weights[:2]]
    dense = [
        *(np.asarray(dequantise(weight, jnp.float32)).T for weight in quantised),
        inputs.weights[2],
    ]
    expected = autodiff(*inputs._replace(weights=dense), scaled_mask(ROWS, INPUTS, rate))
    assert (
        largest(ours_jitted(*inputs._replace(weights=[*quantised, dense[2]]), rate=rate), expected)
        < 2e-6
    )


def test_masters_stay_float32_and_products_run_in_the_compute_dtype():
    """bf16 x and W, f32 A and B: outputs and dx are bf16, gradients of A and B f32 and not rounded
    to bf16 on the way.
    """
    inputs = draws()
    half = jax.tree.map(lambda array: jnp.asarray(array, jnp.bfloat16), inputs)._replace(
        factors=inputs.factors
    )
    outputs, dx, dfactors = ours_jitted(*half, rate=RATE)
    assert {leaf.dtype.name for leaf in [*outputs, dx]} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(dfactors)} == {"float32"}
    # bf16 keeps 8 bits: 0.4% a factor, a few factors deep.
    assert largest((outputs, dx, dfactors), ours_jitted(*inputs, rate=RATE)) < 0.03
    for leaf in jax.tree.leaves(dfactors):
        assert (leaf != leaf.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
def test_no_gradient_of_the_frozen_weights_is_formed(nf4):
    """No product of the program, in a scan over layers as in training, has a shape of W; only dW
    would.
    """
    inputs = draws()
    weights = [quantise(weight.T) for weight in inputs.weights] if nf4 else inputs.weights
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), (weights, inputs.factors))

    def loss(factors):
        def layer(x, one):
            outputs = lora_group(x, one[0], one[1], group_words(keys_of(ROWS), 0, 0), SCALE, RATE)
            return x + outputs[0][..., :INPUTS] + jnp.tile(outputs[1] * outputs[2], 2), None

        return jax.lax.scan(layer, inputs.x, (stacked[0], factors))[0].sum()

    program = str(jax.make_jaxpr(jax.grad(loss))(stacked[1]))
    products = [line.split("=")[0] for line in program.splitlines() if "dot_general" in line]
    assert len(products) > 12
    for outputs in OUTPUTS:
        assert not any(
            f"[{INPUTS},{outputs}]" in line or f"[{outputs},{INPUTS}]" in line for line in products
        )


@TARGETS
def test_backward_pass_keeps_the_input_and_what_is_narrow(targets):
    """Neither the mask nor x after dropout; nothing of the input at all where nothing is
    trained.
    """
    inputs = draws(targets)
    words = group_words(keys_of(ROWS), 0, 0)

    def back(x, weights, factors):
        return jax.vjp(
            lambda x, factors: lora_group(x, weights, factors, words, SCALE, RATE), x, factors
        )[1]

    kept = [
        leaf.shape
        for leaf in jax.tree.leaves(jax.eval_shape(back, inputs.x, inputs.weights, inputs.factors))
    ]
    given = [leaf.shape for leaf in jax.tree.leaves((inputs.weights, inputs.factors))]
    narrow = [inputs.x.shape, ROWS, (*ROWS, RANK * len(targets))] if targets else []
    assert sorted(kept) == sorted(given + narrow)


def test_backward_pass_of_nf4_keeps_no_matrix():
    inputs = draws()
    weights = [quantise(weight.T) for weight in inputs.weights]

    def back(x, factors):
        return jax.vjp(
            lambda x, factors: lora_group(x, weights, factors, None, SCALE, 0.0), x, factors
        )[1]

    kept = {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(back, inputs.x, inputs.factors))}
    assert not kept & {
        shape for outputs in OUTPUTS for shape in ((INPUTS, outputs), (outputs, INPUTS))
    }
