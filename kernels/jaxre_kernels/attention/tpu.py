"""Packed-sequence attention for TPUs (Pallas Mosaic), forward and backward. unverified: has not run on a TPU
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxre_kernels.attention.pairs import Pairs, Reach, listed, meeting, reach_of

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # added to a score, it stays finite
CHANNEL_MULTIPLE = 16  # sublanes of a tile of bf16
LANES = 128
STEP_QUERIES = 2304  # query rows of a step, over all its heads
VMEM_LIMIT = 48 * 2**20


class Tiling(NamedTuple):
    """Static choices of a call: tokens of a block, key heads of a step, what is known of the rows, Pallas's interpreter or not."""

    block: int
    kv_heads: int
    reach: Reach
    interpret: Any = False


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
    """Softmax attention in which token i sees token j exactly when `visible_from[j] <= i < visible_until[j]`."""
    B, T, H, C = q.shape
    K = k.shape[2]
    block = block or block_of(T, span)
    causal = visible_from is None
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    reach = reach_of(T, block, prefix, span, causal=causal)
    tiling = Tiling(block, _kv_heads_of_a_step(K, H // K, block), reach, interpret)
    bounds = jnp.stack([index if causal else visible_from, visible_until])  # 2 B T
    return _attention(q, k, v, bounds.astype(jnp.int32), tiling)


def block_of(length: int, span: int | None = None) -> int:
    short = length <= 1024 or (span is not None and span <= 512)
    return 128 if short else 256


def _kv_heads_of_a_step(kv_heads: int, group: int, block: int) -> int:
    fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n * group * block <= STEP_QUERIES]
    return max(fitting, default=1)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q, k, v, bounds, tiling):
    return _forward(q, k, v, bounds, tiling)[0]


