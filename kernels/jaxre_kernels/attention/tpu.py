"""Not yet run on a TPU: unverified. `tools/hardware_check --only attention` confirms it.

Packed-sequence attention for TPUs (Pallas Mosaic), forward and backward. Tested in Pallas's
interpreters and compiled ahead of time for v5e, v5p and v6e. Every statement about speed is
arithmetic.

Formulas: derived in `gpu_vjp.py`. dO~ and r are computed once, outside of the kernels; one kernel
sums dQ over blocks of keys, one dK and dV over those of queries. With the mean of the
queries' own block of keys subtracted in dQ, its distance to f32 is half that of the XLA
implementation for keys of noise + 4.

Block pairs. The grid of a kernel is (groups of key heads, block pairs): step s works on pair s of a
list of exactly the pairs with a visible token pair (`pairs.py`). Its length is a number on the
device, computed from `visible_until`. A static grid that skips would still spend an idle step on
each of the other N x N pairs: 4,096 for a row of 8,192 tokens in blocks of 128, of which 150-token
examples need about 140. Rows are concatenated on one axis of tokens, so one number in the list
names a row and a place in it. The lists depend on `visible_until` alone, so a scan over layers can
compute them once.

Layout. Letters: B rows, T tokens, H query heads, K key heads, G = H/K, C channels, S = B x T padded
to blocks, U tokens of a block, M = G x U queries of a step and key head. All query heads of a key
head share its block of keys, which is read once and never repeated. Arrays are [H, C, S], tokens
along the 128 lanes: with channels there, heads of 64 would leave half of each tile empty, in HBM
too, and m, l and r of the queries would be columns [M, 1] that are stored as [M, 128]; here they
are rows [1, M]. Channels are padded to 16 only, the sublanes of a tile of bf16.

dtypes: q, k, v, dO and results in bf16 or f32; scores, softmax, sums, m, l and r in f32; weights
and dS are rounded to q's dtype for their products, as in `blockwise.py`.

Memory: saves 8 bytes a query and head, and O, which the caller has anyway. No [T, T] array exists:
the scores of 9 heads and one row of 8,192 tokens would be 2.4 GB in f32.

Roofline, of one block pair and key head, w bytes a number, besides M x U exponentials each:

              FLOPs                            bytes read            FLOP a byte, bf16
    forward   4 M U C   (S, O)                 2 U C w               M
    dQ        6 M U C   (S, dP, dQ)            2 U C w               1.5 M
    dK, dV    8 M U C   (S, dP, dK, dV)        2 M C w + 8 M         2 U

The matrix unit is the bound from 240 (v5e), 166 (v5p) and 560 (v6e) FLOP a byte on, by the
datasheets: with G = 3 and blocks of 256 that holds for all but dK/dV on v6e. A step of a grid costs
about 0.35 us whatever it does (Pallas's documentation); nine heads of 64 channels at 128 x 128
tokens are 38 MFLOP forward, 0.4 us on a v5e whose matrix unit is half used at 64 channels. So all
heads that fit share a step, and blocks are larger where examples may be long.

Sharding: like every Pallas TPU kernel it runs inside `shard_map(..., check_vma=False)`, rows or
heads split, not under automatic partitioning.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from jaxre_kernels.attention.pairs import Pairs, Reach, listed, meeting, reach_of
from jaxre_kernels.attention.tpu_kernels import dkv_kernel, dq_kernel, forward_kernel
from jaxre_kernels.mosaic_tpu import LANES, VMEM_LIMIT

CHANNEL_MULTIPLE = 16  # sublanes of a tile of bf16
STEP_QUERIES = 2304  # queries of a step times heads: 9 heads and blocks of 256
SMEM_LIMIT = 2**19  # bytes, of 2**20


class Tiling(NamedTuple):
    """Static choices of a call: tokens of a block, key heads of a step, reach of the rows, whether
    Pallas interprets.
    """

    block: int
    kv_heads: int
    reach: Reach
    interpret: Any


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_until: jax.Array,
    visible_from: jax.Array | None = None,
    *,
    prefix: int = 0,
    span: int | None = None,
    block: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Softmax attention in which token i sees token j exactly when `visible_from[j] <= i <
    visible_until[j]`.

    Args:
      q: [B, T, H, C] bf16 or f32; k, v: [B, T, K, C] of q's dtype.
      visible_until: [B, T] int32. Every token sees itself; a pad token nothing else.
      visible_from: [B, T] int32, the first token of j's segment, for segments that are seen both
        ways; None: j, causal.
      prefix, span: every visible pair (i, j) has |i - j| < span or j < prefix; a span of None is
        unbounded.
      block: tokens of a block, a multiple of 128 on a TPU; chosen from the shape by default.
      interpret: argument of `pl.pallas_call`: True or `pltpu.InterpretParams` to run without a TPU.

    Returns:
      [B, T, H, C] of q's dtype.

    Raises:
      ValueError: what `unsupported` says.
    """
    B, T, H, C = q.shape
    K = k.shape[2]
    refusal = unsupported(T, prefix, span, B, H, K, C, q.dtype)
    if refusal is not None:
        raise ValueError(f"packed attention for TPUs does not run here: {refusal}")
    block = block or block_of(T, span, H // K)
    causal = visible_from is None
    first = jnp.broadcast_to(jnp.arange(T), (B, T)) if causal else visible_from
    tiling = Tiling(
        block,
        _kv_heads_of_a_step(K, H // K, block),
        reach_of(T, block, prefix, span, causal=causal),
        interpret,
    )
    return _attention(q, k, v, jnp.stack([first, visible_until]).astype(jnp.int32), tiling)


def block_of(length: int, span: int | None = None, group: int = 1) -> int:
    """Tokens of a block. Small where examples are short, so that most blocks without a visible pair
    are skipped; not measured on a TPU.
    """
    if length <= 1024 or (span is not None and span <= 512) or group * 256 > STEP_QUERIES:
        return 128
    return 256


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
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
        return f"it takes float32 and bfloat16, not {dtype.name}"
    if heads % kv_heads:
        return f"{heads} query heads are no multiple of {kv_heads} key heads"
    group = heads // kv_heads
    block = block_of(length, span, group)
    lists = rows * reach_of(length, block, prefix, span).bound(-(-length // block)) * 2 * 4
    if lists > SMEM_LIMIT:
        return (
            f"the lists of block pairs of {rows:,} rows of {length:,} need {lists:,} bytes of"
            f" scalar memory, of {SMEM_LIMIT:,}"
        )
    step = _vmem_bytes(block, _kv_heads_of_a_step(kv_heads, group, block), group, channels, dtype)
    if step > VMEM_LIMIT:
        return (
            f"a step over {group} query heads of {channels} channels needs {step:,} bytes of vector"
            f" memory, of {VMEM_LIMIT:,}"
        )
    return None


def _kv_heads_of_a_step(kv_heads: int, group: int, block: int) -> int:
    fitting = [
        n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * group * block <= STEP_QUERIES
    ]
    return max(fitting, default=1)


def _vmem_bytes(block: int, kv_heads: int, group: int, channels: int, dtype: jnp.dtype) -> int:
    """Approximate bytes that a step of the dK/dV kernel holds; it is the largest of the three."""
    channels = channels + -channels % CHANNEL_MULTIPLE
    # Inputs and outputs have two buffers: q and dO, k and v and their gradients, statistics, mean
    # and bounds in tiles of 8.
    buffers = (
        2 * kv_heads * block * ((2 * group + 4) * channels * dtype.itemsize + group * 2 * 8 * 4)
        + 2 * 8 * block * 4
    )
    sums = 2 * kv_heads * block * max(channels, LANES) * 4
    # scores, weights, their gradients and the mask, of one key head
    scores = 6 * group * block * block * 4
    return buffers + sums + scores


# ---- calls ------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, bounds, tiling):
    return _forward(q, k, v, bounds, tiling)[0]


def _forward(q, k, v, bounds, tiling):
    laid = [_lay(array, tiling.block) for array in (q, k, v)]
    bounds = _lay_bounds(bounds, tiling.block)
    call = _Call(q.shape[2] // k.shape[2], laid[0].shape, tiling, q.shape[3] ** -0.5)
    out, statistics = call.run(
        "attention_forward",
        forward_kernel,
        _pairs(bounds, tiling),
        (*laid, _joined(bounds)),
        [
            call.queries(own=True),
            call.keys(own=False),
            call.keys(own=False),
            call.bounds(own=False),
        ],
        (call.like_queries(q.dtype), call.like_statistics(2)),
        [call.queries(own=True), call.statistics(2, own=True)],
        [call.query_sums(), call.query_numbers(), call.query_numbers()],
    )
    out = _brought_back(out, q)
    return out, (q, k, v, bounds, out, statistics)


def _backward(tiling, residuals, dout):
    q, k, v, bounds, out, statistics = residuals
    count = _brought_back(statistics[:, 1:], q[..., :1])  # B T H 1
    dsums = (dout.astype(jnp.float32) / count).astype(q.dtype)
    # From the rounded dO~, as in the kernels, so that what cancels in dS cancels here too.
    mean = (dsums.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    statistics = jnp.concatenate([statistics, _lay(mean, tiling.block, multiple=1)], axis=1)
    laid = [_lay(array, tiling.block) for array in (q, k, v, dsums)]
    arrays = (*laid[:3], _joined(bounds), laid[3], statistics)
    call = _Call(q.shape[2] // k.shape[2], laid[0].shape, tiling, q.shape[3] ** -0.5)

    def specs(own):
        """Block specs of the arrays, for a list whose own blocks are of queries, or of keys."""
        keys = call.keys(not own)
        return [
            call.queries(own),
            keys,
            keys,
            call.bounds(not own),
            call.queries(own),
            call.statistics(3, own),
        ]

    dq, mean = call.run(
        "attention_dq",
        dq_kernel,
        _pairs(bounds, tiling),
        arrays,
        specs(own=True),
        (call.like_queries(q.dtype), call.like_statistics(1)),
        [call.queries(own=True), call.statistics(1, own=True)],
        [call.query_sums(), call.query_numbers(), call.query_numbers(), call.key_middle()],
    )
    dk, dv = call.run(
        "attention_dkv",
        dkv_kernel,
        _pairs(bounds, tiling, transposed=True),
        (*arrays, mean),
        [*specs(own=False), call.statistics(1, own=False)],
        (call.like_keys(k.dtype),) * 2,
        [call.keys(own=True)] * 2,
        [call.key_sums()] * 2,
    )
    return _brought_back(dq, q), _brought_back(dk, k), _brought_back(dv, v), None


_attention.defvjp(_forward, _backward)


class _Call(NamedTuple):
    """Shapes and blocks of a kernel call. `own` arrays move with the blocks of the result, the
    others with the blocks that these meet.
    """

    group: int
    shape: tuple[int, int, int]  # H C S of the queries, laid out
    tiling: Tiling
    scale: float

    def run(
        self, name, kernel, pairs: Pairs, arrays, in_specs, out_shape, out_specs, scratch_shapes
    ):
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(pairs),
            grid=(self.shape[0] // (self.group * self.tiling.kv_heads), pairs.total[0]),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch_shapes,
        )
        # The steps of a block are summed in order; groups of heads may run in any order.
        params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        )
        return pl.pallas_call(
            partial(kernel, group=self.group, scale=self.scale),
            out_shape=out_shape,
            grid_spec=spec,
            compiler_params=params,
            interpret=self.tiling.interpret,
            name=name,
        )(*pairs, *arrays)

    def queries(self, own):
        return self._spec(self.group * self.tiling.kv_heads, self.shape[1], own)

    def keys(self, own):
        return self._spec(self.tiling.kv_heads, self.shape[1], own)

    def statistics(self, rows, own):
        return self._spec(self.group * self.tiling.kv_heads, rows, own)

    def bounds(self, own):
        return pl.BlockSpec(
            (8, self.tiling.block),
            lambda heads, step, mine, other, total: (0, (mine if own else other)[step]),
        )

    def _spec(self, heads, rows, own):
        shape = (heads, rows, self.tiling.block)
        return pl.BlockSpec(
            shape,
            lambda heads, step, mine, other, total: (heads, 0, (mine if own else other)[step]),
        )

    def like_queries(self, dtype):
        return jax.ShapeDtypeStruct(self.shape, dtype)

    def like_keys(self, dtype):
        return jax.ShapeDtypeStruct((self.shape[0] // self.group, *self.shape[1:]), dtype)

    def like_statistics(self, rows):
        return jax.ShapeDtypeStruct((self.shape[0], rows, self.shape[2]), jnp.float32)

    def query_sums(self):
        return self._scratch(self.shape[1], self.group * self.tiling.block)

    def query_numbers(self):
        return self._scratch(1, self.group * self.tiling.block)

    def key_sums(self):
        return self._scratch(self.tiling.block, self.shape[1])

    def key_middle(self):
        return self._scratch(self.shape[1], 1)

    def _scratch(self, *shape):
        return pltpu.VMEM((self.tiling.kv_heads, *shape), jnp.float32)


def _pairs(bounds, tiling, transposed=False) -> Pairs:
    meets = meeting(*bounds, tiling.block, tiling.reach)
    return listed(meets.swapaxes(1, 2) if transposed else meets, tiling.reach)


# ---- layout -----------------------------------------------------------------------------------


def _lay(array, block, multiple=CHANNEL_MULTIPLE):
    """[B, T, H, C] -> [H, C, S], zeros behind each row and behind the channels."""
    _, T, H, C = array.shape
    padded = jnp.pad(array, ((0, 0), (0, -T % block), (0, 0), (0, -C % multiple)))
    return padded.transpose(2, 3, 0, 1).reshape(H, padded.shape[3], -1)


def _brought_back(array, like):
    """[H, C, S] -> [B, T, H, C], the shape of `like`."""
    B, T, H, C = like.shape
    return array.reshape(H, array.shape[1], B, -1)[:, :C, :, :T].transpose(2, 3, 0, 1)


def _lay_bounds(bounds, block):
    """[2, B, T] -> [2, B, N x block]; behind the row a token sees itself."""
    _, B, T = bounds.shape
    behind = jnp.broadcast_to(jnp.arange(T, T + -T % block), (B, -T % block))
    return jnp.concatenate([bounds, jnp.stack([behind, behind + 1])], axis=2)


def _joined(bounds):
    """[2, B, N x block] -> [8, S], the rows concatenated; eight sublanes, as a tile has."""
    rows = jnp.arange(bounds.shape[1], dtype=jnp.int32)[:, None]
    return jnp.pad((bounds + rows * bounds.shape[2]).reshape(2, -1), ((0, 6), (0, 0)))
