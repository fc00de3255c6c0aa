"""Linear cross-entropy in plain XLA, some positions of each row at a time, with the gradients
computed together with the loss.

    Z = x head^T,    loss = sum_n w_n (log sum_v exp Z_nv - Z_n,target)
    dZ_nv = w_n (softmax(Z_n)_v - [v = target_n]),    dx = dZ head,    dhead = dZ^T x

dx and dhead are computed in the forward pass, while a chunk's Z exists (`gradients.py`).

Memory, n tokens at a time of N, in bytes of f32: 4 n V for the logits in place of 4 N V for each of
logits and their gradient; saved for the backward pass are dx [N, D] in f32, so that g rounds once,
in place of x, and dhead [V, D]. FLOPs: 4 N V D frozen, 6 N V D trained, like the dense op. Bytes
moved per chunk: 2 readings of the head (4 V D in bf16) and about 16 n V of f32 logits and bf16 e
between products and softmax; 4 n V D FLOPs over that, at D = 896 and n = 1,024, is 184 FLOPs a
byte, where an H200 needs 206 to be bound by products: a kernel that keeps the logits on the chip
can save only the traffic of 16 n V.

Rounding: Z, softmax and sums are f32 (f64 for f64). With e_nv = exp(Z_nv - max_v Z_n) and its sum
t_n,

    dx_n = w_n (e_n head / t_n - head_target)

takes one exponential for loss and dx, and in bf16 only e is rounded before its product: the largest
is exactly 1, so the difference keeps its digits where the target has nearly all of the softmax. For
dhead dZ is rounded. Against f32 of inputs that were not rounded, the root mean square of dx's error
is 1.00 of that of the dense op, which multiplies f32 dZ by bf16, and dhead's 1.1 to 1.2. dhead is
summed in f32 over the chunks, as [D, V]: a CPU transposes the first operand of a sum over tokens in
memory, and x is the narrow one (0.78 of dense autodiff's processor time in place of 0.86: 1,024
tokens, 256 channels, 4,096 entries, 512 at a time, trained, when loss and dx still took an
exponential each; two cores, f32; 2026-11-21).

On a mesh, only the gathering of a sharded head and the sums of a sharded vocabulary cross devices:
tokens are cut along S, so rows that are split over devices stay where they are, and dhead is summed
separately for each of the G groups of rows on one device, then over the groups once, after the last
chunk.

Letters: G groups of rows, B rows of a group, S positions in a row, D embedding, V vocabulary.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxre_kernels.cross_entropy.gradients import with_gradients
from jaxre_kernels.cross_entropy.reference import logits_of


class Chunks(NamedTuple):
    """Most positions of each row at a time, and the number of devices that the rows are split over,
    along the first axis.
    """

    positions: int
    shards: int = 1


def chunked_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    positions: int,
    shards: int = 1,
) -> jax.Array:
    """Weighted sum of the cross-entropy, computed for some positions of each row at a time;
    differentiable in x, head and weights.

    Args:
      x: [..., S, D] float; head: [V, D] of x's dtype.
      targets: [..., S] int32 in [0, V), arbitrary where the weight is 0. weights: [..., S] f32.
      positions: most of the S at a time; the fewest chunks of equal size.
      shards: number of devices that the rows are split over, along the first axis.

    Returns:
      [] f32 (f64 for f64).
    """
    return _op(x, head, targets, weights, Chunks(positions, shards))


def _sums(x, head, targets, weights, how, wanted):
    """The loss and its gradients; see `with_gradients`."""
    want_x, want_head = wanted
    shape, (V, D) = x.shape, head.shape
    S, rows = shape[-2], math.prod(shape[:-2])
    G = how.shards if rows % how.shards == 0 else 1
    chunks = -(-S // min(S, how.positions))
    wide = jnp.promote_types(x.dtype, jnp.float32)
    entries = jnp.arange(V, dtype=targets.dtype)

    def cut(array):
        """[..., S, ...] -> [chunks, G, B, s, ...]; zeros fill the end, so with weight 0."""
        rest = array.shape[len(shape) - 1 :]
        array = array.reshape(G, rows // G, S, *rest)
        padded = jnp.pad(array, [(0, 0), (0, 0), (0, -S % chunks), *[(0, 0)] * len(rest)])
        return jnp.moveaxis(padded.reshape(G, rows // G, chunks, -1, *rest), 2, 0)

    def joined(parts):
        """The inverse of `cut`."""
        rest = parts.shape[4:]
        padded = jnp.moveaxis(parts, 0, 2).reshape(G, rows // G, -1, *rest)
        return padded[:, :, :S].reshape(*shape[:-1], *rest)

    def chunk(dhead, part):
        x, targets, weights = part  # G B s D, G B s, G B s
        logits = logits_of(x, head)  # G B s V
        top = jnp.max(logits, axis=-1, keepdims=True)
        shares = jnp.exp(logits - top)
        total = jnp.sum(shares, axis=-1, keepdims=True)
        losses = (top + jnp.log(total) - jnp.take_along_axis(logits, targets[..., None], axis=-1))[
            ..., 0
        ]
        dx = None
        if want_x:
            mean = (
                jnp.einsum(
                    "gbsv,vd->gbsd", shares.astype(head.dtype), head, preferred_element_type=wide
                )
                / total
            )
            dx = weights[..., None] * (mean - head[targets])
        if want_head:
            dlogits = (
                weights[..., None] * (shares / total - (entries == targets[..., None]))
            ).astype(x.dtype)
            dhead += jnp.einsum("gbsd,gbsv->gdv", x, dlogits, preferred_element_type=wide)
        return dhead, (dx, losses)

    start = jnp.zeros((G, D, V), wide) if want_head else None
    dhead, (dx, losses) = jax.lax.scan(
        chunk, start, (cut(x), cut(jnp.clip(targets, 0, V - 1)), cut(weights))
    )
    losses = joined(losses)
    return (
        jnp.sum(weights * losses),
        joined(dx) if want_x else None,
        dhead.sum(0).T if want_head else None,
        losses,
    )


_op = with_gradients(_sums)
