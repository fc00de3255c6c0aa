"""Not yet run on a TPU: unverified. `tools/hardware_check --only lora,nf4` confirms it.

The LoRA projections of one input for TPUs (Pallas Mosaic), forward and backward, with dense or NF4
weights. Tested in Pallas's interpreters and compiled ahead of time for v5e, v5p and v6e with jax
0.12.0.1, for v5e alone with 0.10.2 (of the other two, one runs out of vector memory there). Every
statement about speed is arithmetic.

The formulas are derived in `group.py`; with c = scale / (1 - rate), and x' = x with dropped
channels set to 0:

    forward    L = c x' [A1 A2 ...],    Yi = x Wi + Li Bi
    backward   dLi = c dYi Bi^T,    dBi = Li^T dYi,
        dx = sum_i dYi Wi^T + mask (dL [A1 A2 ...]^T),    [dA1 dA2 ...] = x'^T dL

in one kernel each. A sum of base and low-rank product is formed in f32 and rounded and written
once; x' and the mask never leave the chip, and a mask is drawn once forwards and once backwards,
where dx and dA share it. One read of dYi serves dLi, dBi and dx.

Grid: (spans of tokens, parts of the wide axis, blocks of a span). A part of W, of all projections
at once, stays in vector memory while the tokens of a span pass by: an NF4 weight is decoded once a
span, whatever the number of its blocks. Forwards a part is some outputs of every projection and all
inputs, backwards some inputs and all outputs, so no sum goes over parts. The narrow L or dL of a
span is computed with its first part and stored for the others. Spans have no order (v5p has two
cores); each writes its own sums of dA and dB, which are added up outside.

Layout. Letters: N tokens, n of a block, I inputs, O outputs, o and i of a part, R the sum of the
ranks, each padded to 16, the sublanes of a tile of bf16. A, B and L are [R, I], [R, O] and [R, N]:
with a rank of 32 along the 128 lanes three quarters of each tile would be empty, in HBM too. NF4
weights are `NF4Tiles`; an `NF4Weight` is converted on every call. Beyond the end of its axis the
last part reads arbitrary memory; those columns of the result are not written. The last span is
padded with zero tokens.

dtypes: x, W, dY and results bf16 or f32, A and B cast to it; sums, dA and dB f32; L and dL rounded
to x's dtype, as in `group.py`.

Memory: the backward pass saves x and L, R numbers a token. Neither x', the mask, Li Bi nor a
decoded W is ever in HBM. Packing an `NF4Weight` takes up to 9 bytes a parameter temporarily. Shapes
that do not fit vector memory are refused: the f32 sums of dB of all outputs do not at rank 128 for
gate and up of 11,008 (64 fits), nor, in f32, any rank of these.

Roofline, of one part and block, w bytes a number; W is read once a span, 2,048 tokens: 1,024 FLOPs
a byte read in f32, more in less.

                 FLOPs                 bytes that pass                FLOP a byte, bf16
    forward      2 n I o (+ 2 n I R)   n (I + o) w                    o, where I is much larger
    backward     2 n i O (+ 4 n i R)   n (O + 2 i) w                  i, where O is much larger

The matrix unit is the bound from 240 (v5e), 166 (v5p) and 560 (v6e) FLOP a byte on, by the
datasheets. Decoding is about 30 vector operations a parameter and span, of 2,048 multiplications; a
v5e does 16 of these in the time of one of those, so that is a quarter of the products' time where
the two do not overlap. A mask is about 12 operations a channel and token, beside a multiplication
for each of the outputs.

Sharding: like every Pallas TPU kernel it runs inside `shard_map(..., check_vma=False)`, tokens
split, not under automatic partitioning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxre_kernels.lora.group import (
    Factors,
    Projections,
    in_tiles,
    inputs_of,
    projections_of,
)
from jaxre_kernels.lora.tpu_kernels import backward_kernel, forward_kernel
from jaxre_kernels.mosaic_tpu import LANES, VMEM_LIMIT
from jaxre_kernels.nf4 import NF4Tiles, NF4Weight
from jaxre_kernels.nf4.tiles import HALF
from jaxre_kernels.nf4.weight import BLOCK

RANK_MULTIPLE = 16  # sublanes of a tile of bf16
NF4_HALF = HALF  # rows of a half of `NF4Tiles`
TOKENS = (512, 256, 128)  # of a block
SPAN = 2048  # tokens
CHUNK = 256  # channels whose mask is drawn at a time
ENOUGH = 1024  # FLOPs a byte; v6e needs 560


class Blocks(NamedTuple):
    """Tokens of a block, and the number of parts of the wide axis."""

    tokens: int
    parts: int


class Tiling(NamedTuple):
    """Static choices of a call. Tests change the lanes of which a part is a multiple, and whether
    Pallas interprets.
    """

    forward: Blocks
    backward: Blocks
    span: int = SPAN
    chunk: int = CHUNK
    lanes: int = LANES
    interpret: Any = False


def pallas_lora_group(
    x: jax.Array,
    weights: Sequence[jax.Array | NF4Weight | NF4Tiles],
    factors: Sequence[Factors | None],
    words: jax.Array | None,
    scale: float,
    rate: float,
    *,
    tiling: Tiling | None = None,
) -> list[jax.Array]:
    """x W + scale (dropout(x) A) B of every projection of one input on one device; differentiable
    in x and the factors.

    Args: those of `lora_group`; x is bf16 or f32.
      tiling: chosen from the shapes by default.

    Raises:
      ValueError: what `unsupported` says.
    """
    projections = projections_of(x, weights, factors)
    refusal = unsupported(projections)
    if refusal is not None:
        raise ValueError(f"LoRA for TPUs does not run here: {refusal}")
    return _op(x, weights, factors, words, scale, rate, tiling or tiling_of(projections))


# ---- what fits --------------------------------------------------------------------------------


def unsupported(projections: Projections) -> str | None:
    """Why `pallas_lora_group` does not support such projections, in words; None if it does."""
    dtype = jnp.dtype(projections.dtype)
    if dtype not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        return f"it takes float32 and bfloat16, not {dtype.name}"
    if any(projections.nf4) and projections.inputs % BLOCK:
        return f"NF4 for TPUs takes a multiple of {BLOCK} inputs, not {projections.inputs:,}"
    if tiling_of(projections) is None:
        of = " and ".join(f"{width:,}" for width in projections.outputs)
        return (
            f"no part of {projections.inputs:,} inputs and {of} outputs fits {VMEM_LIMIT:,} bytes"
            " of vector memory"
        )
    return None


def described(projections: Projections) -> str:
    """Describes the blocks of supported projections."""
    forward, backward, *_ = tiling_of(projections)
    return f"{_described(forward, 'outputs')} forwards, {_described(backward, 'inputs')} backwards"


def _described(blocks: Blocks, axis: str) -> str:
    return (
        f"{blocks.tokens} tokens and "
        + (f"1/{blocks.parts} of the {axis}" if blocks.parts > 1 else f"all {axis}")
        + " at a time"
    )


@cache
def tiling_of(projections: Projections) -> Tiling | None:
    """The parts and blocks with the highest estimated share of the peak; None if none fit. Not
    measured on a TPU.
    """
    forward = _best(
        projections,
        partial(_output_parts, projections, lanes=LANES),
        sum(projections.outputs),
        _forward_bytes,
    )
    backward = _best(
        projections,
        partial(_input_parts, projections, lanes=LANES),
        projections.inputs,
        _backward_bytes,
    )
    return Tiling(forward, backward) if forward and backward else None


def _best(projections, widths_of, total, bytes_of) -> Blocks | None:
    """The blocks with the most FLOPs a byte up to ENOUGH, the least beyond the end of the axis, and
    the most tokens to an entry of W in the matrix unit.
    """
    best, highest = None, 0.0
    for parts in range(1, -(-total // LANES) + 1):
        widths = widths_of(parts)
        if widths is None:
            continue
        for tokens in TOKENS:
            mostly_padding = tokens > max(
                TOKENS[-1], projections.tokens + -projections.tokens % TOKENS[-1]
            )
            share = (
                min(sum(widths), ENOUGH) * total / (parts * sum(widths)) * tokens / (tokens + 64)
            )
            if (
                share > highest
                and not mostly_padding
                and bytes_of(projections, tokens, widths) <= VMEM_LIMIT
            ):
                best, highest = Blocks(tokens, parts), share
    return best


def _output_parts(projections: Projections, parts: int, lanes: int) -> list[int] | None:
    """The outputs of each projection in one part; None if one has fewer blocks than parts."""
    widths = [_width(outputs, parts, lanes) for outputs in projections.outputs]
    return None if None in widths else widths


def _input_parts(projections: Projections, parts: int, lanes: int) -> list[int] | None:
    """The inputs in one part."""
    width = _width(projections.inputs, parts, max(lanes, BLOCK) if any(projections.nf4) else lanes)
    return None if width is None else [width]


def _width(size: int, parts: int, multiple: int) -> int | None:
    """Size of a part, of which the last may be shorter; None if the axis has fewer parts of that
    multiple.
    """
    width = size if parts == 1 else -(-size // parts // multiple) * multiple
    return width if -(-size // width) == parts else None


def _forward_bytes(projections: Projections, tokens: int, widths: list[int]) -> int:
    """Approximate bytes that a step of the forward kernel holds: two buffers of all inputs and
    outputs, scratch, sums in f32.
    """
    size = jnp.dtype(projections.dtype).itemsize
    inputs, widths = _lanes(projections.inputs), list(map(_lanes, widths))
    ranks = list(map(_padded_rank, projections.ranks))
    weights = sum(
        _weight_bytes(inputs, width, inputs, nf4, size)
        for width, nf4 in zip(widths, projections.nf4, strict=True)
    )
    narrow = 2 * sum(rank * width for rank, width in zip(ranks, widths, strict=True)) + sum(
        ranks
    ) * (2 * inputs + 2 * tokens + SPAN)
    sums = 4 * tokens * (2 * max(widths) + (8 * CHUNK if sum(ranks) else 0))
    return 2 * tokens * (inputs + sum(widths)) * size + weights + narrow * size + sums


def _backward_bytes(projections: Projections, tokens: int, widths: list[int]) -> int:
    """Approximate bytes that a step of the backward kernel holds."""
    size = jnp.dtype(projections.dtype).itemsize
    inputs, outputs = _lanes(widths[0]), list(map(_lanes, projections.outputs))
    ranks = list(map(_padded_rank, projections.ranks))
    weights = sum(
        _weight_bytes(inputs, width, projections.inputs, nf4, size)
        for width, nf4 in zip(outputs, projections.nf4, strict=True)
    )
    bs = [rank * width for rank, width in zip(ranks, outputs, strict=True)]
    gradients = 2 * (size + 4) * (sum(bs) + sum(ranks) * inputs)
    sums = 4 * max(bs) + 4 * tokens * 10 * CHUNK
    return (
        2 * tokens * (2 * inputs + sum(outputs)) * size
        + weights
        + gradients
        + sum(ranks) * (2 * tokens + SPAN) * size
        + sums
    )


def _weight_bytes(inputs: int, outputs: int, all_inputs: int, nf4: bool, size: int) -> int:
    """Two buffers of a part; for NF4 two of codes and of the absmax of all inputs, and one of
    values.
    """
    return outputs * (inputs * (size + 1) + all_inputs // 8 if nf4 else 2 * inputs * size)


def _lanes(width: int) -> int:
    return width + -width % LANES


def _padded_rank(rank: int) -> int:
    return rank + -rank % RANK_MULTIPLE


# ---- calls ------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _op(x, weights, factors, words, scale, rate, tiling):
    return _forward(x, weights, factors, words, scale, rate, tiling)[0]


def _forward(x, weights, factors, words, scale, rate, tiling):
    projections = projections_of(x, weights, factors)
    trained = any(factor is not None for factor in factors)
    call = _Call(projections, tiling, tiling.forward)
    widths = _output_parts(projections, tiling.forward.parts, tiling.lanes)
    a, bs = _joined_a(factors, x.dtype), _padded_bs(factors, x.dtype)
    words_of_lanes = call.words(words, rate if trained else 0)
    laid, shapes = in_tiles(weights, NF4_HALF), [(projections.inputs, width) for width in widths]
    ys, low = call.run(
        "lora_forward",
        partial(forward_kernel, scale=scale / (1 - rate), rate=rate, chunk=tiling.chunk),
        (words_of_lanes, call.tokens(x), a, laid, bs),
        (
            _if(words_of_lanes, call.lanes_block),
            call.block(projections.inputs),
            _if(a, lambda a: pl.BlockSpec(a.shape, lambda t, j, s: (0, 0))),
            _weight_specs(laid, shapes, lambda t, j, s: (0, j)),
            [
                _if(
                    b,
                    lambda b, width=width: pl.BlockSpec(
                        (b.shape[0], width), lambda t, j, s: (0, j)
                    ),
                )
                for b, width in zip(bs, widths, strict=True)
            ],
        ),
        ([call.like(outputs) for outputs in projections.outputs], _if(a, call.like_low)),
        ([call.block(width, moves=True) for width in widths], _if(a, call.once)),
        (_values(laid, shapes, x.dtype), _if(a, call.lows)),
    )
    outputs = [y[: projections.tokens].reshape(*x.shape[:-1], -1) for y in ys]
    return outputs, (
        x if trained else None,
        weights,
        factors,
        words,
        low[:, : projections.tokens] if trained else None,
    )


def _backward(scale, rate, tiling, residuals, dys):
    x, weights, factors, words, low = residuals
    like, laid = dys[0], in_tiles(weights, NF4_HALF)
    inputs = inputs_of(laid[0])
    projections = projections_of(
        jax.ShapeDtypeStruct((*like.shape[:-1], inputs), like.dtype), weights, factors
    )
    call = _Call(projections, tiling, tiling.backward)
    (width,) = _input_parts(projections, tiling.backward.parts, tiling.lanes)
    a, bs = _joined_a(factors, like.dtype), _padded_bs(factors, like.dtype)
    words_of_lanes = call.words(words, 0 if low is None else rate)
    low, shapes = _if(low, call.lanes), [(width, outputs) for outputs in projections.outputs]
    dx, da, dbs = call.run(
        "lora_backward",
        partial(backward_kernel, scale=scale / (1 - rate), rate=rate, chunk=tiling.chunk),
        (words_of_lanes, _if(x, call.tokens), a, low, laid, bs, [call.tokens(dy) for dy in dys]),
        (
            _if(words_of_lanes, call.lanes_block),
            _if(x, lambda _: call.block(width, moves=True)),
            _if(a, lambda a: pl.BlockSpec((a.shape[0], width), lambda t, m, s: (0, m))),
            _if(low, call.lanes_block),
            _weight_specs(laid, shapes, lambda t, m, s: (m, 0)),
            [_if(b, lambda b: pl.BlockSpec(b.shape, lambda t, m, s: (0, 0))) for b in bs],
            [call.block(outputs) for outputs in projections.outputs],
        ),
        (call.like(inputs), _if(a, call.like_sums), [_if(b, call.like_sums) for b in bs]),
        (
            call.block(width, moves=True),
            _if(a, lambda a: pl.BlockSpec((1, a.shape[0], width), lambda t, m, s: (t, 0, m))),
            [_if(b, lambda b: pl.BlockSpec((1, *b.shape), lambda t, m, s: (t, 0, 0))) for b in bs],
        ),
        (_values(laid, shapes, like.dtype), _if(a, call.lows)),
    )
    dx = dx[: projections.tokens].reshape(*like.shape[:-1], inputs)
    return dx, None, None if a is None else _gradients(da, dbs, factors), None


_op.defvjp(_forward, _backward)


class _Call(NamedTuple):
    """The grid of a call, with its arrays and blocks."""

    projections: Projections
    tiling: Tiling
    blocks: Blocks

    @property
    def grid(self) -> tuple[int, int, int]:
        """Spans of equal length, parts, blocks of a span."""
        blocks = -(-self.projections.tokens // self.blocks.tokens)
        spans = -(-blocks // max(1, self.tiling.span // self.blocks.tokens))
        return spans, self.blocks.parts, -(-blocks // spans)

    @property
    def padded(self) -> int:
        spans, _, steps = self.grid
        return spans * steps * self.blocks.tokens

    def run(self, name, kernel, arrays, in_specs, out_shape, out_specs, scratch_shapes):
        # Spans have no order; within a span, scratch comes from its first part, and sums go over
        # its blocks.
        params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        )
        return pl.pallas_call(
            kernel,
            grid=self.grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=scratch_shapes,
            compiler_params=params,
            interpret=self.tiling.interpret,
            name=name,
        )(*arrays)

    def tokens(self, array):
        """[..., I] -> [padded, I]."""
        flat = array.reshape(-1, array.shape[-1])
        return jnp.pad(flat, ((0, self.padded - flat.shape[0]), (0, 0)))

    def lanes(self, array):
        """[R, N] -> [R, padded]."""
        return jnp.pad(array, ((0, 0), (0, self.padded - array.shape[1])))

    def words(self, words, rate):
        """[1, padded] int32, or None without dropout."""
        return (
            self.lanes(jax.lax.bitcast_convert_type(words.reshape(1, -1), jnp.int32))
            if rate
            else None
        )

    def block(self, width, moves=False):
        """Block spec of [padded, channels]: all channels, or those of the part."""
        steps = self.grid[2]
        return pl.BlockSpec(
            (self.blocks.tokens, width), lambda t, part, s: (t * steps + s, part if moves else 0)
        )

    def lanes_block(self, array):
        """Block spec of [R, padded], for all rows of `array`."""
        steps = self.grid[2]
        return pl.BlockSpec(
            (array.shape[0], self.blocks.tokens), lambda t, part, s: (0, t * steps + s)
        )

    def once(self, array):
        """Block spec of [R, padded], each block written with the first part: in later parts the
        index stays at the last block, because no block may be visited twice.
        """
        steps = self.grid[2]
        at = lambda t, part, s: (0, t * steps + jnp.where(part == 0, s, steps - 1))  # noqa: E731
        return pl.BlockSpec((array.shape[0], self.blocks.tokens), at)

    def like(self, width):
        return jax.ShapeDtypeStruct((self.padded, width), self.projections.dtype)

    def like_low(self, a):
        return jax.ShapeDtypeStruct((a.shape[0], self.padded), a.dtype)

    def like_sums(self, factor):
        """A sum of each span."""
        return jax.ShapeDtypeStruct((self.grid[0], *factor.shape), jnp.float32)

    def lows(self, a):
        return pltpu.VMEM((self.grid[2], a.shape[0], self.blocks.tokens), a.dtype)


def _if(array, made):
    """`made(array)`, or None without an array: such kernels lack the argument."""
    return None if array is None else made(array)


# ---- layout -----------------------------------------------------------------------------------


def _weight_specs(laid, shapes, index):
    """Blocks of weights [I, O] of the given shapes."""
    return [
        (
            NF4Tiles(
                pl.BlockSpec((inputs // 2, outputs), index),
                # Of all inputs: those of a part need not fill the sublanes of a tile.
                pl.BlockSpec(
                    (weight.absmax.shape[0], outputs), lambda t, part, s: (0, index(t, part, s)[1])
                ),
            )
            if isinstance(weight, NF4Tiles)
            else pl.BlockSpec((inputs, outputs), index)
        )
        for weight, (inputs, outputs) in zip(laid, shapes, strict=True)
    ]


def _values(laid, shapes, dtype):
    """Scratch for decoded NF4 weights."""
    return [
        pltpu.VMEM(shape, dtype) if isinstance(weight, NF4Tiles) else None
        for weight, shape in zip(laid, shapes, strict=True)
    ]


def _joined_a(factors, dtype):
    """[sum of padded R, I], or None."""
    rows = [_padded_rows(factor.a.T, dtype) for factor in factors if factor is not None]
    return jnp.concatenate(rows) if rows else None


def _padded_bs(factors, dtype):
    return [None if factor is None else _padded_rows(factor.b, dtype) for factor in factors]


def _padded_rows(array, dtype):
    return jnp.pad(array.astype(dtype), ((0, -array.shape[0] % RANK_MULTIPLE), (0, 0)))


def _gradients(da, dbs, factors):
    """Gradients of the factors, from sums of spans [spans, padded R, ...]."""
    gradients, first = [], 0
    for factor, db in zip(factors, dbs, strict=True):
        if factor is None:
            gradients.append(None)
            continue
        rank = factor.a.shape[-1]
        rows = da[:, first : first + rank].sum(0).T
        gradients.append(
            Factors(rows.astype(factor.a.dtype), db[:, :rank].sum(0).astype(factor.b.dtype))
        )
        first += _padded_rank(rank)
    return gradients
