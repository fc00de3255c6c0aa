"""Not yet run on a TPU: unverified. `tools/hardware_check --only cross_entropy` confirms it.

Linear cross-entropy for TPUs in Pallas: logits stay on the chip.

With a frozen head this is attention over the vocabulary, with the head as keys and as values:

    lse_n = log sum_v exp(x_n . head_v),    mean_n = sum_v softmax(x head^T)_nv head_v,
        dx_n = w_n (mean_n - head_target)

so one sweep over blocks of the vocabulary, whose softmax is rescaled when a larger logit comes
(Milakov & Gimelshein 2018, Dao et al. 2022), computes loss and dx in two products. The target's
logit and row are a gather of N rows outside of the kernel, not a comparison in each block. In bf16
the weights of the mean are rounded before they are divided by their sum: the largest is exactly 1,
so mean - head_target keeps its digits where the target has nearly all of the softmax. dhead is a
sweep of its own, over blocks of tokens for each block of the vocabulary, which recomputes the
logits:

    dhead_v = sum_n w_n (exp(x_n . head_v - lse_n) - [v = target_n]) x_n

Memory: lse [N], dx [N, D] and, where trained, dhead [V, D], f32; no array of [N, V]. FLOPs: 4 N V D
frozen, 8 N V D trained (the chunked op: 6). Bytes: each block of n tokens reads the head once, 2 V
D in bf16, for 4 n V D FLOPs: 2 n FLOPs a byte, 1,024 at n = 512, where v5e needs 240, v5p 166 and
v6e 560 to be bound by products.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jaxre_kernels.cross_entropy.gradients import with_gradients
from jaxre_kernels.mosaic_tpu import VMEM_LIMIT

BLOCKS = ((512, 512), (256, 512), (256, 256), (128, 128))  # tokens, entries; not measured on a TPU


class Tiling(NamedTuple):
    """Tokens and entries of a block; whether Pallas interprets."""

    tokens: int
    entries: int
    interpret: Any = False


def pallas_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    blocks: tuple[int, int] | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Weighted sum of the cross-entropy of the tokens on one device; differentiable in x, head and
    weights.

    Args:
      x: [..., D] bf16 or f32; head: [V, D] of x's dtype.
      targets: [...] int32 in [0, V), arbitrary where the weight is 0. weights: [...] f32.
      blocks: tokens and entries of a block, multiples of 128 on a TPU; chosen from the shape by
        default.
      interpret: argument of `pl.pallas_call`: True or `pltpu.InterpretParams` to run without a TPU.

    Returns:
      [] f32.

    Raises:
      ValueError: what `unsupported` says.
    """
    refusal = unsupported(x.shape[-1], x.dtype)
    if refusal is not None:
        raise ValueError(f"linear cross-entropy for TPUs does not run here: {refusal}")
    return _op(
        x, head, targets, weights, Tiling(*(blocks or blocks_of(x.shape[-1], x.dtype)), interpret)
    )


def blocks_of(channels: int, dtype: DTypeLike) -> tuple[int, int] | None:
    """The largest tokens and entries of a block that fit; None if none do."""
    return next(
        (
            blocks
            for blocks in BLOCKS
            if _vmem_bytes(*blocks, channels, jnp.dtype(dtype)) <= VMEM_LIMIT
        ),
        None,
    )


def unsupported(channels: int, dtype: DTypeLike) -> str | None:
    """Why `pallas_cross_entropy` does not support such arrays, in words; None if it does."""
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        return f"it takes float32 and bfloat16, not {jnp.dtype(dtype).name}"
    if blocks_of(channels, dtype) is None:
        return (
            f"a block of {channels:,} channels does not fit {VMEM_LIMIT:,} bytes of vector memory"
        )
    return None


def _vmem_bytes(tokens: int, entries: int, channels: int, dtype: jnp.dtype) -> int:
    """Approximate bytes that a step holds: two buffers of all inputs and outputs, and five arrays
    of the size of the logits.
    """
    channels += -channels % 128
    return (
        2 * channels * ((tokens + entries) * dtype.itemsize + max(tokens, entries) * 4)
        + 5 * tokens * entries * 4
    )


def _sums(x, head, targets, weights, tiling, wanted):
    """The loss and its gradients; see `with_gradients`."""
    shape, (V, D) = x.shape, head.shape
    targets = jnp.clip(targets, 0, V - 1).reshape(-1)
    flat_weights = weights.reshape(-1).astype(jnp.float32)
    flat = x.reshape(-1, D)
    N = flat.shape[0]
    missing = -N % tiling.tokens
    padded = jnp.pad(flat, ((0, missing), (0, 0)))
    lse, mean = _softmax(padded, head, tiling, wanted[0])
    rows = head[targets].astype(jnp.float32)  # N D
    losses = lse[:N, 0] - jnp.sum(flat.astype(jnp.float32) * rows, axis=-1)
    dx = (flat_weights[:, None] * (mean[:N] - rows)).reshape(shape) if wanted[0] else None
    dhead = None
    if wanted[1]:
        padded_targets, padded_weights = (
            jnp.pad(array, (0, missing)) for array in (targets, flat_weights)
        )
        dhead = _dhead(padded, head, lse, padded_targets, padded_weights, tiling)
    return jnp.sum(flat_weights * losses), dx, dhead, losses.reshape(shape[:-1])


