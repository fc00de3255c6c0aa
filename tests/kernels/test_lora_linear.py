"""The LoRA projection and its gradients against the plain formula and against torch."""

from __future__ import annotations

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxre_kernels.lora import lora_linear

# Sums of at most 96 products in f32, in another order.
CLOSE = 2e-6

SHAPES = pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "rank"), [((7,), 24, 16, 4), ((2, 9), 64, 96, 8), ((1, 1), 16, 16, 1), ((3, 5), 8, 4, 16)]
)
MODES = pytest.mark.parametrize("with_dropout", [False, True], ids=["no dropout", "dropout"])


def draws(rows, inputs, outputs, rank, with_dropout, dtype=np.float32):
    """x, W, non-zero A and B, the gradient that arrives from above, and x after dropout (or None)."""
    draw = np.random.default_rng(0)
    x, w, a, b, dy = (
        draw.standard_normal(shape).astype(dtype)
        for shape in ((*rows, inputs), (inputs, outputs), (inputs, rank), (rank, outputs), (*rows, outputs))
    )
    keep = draw.random((*rows, inputs)) > 0.3
    return x, w, a, b, dy, (keep / 0.7).astype(dtype) if with_dropout else None


def relative(ours, reference) -> float:
    return float(
        np.abs(np.asarray(ours, np.float64) - np.asarray(reference, np.float64)).max() / np.abs(np.asarray(reference, np.float64)).max()
    )


@jax.jit
def ours(x, w, a, b, dy, keep):
    def run(x, a, b):
        return lora_linear(x, w, a, b, 1.5, None if keep is None else x * keep)

    y, back = jax.vjp(run, x, a, b)
    return y, *back(dy)


@SHAPES
@MODES
def test_output_and_gradients_equal_autodiff_of_the_plain_formula(rows, inputs, outputs, rank, with_dropout):
    """x (W + s A B) without dropout; x W + s (x m) A B with it. Gradients of x, A and B."""
    x, w, a, b, dy, keep = draws(rows, inputs, outputs, rank, with_dropout)

    def plain(x, a, b):
        return x @ (w + 1.5 * (a @ b)) if keep is None else x @ w + 1.5 * ((x * keep) @ (a @ b))

    y, back = jax.vjp(plain, jnp.asarray(x), jnp.asarray(a), jnp.asarray(b))
    for value, reference in zip(ours(x, w, a, b, dy, keep), (y, *back(jnp.asarray(dy))), strict=True):
        assert relative(value, reference) < CLOSE


@SHAPES
@MODES
def test_output_and_gradients_equal_torch(rows, inputs, outputs, rank, with_dropout):
    torch = importlib.import_module("torch") if sys.version_info < (3, 12) else pytest.importorskip("torch")
    x, w, a, b, dy, keep = draws(rows, inputs, outputs, rank, with_dropout)
    tx, ta, tb = (torch.tensor(value, requires_grad=True) for value in (x, a, b))
    dropped = tx if keep is None else tx * torch.tensor(keep)
    # as PEFT's Linear.forward writes it: base(x) + B(A(dropout(x))) * scaling
    y = torch.nn.functional.linear(tx, torch.tensor(w.T)) + (dropped @ ta @ tb) * 1.5
    y.backward(torch.tensor(dy))
    for value, reference in zip(ours(x, w, a, b, dy, keep), (y.detach(), tx.grad, ta.grad, tb.grad), strict=True):
        assert relative(value, reference.numpy()) < CLOSE


def test_masters_stay_float32_and_products_run_in_the_compute_dtype():
    """bf16 x and W, f32 A and B: the output is bf16, the gradients of A and B are f32."""
    x, w, a, b, dy, _ = draws((4,), 32, 16, 4, False)
    half = [jnp.asarray(value, jnp.bfloat16) for value in (x, w, dy)]
    y, dx, da, db = ours(half[0], half[1], a, b, half[2], None)
    assert (y.dtype, dx.dtype, da.dtype, db.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
    exact = ours(x, w, a, b, dy, None)
    # bf16 keeps 8 bits: 0.4% a factor, a few factors deep.
    for value, reference in zip((y, dx, da, db), exact, strict=True):
        assert relative(value, reference) < 0.03


def test_no_gradient_of_the_frozen_weight_is_formed():
    """No product of the program has W's shape [inputs, outputs], which only dW would have."""
    x, w, a, b, dy, keep = draws((2, 9), 64, 96, 8, True)

    def loss(a, b):
        return (lora_linear(jnp.asarray(x), jnp.asarray(w), a, b, 1.5, jnp.asarray(x * keep)) * dy).sum()

    program = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(a), jnp.asarray(b)))
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert products and not any("f32[64,96] = dot_general" in line or "f32[96,64] = dot_general" in line for line in products)
