"""The LoRA projections of one input (q, k and v, say) as one op in plain XLA, with its own backward
pass.

    L = c x' [A1 A2 ...]        one narrow product; x' is x with dropped channels set to 0,
                                c = scale / (1 - rate)
    Yi = x Wi + Li Bi

W is frozen: its gradient is never formed, and an NF4 weight is dequantised again in the backward
pass. That pass saves x and the narrow L; autodiff would also store x' and its mask, which are drawn
again from their counters. With dLi = c dYi Bi^T, side by side in dL:

    dBi = Li^T dYi,    [dA1 dA2 ...] = x'^T dL,    dx = sum_i dYi Wi^T + mask (dL [A1 A2 ...]^T)

On two CPU cores this takes 0.67 of the processor time of autodiff, projection by projection (the
seven projections of a layer of 576 channels and 1,536 in the MLP, rank 16, 2 x 1,024 tokens, f32,
dropout 0.05; 2026-11-21). So does [x, Li] [Wi; Bi] as one product, forwards and backwards or
backwards alone (0.67 to 0.68), which would copy every W.

dtypes: x, W, dY and results have one dtype, and A and B are cast to it; the products for L, dL, dA
and dB are summed in f32 (at least), L and dL then rounded to x's dtype, dA and dB to that of the
masters, f32. On a CPU x, dY and results may be f32 beside W in bf16: then all operands but those of
dA and dB are rounded to bf16, and x and L saved as such (see `jaxre_kernels.linear`).

Memory: the backward pass saves x and L, of the sum of the ranks R numbers a token. x' and its mask,
I numbers a token each, exist during one product, a dequantised W during one projection.

Roofline for N tokens, I inputs, O outputs and ranks R of all projections together, N much larger
than I and O and these than R, in bf16; bytes are the least that XLA moves:

                FLOPs                          bytes                          FLOP a byte
    forward     2 N I O + 2 N R (I + O)        2 N (2 I + 3 O) + 2 I O        I O / (2 I + 3 O)
    backward    2 N I O + 4 N R (I + O)        2 N (4 I + 3 O) + 2 I O        I O / (4 I + 3 O)

Y is written by the base product, then read and written again for its low-rank term, as dx is; x is
read twice forwards, dY three times backwards. If the compiler writes x' to memory that is 4 N I
more each way, and an NF4 weight is 2.5 I O more (`nf4/reference.py`). For q, k and v of
Qwen2.5-0.5B and 3B that is 197 and 445 FLOPs a byte forwards, 147 and 330 backwards; an H200 needs
206 by its datasheet, a bare product has I O / (I + O): 504 and 1,138.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxre_kernels.linear import packed, product, unpacked
from jaxre_kernels.lora.dropout import keep_channels
from jaxre_kernels.nf4 import NF4Tiles, NF4Weight, dequantise, dequantise_tiles, tiled


class Factors(NamedTuple):
    """LoRA factors of one projection: a [I, R], b [R, O], f32 masters."""

    a: jax.Array
    b: jax.Array


class Projections(NamedTuple):
    """Shapes and dtype of a call; for each projection its outputs, its rank (0: no LoRA), and
    whether it is NF4.
    """

    tokens: int
    inputs: int
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    nf4: tuple[bool, ...]
    dtype: DTypeLike


def projections_of(
    x: jax.Array,
    weights: Sequence[jax.Array | NF4Weight | NF4Tiles],
    factors: Sequence[Factors | None],
) -> Projections:
    ranks = tuple(0 if factor is None else factor.a.shape[-1] for factor in factors)
    nf4 = tuple(isinstance(weight, NF4Weight | NF4Tiles) for weight in weights)
    return Projections(
        x.size // x.shape[-1], x.shape[-1], tuple(map(_outputs, weights)), ranks, nf4, x.dtype
    )


def _outputs(weight: jax.Array | NF4Weight | NF4Tiles) -> int:
    if isinstance(weight, NF4Weight):
        return weight.shape[0]
    return (weight.codes if isinstance(weight, NF4Tiles) else weight).shape[-1]


def in_tiles(
    weights: Sequence[jax.Array | NF4Weight | NF4Tiles], half: int
) -> list[jax.Array | NF4Tiles]:
    """The weights with all NF4 in tiles of `half`."""
    return [
        tiled(weight, half) if isinstance(weight, NF4Weight | NF4Tiles) else weight
        for weight in weights
    ]


def inputs_of(weight: jax.Array | NF4Tiles) -> int:
    return 2 * weight.codes.shape[0] if isinstance(weight, NF4Tiles) else weight.shape[0]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def joined_lora_group(
    x: jax.Array,
    weights: Sequence[jax.Array | NF4Weight | NF4Tiles],
    factors: Sequence[Factors | None],
    words: jax.Array | None,
    scale: float,
    rate: float,
) -> list[jax.Array]:
    """`lora_group` in plain XLA, with the narrow product of all projections as one."""
    return _forward(x, weights, factors, words, scale, rate)[0]


def _forward(x, weights, factors, words, scale, rate):
    outputs = [_times(x, weight) for weight in weights]
    if all(factor is None for factor in factors):
        return outputs, (None, weights, factors, None, None)
    dtype = _products_in(x, weights)
    low = low_of(x.astype(dtype), factors, words, scale, rate).astype(x.dtype)
    parts = iter(_split(low, factors))
    for i, factor in enumerate(factors):
        if factor is not None:
            outputs[i] += product(next(parts), factor.b.astype(dtype))
    return outputs, (packed(x, dtype), weights, factors, words, packed(low, dtype))


def _backward(scale, rate, residuals, dys):
    x, weights, factors, words, low = residuals
    dx = sum(_times_transposed(dy, weight) for dy, weight in zip(dys, weights, strict=True))
    if low is None:
        return dx, None, None, None
    dtype = _products_in(dx, weights)
    dlow = dlow_of([dy.astype(dtype) for dy in dys], factors, scale, rate).astype(dx.dtype)
    dx += _dropped(product(dlow, joined_a(factors, dtype).T), words, rate)
    # Sums over tokens are in f32 even for rounded values: XLA for CPUs has no others.
    x, low = (unpacked(array, dtype).astype(dx.dtype) for array in (x, low))
    return dx, None, factor_gradients(x, low, dlow, dys, factors, words, rate), None


joined_lora_group.defvjp(_forward, _backward)


# ---- narrow products, for other implementations too -------------------------------------------


def low_of(
    x: jax.Array,
    factors: Sequence[Factors | None],
    words: jax.Array | None,
    scale: float,
    rate: float,
) -> jax.Array:
    """L [..., sum of R] of x's dtype; at least one projection has factors."""
    return (
        _product(_dropped(x, words, rate), joined_a(factors, x.dtype)) * (scale / (1 - rate))
    ).astype(x.dtype)


