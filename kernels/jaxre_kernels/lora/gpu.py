"""The LoRA projections of one input for Hopper GPUs (Pallas Mosaic GPU), forward and backward, dense or NF4."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxre_kernels.lora.gpu_kernels import Packed, Ring, backward_kernel, forward_kernel
from jaxre_kernels.lora.group import Factors, Projections, dlow_of, factor_gradients, joined_a, low_of, projections_of
from jaxre_kernels.nf4 import NF4Tiles, NF4Weight, tiled

MISSING = None if jax.__version_info__ >= (0, 11) else f"it needs jax 0.11 or later, this is {jax.__version__}"

STEP = 64  # channels of a step of a sum, what a rank is padded to, and the rows of a half of NF4
TOKENS = 256  # of a tile: two warpgroups of 128
WIDTHS = (128, 64)  # channels of a tile
CHUNK = 32  # channels of it that are written at a time
SLOTS = {False: 4, True: 3}  # steps on the way, by whether a weight is NF4: then codes need room too


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
    """x W + scale (dropout(x) A) B of every projection of one input on one device; differentiable in x and the factors.

    Args: as of `lora_group`; x is bf16.
      interpret: what `plgpu.kernel` takes: `plgpu.InterpretGPUParams` to run without a GPU. It takes f32, too.

    Raises:
      ValueError: what `unsupported` says.
    """
    projections = projections_of(x, weights, factors)
    refusal = unsupported(projections._replace(dtype=jnp.bfloat16) if interpret else projections)
    if refusal is not None:
        raise ValueError(f"LoRA for GPUs does not run here: {refusal}")
    return _op(x, weights, factors, words, scale, rate, interpret)


def unsupported(projections: Projections) -> str | None:
    """Why `pallas_lora_group` does not take such projections, in words; None if it does."""
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
        return f"ranks of {' and '.join(map(str, projections.ranks))}, each padded to {STEP}, are more than {slots * STEP} together"
    return None


def told(projections: Projections) -> str:
    """How it runs, in words; for projections that it takes."""
    forward, backward = _width(*projections.outputs), _width(projections.inputs)
    return f"tiles of {TOKENS} tokens and {forward} outputs forwards, {backward} inputs backwards"


def _width(*widths: int) -> int:
    """Of a tile."""
    return next(tile for tile in WIDTHS if all(width % tile == 0 for width in widths))


# ---- calls ------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _op(x, weights, factors, words, scale, rate, interpret):
    return _forward(x, weights, factors, words, scale, rate, interpret)[0]


def _forward(x, weights, factors, words, scale, rate, interpret):
    trained, padded = any(factor is not None for factor in factors), _padded(factors)
    low = low_of(x, padded, words, scale, rate) if trained else None
    outputs = projections_of(x, weights, factors).outputs
    width, laid = _width(*outputs), _laid(weights)
    rows = _rows(x)
    ys = _run(
        "lora_forward",
        forward_kernel,
        (rows, None if low is None else _rows(low), laid, [None if factor is None else factor.b.astype(x.dtype) for factor in padded]),
        [jax.ShapeDtypeStruct((rows.shape[0], width), x.dtype) for width in outputs],
        sum(outputs) // width,
        (STEP, width),
        width,
        interpret,
    )
    ys = [_brought_back(y, x) for y in ys]
    return ys, (x if trained else None, weights, factors, words, low)


def _backward(scale, rate, interpret, kept, dys):
    x, weights, factors, words, low = kept
    padded, laid, rows = _padded(factors), _laid(weights), [_rows(dy) for dy in dys]
    dlow = a = None
    if low is not None:
        dlow, a = dlow_of(dys, padded, scale, rate), joined_a(padded, x.dtype)
    inputs = _inputs(laid[0])
    masked = low is not None and rate
    (dx,) = _run(
        "lora_backward",
        partial(backward_kernel, rate=rate),
        (rows, None if low is None else _rows(dlow), a, _rows(words[..., None])[:, 0] if masked else None, laid),
        [jax.ShapeDtypeStruct((rows[0].shape[0], inputs), dys[0].dtype)],
        inputs // _width(inputs),
        (_width(inputs), STEP),
        STEP,
        interpret,
    )
    dx = _brought_back(dx, dys[0])
    if low is None:
        return dx, None, None, None
    gradients = factor_gradients(x, low, dlow, dys, padded, words, rate)
    return dx, None, [_cut(gradient, factor) for gradient, factor in zip(gradients, factors, strict=True)], None


_op.defvjp(_forward, _backward)


def _run(name, kernel, arrays, out_type, columns, rhs, packed, interpret):
    """A kernel over all tiles of 256 tokens and `columns` of channels. `rhs`: the shape of a step of weights; `packed`: columns of a tile
    of codes."""
    dtype, tokens = out_type[0].dtype, out_type[0].shape[0]
    nf4 = any(isinstance(leaf, NF4Tiles) for leaf in jax.tree.leaves(arrays, is_leaf=lambda leaf: isinstance(leaf, NF4Tiles)))
    slots = SLOTS[nf4]

    def tiles(swizzle, *shape):
        """In shared memory as products read it: rows of `swizzle` bytes."""
        return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle)))

    ring = Ring(
        tiles(128, slots, TOKENS, STEP),
        tiles(128, slots, *rhs),
        plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        plgpu.Barrier(num_arrivals=2, num_barriers=slots),
    )
    codes = Packed(
        plgpu.SMEM((2, STEP, packed), jnp.uint8),
        plgpu.SMEM((2, 2, packed), jnp.float32),
        plgpu.Barrier(num_arrivals=2, num_barriers=2),
    )
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types={"ring": ring, "staged": tiles(64, 2, 2, TOKENS // 2, CHUNK), "packed": codes if nf4 else None},
        grid=(tokens // TOKENS * columns,),
        grid_names=("tiles",),
        num_threads=3,
        thread_name="warpgroup",
        interpret=interpret,
        kernel_name=name,
    )(*arrays)


# ---- layout -----------------------------------------------------------------------------------


def _rows(array):
    """[..., I] -> [N, I], with zeros behind up to whole tiles; the same memory where there are none."""
    flat = array.reshape(-1, array.shape[-1])
    return jnp.pad(flat, ((0, -flat.shape[0] % TOKENS), (0, 0)))


def _brought_back(rows, like):
    """[N, O] -> [..., O]."""
    return rows[: like.size // like.shape[-1]].reshape(*like.shape[:-1], -1)


def _laid(weights):
    return [tiled(weight, STEP) if isinstance(weight, NF4Weight | NF4Tiles) else weight for weight in weights]


def _inputs(weight):
    return 2 * weight.codes.shape[0] if isinstance(weight, NF4Tiles) else weight.shape[0]


def _padded(factors):
    """With ranks that are multiples of 64."""
    return [None if factor is None else Factors(_wide(factor.a, 1), _wide(factor.b, 0)) for factor in factors]


def _wide(array, axis):
    pads = [(0, 0), (0, 0)]
    pads[axis] = 0, -array.shape[axis] % STEP
    return jnp.pad(array, pads)


def _cut(gradient, factor):
    if factor is None:
        return None
    rank = factor.a.shape[1]
    return Factors(gradient.a[:, :rank], gradient.b[:rank])