def _forward(q, k, v, bounds, tiling):
    laid, pairs = _lay_out(q, k, v, bounds, tiling)
    H, C, S = laid.q.shape
    heads = tiling.kv_heads
    G = H // k.shape[2]
    M = G * tiling.block
    specs = _Specs(G, C, tiling)
    call = pl.pallas_call(
        partial(_forward_kernel, G=G, scale=q.shape[-1] ** -0.5),
        out_shape=(jax.ShapeDtypeStruct((H, C, S), q.dtype), jax.ShapeDtypeStruct((H, 2, S), jnp.float32)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(k.shape[2] // heads, pairs.total[0]),
            in_specs=[specs.queries(own=True), specs.keys(own=False), specs.keys(own=False), specs.bounds(own=False)],
            out_specs=[specs.queries(own=True), specs.statistics(own=True)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in ((heads, C, M), (heads, 1, M), (heads, 1, M))],
        ),
        **_compiler(tiling, "attention_forward"),
    )
    out, statistics = call(*pairs, laid.q, laid.k, laid.v, laid.bounds)
    out = _bring_back(out, q)
    return out, (q, k, v, bounds, out, statistics)


def _backward(tiling, kept, dout):
    q, k, v, bounds, out, statistics = kept
    laid, pairs = _lay_out(q, k, v, bounds, tiling)
    total = _lay_back(statistics[:, 1], q)  # B T H
    dsums = dout.astype(jnp.float32) / total[..., None]
    mean = (dsums * out.astype(jnp.float32)).sum(-1)  # B T H
    dsums = _lay(dsums.astype(q.dtype), tiling)
    statistics = statistics.at[:, 1].set(_lay(mean[..., None], tiling, channels=1)[:, 0])
    H, C, S = laid.q.shape
    K, heads = k.shape[2], tiling.kv_heads
    G = H // K
    M = G * tiling.block
    specs = _Specs(G, C, tiling)
    kernel = dict(G=G, scale=q.shape[-1] ** -0.5)

    dq = pl.pallas_call(
        partial(_dq_kernel, **kernel),
        out_shape=jax.ShapeDtypeStruct((H, C, S), q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(K // heads, pairs.total[0]),
            in_specs=[
                specs.queries(own=True),
                specs.keys(own=False),
                specs.keys(own=False),
                specs.bounds(own=False),
                specs.queries(own=True),
                specs.statistics(own=True),
            ],
            out_specs=specs.queries(own=True),
            scratch_shapes=[pltpu.VMEM((heads, C, M), jnp.float32)],
        ),
        **_compiler(tiling, "attention_dq"),
    )(*pairs, laid.q, laid.k, laid.v, laid.bounds, dsums, statistics)

    pairs = _pairs(laid.bounds, q.shape[0], tiling, transposed=True)
    dk, dv = pl.pallas_call(
        partial(_dkv_kernel, **kernel),
        out_shape=(jax.ShapeDtypeStruct((K, C, S), k.dtype), jax.ShapeDtypeStruct((K, C, S), v.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(K // heads, pairs.total[0]),
            in_specs=[
                specs.queries(own=False),
                specs.keys(own=True),
                specs.keys(own=True),
                specs.bounds(own=True),
                specs.queries(own=False),
                specs.statistics(own=False),
            ],
            out_specs=[specs.keys(own=True), specs.keys(own=True)],
            scratch_shapes=[pltpu.VMEM((heads, tiling.block, C), jnp.float32)] * 2,
        ),
        **_compiler(tiling, "attention_dkv"),
    )(*pairs, laid.q, laid.k, laid.v, laid.bounds, dsums, statistics)
    return _bring_back(dq, q), _bring_back(dk, k), _bring_back(dv, v), None


_attention.defvjp(_forward, _backward)


def _compiler(tiling, name):
    # The blocks of one result follow one another, so the steps have an order; heads have none.
    params = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)
    return {"compiler_params": params, "interpret": tiling.interpret, "name": name}


# ---- kernels ----


def _forward_kernel(own, other, total, q_ref, k_ref, v_ref, bounds_ref, out_ref, statistics_ref, sums, highest, count, *, G, scale):
    step = pl.program_id(1)
    heads = k_ref.shape[0]

    @pl.when(_is_first(own, step))
    def _():
        sums[...] = jnp.zeros_like(sums)
        highest[...] = jnp.full_like(highest, HIDDEN)
        count[...] = jnp.zeros_like(count)

    hidden = _hidden(bounds_ref, _first_token(own, step, bounds_ref), G)
    for head in range(heads):
        keys, values = k_ref[head], v_ref[head]  # C U
        queries = _grouped(q_ref, head, G)  # C M
        scores = _product(keys, queries, (0, 0)) * scale + hidden  # U M
        before = highest[head]  # 1 M
        now = jnp.maximum(before, scores.max(0, keepdims=True))
        shrink = jnp.exp(before - now)
        weights = jnp.exp(scores - now)
        highest[head] = now
        count[head] = count[head] * shrink + weights.sum(0, keepdims=True)
        sums[head] = sums[head] * shrink + _product(values, weights.astype(values.dtype), (1, 0))

    @pl.when(_is_last(own, total, step))
    def _():
        for head in range(heads):
            _store_grouped(out_ref, head, G, sums[head] / count[head])
            _store_grouped(statistics_ref, head, G, jnp.concatenate([highest[head], count[head]], axis=0))


def _dq_kernel(own, other, total, q_ref, k_ref, v_ref, bounds_ref, dsums_ref, statistics_ref, dq_ref, dq, *, G, scale):
    step = pl.program_id(1)

    @pl.when(_is_first(own, step))
    def _():
        dq[...] = jnp.zeros_like(dq)

    hidden = _hidden(bounds_ref, _first_token(own, step, bounds_ref), G)
    for head in range(k_ref.shape[0]):
        _, dscores, _, _ = _again(q_ref, k_ref, v_ref, dsums_ref, statistics_ref, hidden, head, G, scale)
        dq[head] += _product(k_ref[head], dscores, (1, 0))  # C M

    @pl.when(_is_last(own, total, step))
    def _():
        for head in range(k_ref.shape[0]):
            _store_grouped(dq_ref, head, G, dq[head])


def _dkv_kernel(own, other, total, q_ref, k_ref, v_ref, bounds_ref, dsums_ref, statistics_ref, dk_ref, dv_ref, dk, dv, *, G, scale):
    step = pl.program_id(1)

    @pl.when(_is_first(own, step))
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    hidden = _hidden(bounds_ref, _first_token(other, step, bounds_ref), G)
    for head in range(k_ref.shape[0]):
        weights, dscores, queries, dsums = _again(q_ref, k_ref, v_ref, dsums_ref, statistics_ref, hidden, head, G, scale)
        dk[head] += _product(dscores, queries, (1, 1))  # U C
        dv[head] += _product(weights, dsums, (1, 1))

    @pl.when(_is_last(own, total, step))
    def _():
        for head in range(k_ref.shape[0]):
            dk_ref[head] = dk[head].T.astype(dk_ref.dtype)
            dv_ref[head] = dv[head].T.astype(dv_ref.dtype)


def _again(q_ref, k_ref, v_ref, dsums_ref, statistics_ref, hidden, head, G, scale):
    """Weights [U, M] and gradients of scores [U, M] of a block pair and key head, and its queries and dsums [C, M]."""
    queries, dsums = _grouped(q_ref, head, G), _grouped(dsums_ref, head, G)
    statistics = _grouped(statistics_ref, head, G)  # 2 M
    highest, mean = statistics[:1], statistics[1:]
    scores = _product(k_ref[head], queries, (0, 0)) * scale + hidden
    weights = jnp.exp(scores - highest)
    dweights = _product(v_ref[head], dsums, (0, 0))
    dscores = weights * (dweights - mean) * scale
    return weights.astype(queries.dtype), dscores.astype(queries.dtype), queries, dsums


def _product(one, other, contracted):
    """f32 sums; f32 factors are not rounded to bf16, whatever the default of the matrix unit."""
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dims = (((contracted[0],), (contracted[1],)), ((), ()))
    return jax.lax.dot_general(one, other, dims, precision=precision, preferred_element_type=jnp.float32)


def _is_first(own, step):
    return (step == 0) | (own[jnp.maximum(step - 1, 0)] != own[step])


def _is_last(own, total, step):
    end = total[0] - 1
    return (step == end) | (own[jnp.minimum(step + 1, end)] != own[step])


def _first_token(blocks, step, bounds_ref):
    return blocks[step] * bounds_ref.shape[1]


def _hidden(bounds_ref, first, G):
    """[U, M] f32: zero where a query sees a key, else HIDDEN. `first` is the number of the first query."""
    block = bounds_ref.shape[1]
    columns = bounds_ref[...].T  # U 8: keys lie along sublanes, as in the scores
    query = first + jax.lax.broadcasted_iota(jnp.int32, (block, block), 1)
    hidden = jnp.where((columns[:, 0:1] <= query) & (query < columns[:, 1:2]), 0.0, HIDDEN)
    return jnp.concatenate([hidden] * G, axis=1)


def _grouped(ref, head, G):
    """[C, M] of a key head: its query heads side by side."""
    return jnp.concatenate([ref[head * G + g] for g in range(G)], axis=1)


def _store_grouped(ref, head, G, value):
    block = value.shape[1] // G
    for g in range(G):
        ref[head * G + g] = value[:, g * block : (g + 1) * block].astype(ref.dtype)


# ---- layout ----


class _Laid(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    bounds: jax.Array  # 8 S


class _Specs(NamedTuple):
    """Blocks of the arrays of a call, at the pair that a step stands for."""

    group: int
    channels: int
    tiling: Tiling

    def queries(self, own):
        return self._spec(self.group * self.tiling.kv_heads, self.channels, own)

    def keys(self, own):
        return self._spec(self.tiling.kv_heads, self.channels, own)

    def statistics(self, own):
        return self._spec(self.group * self.tiling.kv_heads, 2, own)

    def bounds(self, own):
        return pl.BlockSpec((8, self.tiling.block), lambda heads, step, mine, other, total: (0, (mine if own else other)[step]))

    def _spec(self, heads, rows, own):
        shape = (heads, rows, self.tiling.block)
        return pl.BlockSpec(shape, lambda heads, step, mine, other, total: (heads, 0, (mine if own else other)[step]))


def _lay_out(q, k, v, bounds, tiling):
    B, T = bounds.shape[1:]
    behind = -T % tiling.block
    # Behind the row a token sees itself.
    pads = jnp.broadcast_to(jnp.arange(T, T + behind, dtype=jnp.int32), (B, behind))
    bounds = jnp.concatenate([bounds, jnp.stack([pads, pads + 1])], axis=2)
    # Rows one behind another: what a token of one row sees is never in another.
    bounds = bounds + jnp.arange(B, dtype=jnp.int32)[:, None] * (T + behind)
    bounds = jnp.pad(bounds.reshape(2, -1), ((0, 6), (0, 0)))
    laid = _Laid(*(_lay(array, tiling) for array in (q, k, v)), bounds)
    return laid, _pairs(bounds, B, tiling)


def _pairs(bounds, B, tiling, transposed=False) -> Pairs:
    bounds = bounds[:2].reshape(2, B, -1)
    bounds = bounds - jnp.arange(B, dtype=jnp.int32)[:, None] * bounds.shape[2]
    meets = meeting(*bounds, tiling.block, tiling.reach)
    return listed(meets.swapaxes(1, 2) if transposed else meets, tiling.reach)


def _lay(array, tiling, channels=CHANNEL_MULTIPLE):
    """[B, T, H, C] -> [H, C, S], zeros behind each row and behind the channels."""
    B, T, H, C = array.shape
    padded = jnp.pad(array, ((0, 0), (0, -T % tiling.block), (0, 0), (0, -C % channels)))
    return padded.transpose(2, 3, 0, 1).reshape(H, padded.shape[3], -1)


def _lay_back(array, like):
    """[H, S] -> [B, T, H], the shape of `like` without its channels."""
    B, T, H, _ = like.shape
    return array.reshape(H, B, -1)[:, :, :T].transpose(1, 2, 0)


def _bring_back(array, like):
    """[H, C, S] -> [B, T, H, C], the shape of `like`."""
    B, T, H, C = like.shape
    return array.reshape(H, array.shape[1], B, -1)[:, :C, :, :T].transpose(2, 3, 0, 1)
