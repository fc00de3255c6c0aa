"""Not yet run on a Hopper GPU: unverified. `tools/hardware_check --only lora,nf4` confirms it.

The LoRA projections of one input for Hopper GPUs (Pallas Mosaic GPU), forward and backward, with
dense or NF4 weights. Tested in Pallas's interpreter and compiled ahead of time for an H200
(sm_90a). Every statement about speed is arithmetic.

The formulas are derived in `group.py`; with c = scale / (1 - rate), and x' = x with dropped
channels set to 0:

    forward    L = c x' [A1 A2 ...],    Yi = x Wi + Li Bi
    backward   dLi = c dYi Bi^T,    dBi = Li^T dYi,    [dA1 dA2 ...] = x'^T dL,
        dx = sum_i dYi Wi^T + mask (dL [A1 A2 ...]^T)

One kernel computes all Yi, one dx. A sum of base and low-rank product is formed in f32 registers,
and rounded and written once. A step of a sum is 64 channels; ranks are padded to 64 and are more
steps of the same sum: [x, Li] [Wi; Bi] with no copy of either. In the backward pass dropout follows
the low-rank product, which is therefore computed after the rest of the sum and masked in registers
by the counters. A tile of any projection is a thread block of the one grid, so narrow projections
(k and v) fill the processors together with wide ones.

With dropout, L has a kernel of its own, which drops channels of x in shared memory. dLi and dBi
come from one read of dYi (`gpu_narrow.py`) where that moves fewer bytes than two products of XLA,
which is decided from the shapes: for wide projections and ranks of at most 32. It reads dY
separately from the kernel of dx, whose tiles have too few registers left for dB. dA is XLA's: a sum
over all tokens of dL, which is complete only after all outputs. In bf16 these products move, a
token, besides 2 (I + O) bytes of each of the wide kernels:

    L: 2 I        dL and dB: 2.2 O to 4 O        dA: 2 I, and 4 I if the compiler writes x' to
      memory

At 16,384 tokens and the 4.8 TB/s of an H200 that is 6 us forwards and at most 34 us backwards for
q, k and v of Qwen2.5-0.5B, and 14 and at most 342 us for gate and up of 3B (with rank 32, 237); at
its 989 TFLOP/s the wide product takes 34 us and 1.49 ms each way.

NF4. The feeding warpgroup decodes codes to bf16 in shared memory, by 15 selections a parameter,
while the other two multiply: the product reads them there, forwards as they are and backwards
transposed. Weights are `NF4Tiles` with halves of 64 rows, the tile of a warpgroup; other forms are
converted on every call. Decoding takes about 25 operations a parameter and 256 tokens; a processor
does 128 of these in the time of 2,048 multiplications, so decoding takes at least 1.6 times as long
as the product and bounds it. For many tokens decoding once to memory and a dense product is faster:
4.6 bytes a parameter, 1 ps, beside the 33 ps that 16,384 tokens take to multiply by it. This kernel
saves memory (2 bytes a parameter of the group), and time if tokens are few.

Layout. N tokens, padded by a copy if not a multiple of 256; I and O multiples of 64, I of 128 with
NF4. Tiles have 128 channels, or 64 if a width is not a multiple of 128: 960 channels are 15 such.

dtypes: x, W, dY and results bf16, A and B cast to it; sums, dA and dB f32; L and dL rounded to
bf16, as in `group.py`. f32 is refused: the tensor cores would round it to 10 bits.

Memory: the backward pass saves x and L, of which each projection has 64 numbers a token or a
multiple. Neither x', the mask, Li Bi nor a decoded W is saved, and the latter two are never in
memory. A thread block has 4 slots, 229,376 bytes of shared memory, with NF4 3 slots and codes,
198,656 forwards and 189,440 backwards. So one thread block runs on a processor, and writing its
tile is not hidden.

Roofline of one step of a tile of 256 x 128, 4.2 MFLOP:

                bytes read from L2                              FLOP a byte
    dense       2 (256 + 128) 64                                85
    NF4         2 x 256 x 64 + 9/16 x 128 x 64                  112

Of memory, the thread blocks that run at the same time (132 processors: 11 x 12 tiles of tokens and
channels) read 2 (2,816 + 1,536) bytes a channel for 2 x 2,816 x 1,536 FLOP, 994 FLOP a byte; an
H200 has 206 of them to a byte.

Sharding: inside `shard_map(..., check_vma=False)`, tokens split, not under automatic partitioning.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxre_kernels.lora.gpu_kernels import (
    CHUNK,
    STEP,
    Packed,
    Ring,
    backward_kernel,
    forward_kernel,
    low_kernel,
)
from jaxre_kernels.lora.gpu_narrow import narrow_gradients, panel_of
from jaxre_kernels.lora.group import (
    Factors,
    Projections,
    b_gradient,
    dlow_of,
    in_tiles,
    inputs_of,
    joined_a,
    low_of,
    projections_of,
    with_a_gradients,
)
from jaxre_kernels.mosaic_gpu import MISSING, shared_tile
from jaxre_kernels.nf4 import NF4Tiles, NF4Weight

NF4_HALF = STEP  # rows of a half of `NF4Tiles`
TOKENS = 256  # of a tile
WIDTHS = (128, 64)  # channels of a tile
SLOTS = {False: 4, True: 3}  # steps in flight, by whether a weight is NF4: codes need memory too


def pallas_lora_group(
    x: jax.Array,
    weights: Sequence[jax.Array | NF4Weight | NF4Tiles],
    factors: Sequence[Factors | None],
    words: jax.Array | None,
    scale: float,
    rate: float,
    *,
    interpret: Any = None,
) -> list[jax.Array]:
    """x W + scale (dropout(x) A) B of every projection of one input on one device; differentiable
    in x and the factors.

    Args: those of `lora_group`; x is bf16.
      interpret: argument of `plgpu.kernel`: `plgpu.InterpretGPUParams` to run without a GPU, in f32
        too.

    Raises:
      ValueError: what `unsupported` says.
    """
    projections = projections_of(x, weights, factors)
    refusal = unsupported(projections._replace(dtype=jnp.bfloat16) if interpret else projections)
    if refusal is not None:
        raise ValueError(f"LoRA for GPUs does not run here: {refusal}")
    return _op(x, weights, factors, words, scale, rate, interpret)


def unsupported(projections: Projections) -> str | None:
    """Why `pallas_lora_group` does not support such projections, in words; None if it does."""
    if MISSING is not None:
        return MISSING
    dtype = jnp.dtype(projections.dtype)
    if dtype != jnp.dtype(jnp.bfloat16):
        return f"it takes bfloat16, not {dtype.name}"
    for width in (projections.inputs, *projections.outputs):
        if width % STEP:
            return f"it takes multiples of {STEP} inputs and outputs, not {width:,}"
    if any(projections.nf4) and projections.inputs % (2 * STEP):
        return f"NF4 for GPUs takes a multiple of {2 * STEP} inputs, not {projections.inputs:,}"
    steps, slots = sum(-(-rank // STEP) for rank in projections.ranks), SLOTS[any(projections.nf4)]
    if steps > slots:
        return (
            f"ranks of {' and '.join(map(str, projections.ranks))}, each padded to {STEP}, are more"
            f" than {slots * STEP} together"
        )
    return None


def described(projections: Projections) -> str:
    """Describes the tiles of supported projections."""
    forward, backward = _width(*projections.outputs), _width(projections.inputs)
    return f"tiles of {TOKENS} tokens and {forward} outputs forwards, {backward} inputs backwards"


def _width(*widths: int) -> int:
    """The widest tile that divides all `widths`."""
    return next(tile for tile in WIDTHS if all(width % tile == 0 for width in widths))


# ---- calls ------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _op(x, weights, factors, words, scale, rate, interpret):
    return _forward(x, weights, factors, words, scale, rate, interpret)[0]


def _forward(x, weights, factors, words, scale, rate, interpret):
    trained, padded = any(factor is not None for factor in factors), _padded(factors)
    outputs = projections_of(x, weights, factors).outputs
    width, laid, rows, low = _width(*outputs), in_tiles(weights, NF4_HALF), _rows(x), None
    if trained:
        low = (
            _low(x, padded, words, scale, rate, interpret)
            if rate
            else low_of(x, padded, words, scale, rate)
        )
    ys = _run(
        "lora_forward",
        forward_kernel,
        (
            rows,
            None if low is None else _rows(low),
            laid,
            [None if factor is None else factor.b.astype(x.dtype) for factor in padded],
        ),
        [jax.ShapeDtypeStruct((rows.shape[0], channels), x.dtype) for channels in outputs],
        (TOKENS, sum(outputs) // width),
        (STEP, width),
        interpret,
        width,
    )
    ys = [_brought_back(y, x) for y in ys]
    return ys, (x if trained else None, weights, factors, words, low)


def _backward(scale, rate, interpret, residuals, dys):
    x, weights, factors, words, low = residuals
    padded, laid, rows = _padded(factors), in_tiles(weights, NF4_HALF), [_rows(dy) for dy in dys]
    dlow = a = dbs = None
    if low is not None:
        a = joined_a(padded, x.dtype)
        dlow, dbs = _dlow_and_dbs(rows, _rows(low), padded, factors, scale / (1 - rate), interpret)
    inputs = inputs_of(laid[0])
    masked = low is not None and rate
    (dx,) = _run(
        "lora_backward",
        partial(backward_kernel, rate=rate),
        (rows, dlow, a, _words(words) if masked else None, laid),
        [jax.ShapeDtypeStruct((rows[0].shape[0], inputs), dys[0].dtype)],
        (TOKENS, inputs // _width(inputs)),
        (_width(inputs), STEP),
        interpret,
        STEP,
    )
    dx = _brought_back(dx, dys[0])
    if low is None:
        return dx, None, None, None
    gradients = with_a_gradients(x, _brought_back(dlow, x), dbs, padded, words, rate)
    return (
        dx,
        None,
        [_cut(gradient, factor) for gradient, factor in zip(gradients, factors, strict=True)],
        None,
    )


_op.defvjp(_forward, _backward)


def _dlow_and_dbs(rows, low, padded, factors, scale, interpret):
    """dL [N, sum of R], and dB [R, O] of each projection or None: from one read of dY where
    `panel_of` finds that cheaper, else from two products of XLA.
    """
    dlows, dbs, first = [], [], 0
    for dy, wide, factor in zip(rows, padded, factors, strict=True):
        if factor is None:
            dbs.append(None)
            continue
        (rank, outputs), ranks = factor.b.shape, wide.b.shape[0]
        panel = panel_of(dy.shape[0], outputs, rank)
        if panel is None:
            dlow, db = (
                dlow_of([dy], [wide], scale, 0.0),
                b_gradient(low[:, first : first + ranks], dy),
            )
        else:
            dlow, db = narrow_gradients(
                dy, low[:, first : first + rank], factor.b.astype(dy.dtype), panel, scale, interpret
            )
            dlow, db = (
                jnp.pad(dlow, ((0, 0), (0, ranks - rank))),
                jnp.pad(db, ((0, ranks - rank), (0, 0))),
            )
        dlows.append(dlow)
        dbs.append(db)
        first += ranks
    return jnp.concatenate(dlows, axis=-1), dbs


def _low(x, factors, words, scale, rate, interpret):
    """`low_of`, without x' in memory."""
    rows, a = _rows(x), joined_a(factors, x.dtype)
    (low,) = _run(
        "lora_low",
        partial(low_kernel, scale=scale / (1 - rate), rate=rate),
        (rows, a, _words(words)),
        [jax.ShapeDtypeStruct((rows.shape[0], a.shape[1]), x.dtype)],
        (TOKENS // 2, 1),
        (STEP, a.shape[1]),
        interpret,
    )
    return _brought_back(low, x)


def _run(name, kernel, arrays, out_type, tiles, rhs, interpret, packed=None):
    """Runs a kernel over all tiles.

    Args:
      tiles: tokens of a tile, and the number of tiles of channels; rhs: shape of a step of weights.
      packed: columns of a tile of codes, for a kernel whose weights may be NF4.
    """
    dtype, tokens = out_type[0].dtype, out_type[0].shape[0]
    nf4 = any(
        isinstance(leaf, NF4Tiles)
        for leaf in jax.tree.leaves(arrays, is_leaf=lambda leaf: isinstance(leaf, NF4Tiles))
    )
    slots, (height, columns) = SLOTS[nf4], tiles

    ring = Ring(
        shared_tile((slots, height, STEP), dtype),
        shared_tile((slots, *rhs), dtype),
        plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        plgpu.Barrier(num_arrivals=2, num_barriers=slots),
    )
    scratch = {"ring": ring, "staged": shared_tile((2, 2, height // 2, CHUNK), dtype, swizzle=64)}
    if packed is not None:
        scratch["packed"] = _packed(packed) if nf4 else None
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=(tokens // height * columns,),
        grid_names=("tiles",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name=name,
    )(*arrays)


def _packed(columns):
    came = plgpu.Barrier(num_arrivals=2, num_barriers=2)
    return Packed(
        plgpu.SMEM((2, STEP, columns), jnp.uint8), plgpu.SMEM((2, 2, columns), jnp.float32), came
    )


# ---- layout -----------------------------------------------------------------------------------


def _rows(array):
    """[..., I] -> [N, I], padded with zeros to whole tiles; the same memory if none are needed."""
    flat = array.reshape(-1, array.shape[-1])
    return jnp.pad(flat, ((0, -flat.shape[0] % TOKENS), (0, 0)))


def _words(words):
    """[...] -> [N]."""
    return _rows(words[..., None])[:, 0]


def _brought_back(rows, like):
    """[N, O] -> [..., O]."""
    return rows[: like.size // like.shape[-1]].reshape(*like.shape[:-1], -1)


def _padded(factors):
    """Factors with ranks padded to multiples of 64."""
    return [
        None if factor is None else Factors(_wide(factor.a, 1), _wide(factor.b, 0))
        for factor in factors
    ]


def _wide(array, axis):
    pads = [(0, 0), (0, 0)]
    pads[axis] = 0, -array.shape[axis] % STEP
    return jnp.pad(array, pads)


def _cut(gradient, factor):
    if factor is None:
        return None
    rank = factor.a.shape[1]
    return Factors(gradient.a[:, :rank], gradient.b[:rank])