_op = with_gradients(_sums)


def _softmax(
    x: jax.Array, head: jax.Array, tiling: Tiling, with_mean: bool
) -> tuple[jax.Array, jax.Array | None]:
    """lse [N, 1] and mean [N, D] (None without `with_mean`), f32, of whole blocks of tokens."""
    (N, D), V = x.shape, head.shape[0]
    n, v = tiling.tokens, tiling.entries
    of_tokens = lambda width: pl.BlockSpec((n, width), lambda i, j: (i, 0))  # noqa: E731
    widths = (1, D) if with_mean else (1,)
    outputs = pl.pallas_call(
        partial(_softmax_kernel, entries=V, block=v, with_mean=with_mean),
        grid=(N // n, pl.cdiv(V, v)),
        in_specs=[of_tokens(D), pl.BlockSpec((v, D), lambda i, j: (j, 0))],
        out_specs=[of_tokens(width) for width in widths],
        out_shape=[jax.ShapeDtypeStruct((N, width), jnp.float32) for width in widths],
        scratch_shapes=[pltpu.VMEM((n, 1), jnp.float32)] * 2,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=tiling.interpret,
        name="cross_entropy_softmax",
    )(x, head)
    return outputs[0], outputs[1] if with_mean else None


def _softmax_kernel(x_ref, head_ref, lse_ref, *refs, entries, block, with_mean):
    mean_ref, top_ref, total_ref = refs if with_mean else (None, *refs)
    j = pl.program_id(1)

    @pl.when(j == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        if with_mean:
            mean_ref[...] = jnp.zeros_like(mean_ref)

    head = head_ref[...]  # v D
    logits = _product(x_ref[...], head, 1, 1)  # n v
    if entries % block:
        # The last block reads arbitrary values beyond the vocabulary, even NaN.
        left = entries - j * block
        logits = jnp.where(
            jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) < left, logits, -jnp.inf
        )
        head = jnp.where(
            jax.lax.broadcasted_iota(jnp.int32, head.shape, 0) < left, head, jnp.zeros_like(head)
        )
    before = top_ref[...]
    top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
    shares, scale = jnp.exp(logits - top), jnp.exp(before - top)
    total = total_ref[...] * scale + jnp.sum(shares, axis=1, keepdims=True)
    top_ref[...], total_ref[...] = top, total
    if with_mean:
        mean_ref[...] = mean_ref[...] * scale + _product(shares.astype(head.dtype), head, 1, 0)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        lse_ref[...] = top + jnp.log(total)
        if with_mean:
            mean_ref[...] = mean_ref[...] / total


def _dhead(
    x: jax.Array,
    head: jax.Array,
    lse: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    tiling: Tiling,
) -> jax.Array:
    """[V, D] f32 of whole blocks of tokens."""
    (N, D), V = x.shape, head.shape[0]
    n, v = tiling.tokens, tiling.entries
    of_entries = pl.BlockSpec((v, D), lambda i, j: (i, 0))
    of_tokens = pl.BlockSpec((1, n), lambda i, j: (0, j))
    return pl.pallas_call(
        _dhead_kernel,
        grid=(pl.cdiv(V, v), N // n),
        in_specs=[of_entries, pl.BlockSpec((n, D), lambda i, j: (j, 0)), *[of_tokens] * 3],
        out_specs=of_entries,
        out_shape=jax.ShapeDtypeStruct((V, D), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=tiling.interpret,
        name="cross_entropy_dhead",
    )(head, x, lse.reshape(1, N), targets.reshape(1, N), weights.reshape(1, N))


def _dhead_kernel(head_ref, x_ref, lse_ref, targets_ref, weights_ref, dhead_ref):
    """Adds a block of tokens to the gradient of a block of entries. Entries are rows, so values
    beyond the vocabulary stay in rows of the last block that are not written back.
    """
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when(j == 0)
    def _():
        dhead_ref[...] = jnp.zeros_like(dhead_ref)

    x = x_ref[...]
    logits = _product(head_ref[...], x, 1, 1)  # v n
    entry = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0) + i * logits.shape[0]
    hit = jnp.where(entry == targets_ref[...], 1.0, 0.0)
    dlogits = weights_ref[...] * (jnp.exp(logits - lse_ref[...]) - hit)
    dhead_ref[...] += _product(dlogits.astype(x.dtype), x, 1, 0)


def _product(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    """x y over an axis of each, f32; f32 inputs are not rounded to bf16 on the way."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
