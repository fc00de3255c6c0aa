"""Not yet run on a GPU: unverified. `tools/hardware_check --only attention` confirms it.

Shared parts of packed attention for GPUs: the formulas, the choice of block pairs, the layout of
arrays, the custom VJP.

Formulas. Query i sees key j exactly when visible_from[j] <= i < visible_until[j]. Causal rows have
visible_from[j] = j; isolated segments that are seen both ways (encoders) have the start of j's
segment. Forward (Dao et al. 2022, algorithm 1), block of keys by block of keys, s = C**-0.5:

    S = s Q K',    m = max S,    E = exp(S - m),    l = rowsum E,    O = E V / l

Saved for backward: q, k, v, O, and m and l in f32. m and l stay apart: m + log l is rounded as a
score is, which doubled the f32 error of gradients in a network with large scores (`blockwise.py`).
With P = E / l and dO~ = dO / l:

    dV = P' dO = E' dO~,    dP = dO V',    dS = P (dP - rowsum(P dP)) = E (dO~ V' - r),
        dQ = s dS K,    dK = s dS' Q
    r = rowsum(P dP) / l = rowsum(dO~ O),
        because rowsum(P (dO V')) = rowsum(dO (P V)) = rowsum(dO O)

dO~ and r are computed once, outside of the kernels; one kernel sums dQ over blocks of keys, one dK
and dV over those of queries and over the query heads of a key head. Each block of a result is
summed by one thread block, in a fixed order: no atomic additions, the same bits each time. The r of
a bf16 O carries its rounding. A row of dS should sum to zero, so its actual sum in the first kernel
corrects r for the second. For the same reason any one key c may be subtracted from all keys in
dQ = s dS (K - c): with the mean of the queries' own block for c, rounding dS to bf16 does no harm
through the part that keys have in common.

Block pairs. A thread block walks over a list of exactly the blocks that hold a visible token pair
with its own (`pairs.py`), so cost follows visible pairs. Lists and their lengths are arrays on the
device; they depend on `visible_until` alone, so a scan over layers can compute them once. Blocks
have 64 tokens, the least that a product of a warpgroup takes: of 150-token examples 8,192 tokens
need about 3.3 blocks a block of queries; blocks of 128 would need 2.2 that are four times as large.

Letters: B rows, T tokens, H query heads, K key heads, G = H/K, C channels, S = T padded to blocks,
N = S/U, U = 64 tokens of a block. Where T is a multiple of 64 and C is 64 or 128 nothing is copied
or padded; other widths up to 128 are padded with zeros, which change no score.

dtypes: q, k, v, dO and results in bf16; scores, softmax, sums, m, l and r in f32; weights and dS
are rounded to bf16 for their products, as in `blockwise.py`. f32 is refused: the tensor cores would
round it to 10 bits.

Memory: saves 8 bytes a query and head, and O, which the caller has anyway. No [T, T] array of a
head exists; the lists take 4 N bytes a block, 64 KiB for a row of 8,192 tokens.

Sharding: inside `shard_map(..., check_vma=False)`, rows or heads split, not under automatic
partitioning.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from jaxre_kernels.attention.pairs import Reach, meeting, reach_of
from jaxre_kernels.mosaic_gpu import MISSING, shared_tile

BLOCK = 64  # tokens: the rows of a product of a warpgroup
CHANNELS = (64, 128)
GRID_LIMIT = 65535  # thread blocks along any but the fastest axis of a grid


class Kernels(NamedTuple):
    """The three kernel calls of an implementation; `others` lists the U-blocks that meet: [B x N,
    N], and `total` [B x N] int32 counts them.

    forward(call, q, k, v, bounds, others, total) -> O, statistics (m, l) [2, B, H, S] f32
    dq(call, q, k, v, bounds, dO~, statistics (m, r), middles [B, N, K, C] f32, others, total)
        -> dQ, slack [B, H, S] f32
    dkv(call, q, k, v, bounds, dO~, statistics (m, r), others, total) -> dK, dV
    """

    forward: Callable
    dq: Callable
    dkv: Callable


class Call(NamedTuple):
    """Static choices of a call: kernels, tokens of a block, reach of the rows, factor of scores,
    whether Pallas interprets.
    """

    kernels: Kernels
    block: int
    reach: Reach
    scale: float
    interpret: Any

    def run(self, name, kernel, arrays, out_type, scratch, q, k, heads):
        """Runs a kernel. Heads vary fastest: thread blocks that share keys run at the same time and
        find them in the L2 cache.
        """
        return plgpu.kernel(
            partial(
                kernel,
                group=q.shape[2] // k.shape[2],
                scale=self.scale,
                interpreted=bool(self.interpret),
            ),
            out_type=out_type,
            scratch_types=scratch,
            grid=(q.shape[0] * q.shape[1] // self.block, heads),
            grid_names=("blocks", "heads"),
            # No sum or maximum spans the rows of several warps, so none needs shared memory.
            compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
            interpret=self.interpret,
            kernel_name=name,
        )(*arrays)

    def tile(self, *shape, like):
        """[..., tokens, C] in shared memory, laid out for products; untransformed for Pallas's
        interpreter, whose blocks are smaller.
        """
        shape = (*shape, like.shape[3])
        if self.interpret:
            return plgpu.SMEM(shape, like.dtype)
        return shared_tile(shape, like.dtype)


def like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def statistics_of(q: jax.Array) -> jax.ShapeDtypeStruct:
    B, S, H, _ = q.shape
    return jax.ShapeDtypeStruct((2, B, H, S), jnp.float32)


def attend(
    kernels: Kernels,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_until: jax.Array,
    visible_from: jax.Array | None = None,
    *,
    prefix: int = 0,
    span: int | None = None,
    block: int = BLOCK,
    interpret: Any = None,
) -> jax.Array:
    """Softmax attention in which token i sees token j exactly when `visible_from[j] <= i <
    visible_until[j]`.

    Args:
      kernels: of the kind of GPU; `packed_attention` of `gpu.py` and of `gpu_sm80.py` bind theirs.
      q: [B, T, H, C] bf16; k, v: [B, T, K, C] of q's dtype.
      visible_until: [B, T] int32. Every token sees itself; a pad token nothing else.
      visible_from: [B, T] int32, the first token of j's segment, for segments that are seen both
        ways; None: j, causal.
      prefix, span: every visible pair (i, j) has |i - j| < span or j < prefix; a span of None is
        unbounded.
      block: tokens of a block; must be 64 on a GPU.
      interpret: argument of `plgpu.kernel`: `plgpu.InterpretGPUParams` to run without a GPU, in f32
        too.

    Returns:
      [B, T, H, C] of q's dtype.

    Raises:
      ValueError: what `unsupported` says.
    """
    B, T, H, C = q.shape
    refusal = unsupported(
        T, prefix, span, B, H, k.shape[2], C, jnp.bfloat16 if interpret else q.dtype
    )
    if refusal is not None:
        raise ValueError(f"packed attention for GPUs does not run here: {refusal}")
    causal = visible_from is None
    first = jnp.broadcast_to(jnp.arange(T), (B, T)) if causal else visible_from
    call = Call(kernels, block, reach_of(T, block, prefix, span, causal=causal), C**-0.5, interpret)
    return _attention(q, k, v, jnp.stack([first, visible_until]).astype(jnp.int32), call)


def block_of(length: int, span: int | None = None, group: int = 1) -> int:
    """Tokens of a block, the same for every shape."""
    return BLOCK


def unsupported(
    length: int,
    prefix: int,
    span: int | None,
    rows: int,
    heads: int,
    kv_heads: int,
    channels: int,
    dtype: DTypeLike,
) -> str | None:
    """Why `packed_attention` does not support such arrays, in words; None if it does."""
    if MISSING is not None:
        return MISSING
    dtype = jnp.dtype(dtype)
    if dtype != jnp.dtype(jnp.bfloat16):
        return f"it takes bfloat16, not {dtype.name}"
    if heads % kv_heads:
        return f"{heads} query heads are no multiple of {kv_heads} key heads"
    if channels > CHANNELS[-1]:
        return f"it takes heads of at most {CHANNELS[-1]} channels, not {channels}"
    blocks = rows * -(-length // BLOCK)
    if blocks > GRID_LIMIT:
        return (
            f"{rows:,} rows of {length:,} are {blocks:,} blocks of {BLOCK} tokens, more than the"
            f" {GRID_LIMIT:,} of a grid"
        )
    return None


# ---- forward and backward ---------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, bounds, call):
    return _forward(q, k, v, bounds, call)[0]


def _forward(q, k, v, bounds, call):
    bounds = _lay_bounds(bounds, call.block)
    laid = (_lay(array, call.block) for array in (q, k, v))
    out, statistics = call.kernels.forward(call, *laid, bounds, *_lists(bounds, call))
    out = _brought_back(out, q)
    return out, (q, k, v, bounds, out, statistics)


def _backward(call, residuals, dout):
    q, k, v, bounds, out, statistics = residuals
    highest, count = statistics
    dsums = (dout.astype(jnp.float32) / _per_query(count, q)).astype(q.dtype)
    # From the rounded dO~, as in the kernels, so that what cancels in dS cancels here too.
    mean = (dsums.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    mean = _lay(mean, call.block, multiples=(1,))[..., 0].swapaxes(1, 2)  # B H S
    *laid, dsums = (_lay(array, call.block) for array in (q, k, v, dsums))
    statistics = jnp.stack([highest, mean])
    dq, slack = call.kernels.dq(
        call, *laid, bounds, dsums, statistics, _middles(laid[1], call.block), *_lists(bounds, call)
    )
    statistics = jnp.stack([highest, mean + slack / count])
    dk, dv = call.kernels.dkv(
        call, *laid, bounds, dsums, statistics, *_lists(bounds, call, transposed=True)
    )
    return _brought_back(dq, q), _brought_back(dk, k), _brought_back(dv, v), None


_attention.defvjp(_forward, _backward)


def _middles(k, block):
    """[B, S, K, C] -> [B, N, K, C] f32: the mean of the keys of a block."""
    B, S, K, C = k.shape
    return k.reshape(B, S // block, block, K, C).mean(2, dtype=jnp.float32)


def _lists(bounds, call, transposed=False):
    """`others` [B x N, N] and `total` [B x N]: the blocks of keys that a block of queries meets;
    transposed, the blocks of queries of a block of keys.
    """
    meets = meeting(*bounds, call.block, call.reach)  # B N N
    meets = (meets.swapaxes(1, 2) if transposed else meets).reshape(-1, meets.shape[2])
    number = jnp.arange(meets.shape[1], dtype=jnp.int32)
    return jnp.sort(jnp.where(meets, number, meets.shape[1]), axis=1), meets.sum(1, dtype=jnp.int32)


# ---- layout -----------------------------------------------------------------------------------


def _lay(array, block, multiples=CHANNELS):
    """[B, T, H, C] with zeros behind each row and behind the channels; the array itself if it needs
    no padding.
    """
    _, T, _, C = array.shape
    wide = min(width for width in multiples if width >= C)
    if T % block == 0 and wide == C:
        return array
    return jnp.pad(array, ((0, 0), (0, -T % block), (0, 0), (0, wide - C)))


def _brought_back(array, like):
    _, T, _, C = like.shape
    return array[:, :T, :, :C]


def _per_query(statistics, like):
    """[B, H, S] -> [B, T, H, 1]."""
    return statistics.swapaxes(1, 2)[:, : like.shape[1], :, None]


def _lay_bounds(bounds, block):
    """[2, B, T] -> [2, B, S]; behind the row a token sees itself."""
    _, B, T = bounds.shape
    behind = jnp.broadcast_to(jnp.arange(T, T + -T % block, dtype=jnp.int32), (B, -T % block))
    return jnp.concatenate([bounds, jnp.stack([behind, behind + 1])], axis=2)
