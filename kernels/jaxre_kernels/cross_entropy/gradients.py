"""The backward pass of a linear cross-entropy: its gradients are formed in the forward pass, the
backward pass scales them.

    loss = sum_n w_n (log sum_v exp Z_nv - Z_n,target),
        dZ_nv = w_n (softmax(Z_n)_v - [v = target_n])
    dx = g dZ head,    dhead = g dZ^T x,    dw_n = g (log sum_v exp Z_nv - Z_n,target)

The loss is one number, so its cotangent g is one factor of all gradients: they are formed for g = 1
while the logits Z are there. A backward pass of its own would compute Z again: three products in
place of two for a frozen head, four in place of three for a trained one. (Liger does so too; Hsu et
al. 2024, section 3.2.) Where no gradient is asked for, the loss alone is computed; that of a head
which is not differentiated (a frozen one) is not formed, and neither is a zero of its size.
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
    """The op (x, head, targets, weights, how) -> loss, differentiable in x, head and weights.

    Args:
      sums: (x, head, targets, weights, how, wanted) -> (loss, its gradients by x and head, the loss
        of each token). `wanted` is two bools that say which of the two gradients is formed; the
        other is None. They are f32 (at least), so that g rounds once.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(4,))
    def op(x, head, targets, weights, how):
        return sums(x, head, targets, weights, how, (False, False))[0]

    def forward(x, head, targets, weights, how):
        wanted = x.perturbed, head.perturbed
        loss, dx, dhead, losses = sums(
            x.value, head.value, targets.value, weights.value, how, wanted
        )
        # Dtypes are no arrays, so an empty array of each stands for it.
        likes = [jnp.empty(0, one.value.dtype) for one in (x, head, weights)]
        return loss, ((dx, dhead, losses if weights.perturbed else None), likes)

    def backward(how, kept, dloss):
        if isinstance(dloss, SymbolicZero):
            return None, None, None, None
        dx, dhead, dweights = (
            one if one is None else (one * dloss).astype(like.dtype)
            for one, like in zip(*kept, strict=True)
        )
        return dx, dhead, None, dweights

    # With symbolic zeros `forward` is told which arguments are differentiated at all.
    op.defvjp(forward, backward, symbolic_zeros=True)
    return op
