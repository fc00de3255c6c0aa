"""The backward pass of a linear cross-entropy: the forward pass computes the gradients, the
backward pass scales them.

    loss = sum_n w_n (log sum_v exp Z_nv - Z_n,target),
        dZ_nv = w_n (softmax(Z_n)_v - [v = target_n])
    dx = g dZ head,    dhead = g dZ^T x,    dw_n = g (log sum_v exp Z_nv - Z_n,target)

The loss is a scalar, so its cotangent g is a factor of all gradients: they are computed for g = 1
while the logits Z exist. A separate backward pass would compute Z again: three products in place of
two for a frozen head, four in place of three for a trained one. (Liger does so too; Hsu et al.
2024, section 3.2.) Without differentiation only the loss is computed; the gradient of a head that
is not differentiated (a frozen one) is not formed, nor is a zero of its size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

Sums = tuple[jax.Array, jax.Array | None, jax.Array | None, jax.Array]
Op = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Hashable], jax.Array]


def with_gradients(sums: Callable[..., Sums]) -> Op:
    """Makes the op (x, head, targets, weights, how) -> loss, differentiable in x, head and weights.

    Args:
      sums: (x, head, targets, weights, how, wanted) -> (loss, its gradients by x and head, the loss
        of each token). `wanted` is two bools, whether each of the two gradients is computed; an
        unwanted one is None. They are f32 (at least), so that g rounds once.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def op(x, head, targets, weights, how):
        return sums(x, head, targets, weights, how, (False, False))[0]

    def forward(x, head, targets, weights, how):
        wanted = x.perturbed, head.perturbed
        loss, dx, dhead, losses = sums(
            x.value, head.value, targets.value, weights.value, how, wanted
        )
        # Residuals must be arrays, so an empty array represents each dtype.
        likes = [jnp.empty(0, argument.value.dtype) for argument in (x, head, weights)]
        return loss, ((dx, dhead, losses if weights.perturbed else None), likes)

    def backward(how, residuals, dloss):
        if isinstance(dloss, SymbolicZero):
            return None, None, None, None
        dx, dhead, dweights = (
            gradient if gradient is None else (gradient * dloss).astype(like.dtype)
            for gradient, like in zip(*residuals, strict=True)
        )
        return dx, dhead, None, dweights

    # With symbolic zeros `forward` knows which arguments are differentiated at all.
    op.defvjp(forward, backward, symbolic_zeros=True)
    return op