def dlow_of(
    dys: Sequence[jax.Array], factors: Sequence[Factors | None], scale: float, rate: float
) -> jax.Array:
    """dL [..., sum of R] of the dtype of the dys."""
    parts = [
        _product(dy, factor.b.astype(dy.dtype).T)
        for dy, factor in zip(dys, factors, strict=True)
        if factor is not None
    ]
    return (jnp.concatenate(parts, axis=-1) * (scale / (1 - rate))).astype(dys[0].dtype)


def factor_gradients(
    x: jax.Array,
    low: jax.Array,
    dlow: jax.Array,
    dys: Sequence[jax.Array],
    factors: Sequence[Factors | None],
    words: jax.Array | None,
    rate: float,
) -> list[Factors | None]:
    """dA and dB of each projection, summed in f32."""
    lows = iter(_split(low, factors))
    dbs = [
        None if factor is None else b_gradient(next(lows), dy)
        for factor, dy in zip(factors, dys, strict=True)
    ]
    return with_a_gradients(x, dlow, dbs, factors, words, rate)


def b_gradient(low: jax.Array, dy: jax.Array) -> jax.Array:
    """dB [R, O] of one projection, from its own L."""
    return _over_tokens(low, dy)


def with_a_gradients(
    x: jax.Array,
    dlow: jax.Array,
    dbs: Sequence[jax.Array | None],
    factors: Sequence[Factors | None],
    words: jax.Array | None,
    rate: float,
) -> list[Factors | None]:
    """Pairs dA of each projection, summed in f32, with the given dB."""
    # As [R, I]: a CPU transposes the first operand of a sum over tokens in memory, and dL is the
    # narrow one. Without the barrier the compiler would swap the operands again.
    das = iter(
        _split(
            jax.lax.optimization_barrier(_over_tokens(dlow, _dropped(x, words, rate))).T, factors
        )
    )
    return [
        (
            None
            if factor is None
            else Factors(next(das).astype(factor.a.dtype), db.astype(factor.b.dtype))
        )
        for factor, db in zip(factors, dbs, strict=True)
    ]


def joined_a(factors: Sequence[Factors | None], dtype: jnp.dtype) -> jax.Array:
    """[I, sum of R]."""
    return jnp.concatenate([factor.a for factor in factors if factor is not None], axis=-1).astype(
        dtype
    )


# ---- products ---------------------------------------------------------------------------------


def _products_in(x: jax.Array, weights: Sequence[jax.Array | NF4Weight | NF4Tiles]) -> jnp.dtype:
    """The dtype of the group's products: that of its dense weights, or x's if all are NF4."""
    dense = (weight.dtype for weight in weights if not isinstance(weight, NF4Weight | NF4Tiles))
    return next(dense, x.dtype)


def _times(x: jax.Array, weight: jax.Array | NF4Weight | NF4Tiles) -> jax.Array:
    return product(
        x,
        dequantise(weight, x.dtype).T if isinstance(weight, NF4Weight) else _dense(weight, x.dtype),
    )


def _times_transposed(dy: jax.Array, weight: jax.Array | NF4Weight | NF4Tiles) -> jax.Array:
    return product(
        dy,
        dequantise(weight, dy.dtype)
        if isinstance(weight, NF4Weight)
        else _dense(weight, dy.dtype).T,
    )


def _dense(weight: jax.Array | NF4Tiles, dtype: jnp.dtype) -> jax.Array:
    return dequantise_tiles(weight, dtype) if isinstance(weight, NF4Tiles) else weight


def _dropped(x: jax.Array, words: jax.Array | None, rate: float) -> jax.Array:
    """x with dropped channels set to 0; the factor 1 / (1 - rate) is in the narrow products."""
    return jnp.where(keep_channels(words, x.shape[-1], rate), x, 0) if rate else x


def _split(joined: jax.Array, factors: Sequence[Factors | None]) -> list[jax.Array]:
    """[..., sum of R] -> [..., R] of each targeted projection."""
    ranks = [factor.a.shape[-1] for factor in factors if factor is not None]
    return jnp.split(joined, [sum(ranks[:i]) for i in range(1, len(ranks))], axis=-1)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _over_tokens(x: jax.Array, y: jax.Array) -> jax.Array:
    """[..., I], [..., R] -> [I, R] summed over tokens, in f32 (at least)."""
    return jnp.einsum(
        "...i,...r->ir", x, y, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32)
    )
