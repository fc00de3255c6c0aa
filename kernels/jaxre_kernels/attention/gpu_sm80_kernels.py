"""Not yet run on an Ampere or Ada GPU: unverified. `tools/hardware_check --only attention` confirms
it.

The three Mosaic GPU kernels of packed attention for GPUs without `wgmma` and TMA. Their formulas:
`gpu_vjp.py`.

One thread block is four warps. It owns a block of queries of one head (or of keys of one key head),
walks over the pieces of W tokens of the blocks that these meet, and keeps its sums in registers
until the end: nothing is accumulated in memory. Two arrays pass through shared memory, each in one
slot; the order lets each arrive while products of the other are computed:

    wait for the first -> request the second -> products of the first -> wait for the second ->
        request the next first, once this one is no longer needed -> products of the second

A warp copies with `cp.async`, and Mosaic GPU puts a barrier of all warps before each copy and after
each wait (`CompilerParams.unsafe_no_auto_barriers` is off): no warp still reads what is
overwritten, and each sees what the others copied. A wait is for all outstanding copies, so they
need no count. If barriers are passed (`own_arrived`, `keys_arrived`, ...), the copy engine copies
instead, and all else is the same: this is how it runs in Pallas's interpreter, and on a later GPU.

Data that is read once, or small, goes from global memory to registers: bounds, statistics, results.

Arrays in global memory: q, dO~, O and dQ [B, S, H C], k, v, dK and dV [B, S, K C]: `cp.async` takes
[W, C] out of the last two axes only. The rest is as in `gpu_kernels.py`. U is the number of tokens
of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxre_kernels.attention.gpu_tiles import (
    HIDDEN,
    along,
    full,
    online_softmax,
    own_block,
    visible,
    weights_again,
)
from jaxre_kernels.mosaic_gpu import SWIZZLE, TILE, quotient, remainder, transposed

DEPTH = 16  # of a product of a warp


def forward_kernel(
    q,
    k,
    v,
    bounds,
    others,
    total,
    out,
    statistics,
    *,
    queries,
    keys,
    values,
    own_arrived=None,
    keys_arrived=None,
    values_arrived=None,
    group,
    scale,
    interpreted,
):
    """Writes the output of a block of queries, and the highest score and the sum of weights of each
    query (`statistics`).

    Shared memory: `queries` [U, C], `keys` and `values` [W, C].
    """
    U, C = queries.shape
    own, row, start = own_block(q, U)
    head = lax.axis_index("heads")
    here = row, pl.ds(start, U), _channels(head, C)
    walk = _Walk(others, own, total[own], U, keys.shape[0])
    stream_k = _Stream(
        walk,
        lambda step: k.at[row, walk.tokens(step), _channels(quotient(head, group), C)],
        keys,
        keys_arrived,
    )
    stream_v = _Stream(
        walk,
        lambda step: v.at[row, walk.tokens(step), _channels(quotient(head, group), C)],
        values,
        values_arrived,
    )
    _request(q.at[here], queries, own_arrived)
    stream_k.request(0)
    _wait(own_arrived)

    def compute(step, carry):
        sums, highest, count = carry
        stream_k.wait()
        stream_v.request(step)
        scores = _product(queries, keys, interpreted)  # queries keys
        since, until = (_loaded(bounds.at[i, row, walk.tokens(step)], 1) for i in (0, 1))
        seen = visible(since, until, start, scores, queries=0)
        weights, shrink, highest, count = online_softmax(scores, seen, highest, count, scale)
        stream_v.wait()
        stream_k.request_next(step)
        return (
            _accumulated(sums * along(shrink, 0, sums), weights, values, interpreted),
            highest,
            count,
        )

    before = full((U, C), 0.0), full((U,), HIDDEN, TILE.reduce(1)), full((U,), 0.0, TILE.reduce(1))
    sums, highest, count = lax.fori_loop(0, walk.steps, compute, before)
    _write(sums / along(count, 0, sums), queries, out.at[here])
    for i, vector in enumerate((highest, count)):
        statistics.at[i, row, head, pl.ds(start, U)][...] = vector


def dq_kernel(
    q,
    k,
    v,
    bounds,
    dsums,
    statistics,
    middles,
    others,
    total,
    dq,
    slacks,
    *,
    queries,
    douts,
    keys,
    values,
    own_arrived=None,
    keys_arrived=None,
    values_arrived=None,
    group,
    scale,
    interpreted,
):
    """Writes the gradient of a block of queries, from dO~ (`dsums`) and the highest score and r of
    each query (`statistics`).

    `slack` and `rounded` as in `gpu_kernels.dq_kernel`. Values come first: they are needed once,
    keys twice. Shared memory: `queries` and `douts` [U, C], `keys` and `values` [W, C].
    """
    U, C = queries.shape
    own, row, start = own_block(q, U)
    head = lax.axis_index("heads")
    key_head = quotient(head, group)
    here = row, pl.ds(start, U), _channels(head, C)
    walk = _Walk(others, own, total[own], U, keys.shape[0])
    stream_k = _Stream(
        walk, lambda step: k.at[row, walk.tokens(step), _channels(key_head, C)], keys, keys_arrived
    )
    stream_v = _Stream(
        walk,
        lambda step: v.at[row, walk.tokens(step), _channels(key_head, C)],
        values,
        values_arrived,
    )
    _request(q.at[here], queries, own_arrived)
    _request(dsums.at[here], douts, own_arrived)
    stream_v.request(0)
    highest, mean = (_loaded(statistics.at[i, row, head, pl.ds(start, U)], 0) for i in (0, 1))
    _wait(own_arrived)

    def compute(step, carry):
        sums, slack, rounded = carry
        stream_v.wait()
        stream_k.request(step)
        dweights = _product(douts, values, interpreted)  # queries keys
        stream_k.wait()
        stream_v.request_next(step)
        scores = _product(queries, keys, interpreted)
        since, until = (_loaded(bounds.at[i, row, walk.tokens(step)], 1) for i in (0, 1))
        weights = weights_again(
            scores,
            visible(since, until, start, scores, queries=0),
            along(highest, 0, scores),
            scale,
        )
        dscores = weights * (dweights - along(mean, 0, scores))
        slack = slack + dscores.sum(1)
        rounded = rounded + dscores.astype(keys.dtype).astype(jnp.float32).sum(1)
        return _accumulated(sums, dscores, keys, interpreted), slack, rounded

    nothing = full((U,), 0.0, TILE.reduce(1))
    sums, slack, rounded = lax.fori_loop(
        0, walk.steps, compute, (full((U, C), 0.0), nothing, nothing)
    )
    middle = _loaded(middles.at[row, quotient(start, U), key_head], 1)
    _write((sums - along(rounded, 0, sums) * along(middle, 1, sums)) * scale, queries, dq.at[here])
    slacks.at[row, head, pl.ds(start, U)][...] = slack


def dkv_kernel(
    q,
    k,
    v,
    bounds,
    dsums,
    statistics,
    others,
    total,
    dk,
    dv,
    *,
    keys,
    values,
    queries,
    douts,
    own_arrived=None,
    queries_arrived=None,
    douts_arrived=None,
    group,
    scale,
    interpreted,
):
    """Writes the gradients of a block of keys and values of one key head, summed over the queries
    of all heads that use it.

    Scores are transposed, [keys, queries]: the result of one product is the factor of the next as
    it is. Shared memory: `keys` and `values` [U, C], `queries` and `douts` [W, C].
    """
    U, C = keys.shape
    own, row, start = own_block(k, U)
    head = lax.axis_index("heads")
    here = row, pl.ds(start, U), _channels(head, C)
    walk = _Walk(others, own, total[own], U, queries.shape[0], group)

    def query_head(step):
        return head * group + walk.place(step)

    stream_q = _Stream(
        walk,
        lambda step: q.at[row, walk.tokens(step), _channels(query_head(step), C)],
        queries,
        queries_arrived,
    )
    stream_do = _Stream(
        walk,
        lambda step: dsums.at[row, walk.tokens(step), _channels(query_head(step), C)],
        douts,
        douts_arrived,
    )
    _request(k.at[here], keys, own_arrived)
    _request(v.at[here], values, own_arrived)
    stream_do.request(0)
    since, until = (_loaded(bounds.at[i, row, pl.ds(start, U)], 0) for i in (0, 1))
    _wait(own_arrived)

    def compute(step, carry):
        dkeys, dvalues = carry
        stream_do.wait()
        stream_q.request(step)
        dweights = _product(values, douts, interpreted)  # keys queries
        stream_q.wait()
        scores = _product(keys, queries, interpreted)
        highest, mean = (statistics.at[i, row, query_head(step), walk.tokens(step)] for i in (0, 1))
        seen = visible(since, until, walk.tokens(step).start, scores, queries=1)
        weights = weights_again(scores, seen, along(_loaded(highest, 1), 1, scores), scale)
        dvalues = _accumulated(dvalues, weights, douts, interpreted)
        stream_do.request_next(step)
        dscores = weights * (dweights - along(_loaded(mean, 1), 1, scores))
        return _accumulated(dkeys, dscores, queries, interpreted), dvalues

    dkeys, dvalues = lax.fori_loop(0, walk.steps, compute, (full((U, C), 0.0),) * 2)
    _write(dkeys * scale, keys, dk.at[here])
    _write(dvalues, values, dv.at[here])


# ---- copies to and from shared memory ---------------------------------------------------------


class _Walk(NamedTuple):
    """The steps of a thread block: the blocks that it meets, for each the query heads of a key
    head, for each the pieces of a block.
    """

    others: Any
    own: Any
    total: Any
    block: int
    piece: int
    heads: int = 1

    @property
    def pieces(self):
        return self.block // self.piece

    @property
    def steps(self):
        return self.total * (self.heads * self.pieces)

    def place(self, step):
        """Index of the query head among those of its key head."""
        return remainder(quotient(step, self.pieces), self.heads)

    def tokens(self, step):
        block = self.others[self.own, quotient(step, self.heads * self.pieces)]
        return pl.ds(block * self.block + remainder(step, self.pieces) * self.piece, self.piece)


class _Stream(NamedTuple):
    """An array that passes through one slot of shared memory; `source(step)` is its place in
    memory.
    """

    walk: _Walk
    source: Callable
    slot: Any
    arrived: Any

    def request(self, step):
        _request(self.source(step), self.slot, self.arrived)

    def request_next(self, step):
        @pl.when(step + 1 < self.walk.steps)
        def _():
            self.request(step + 1)

    def wait(self):
        _wait(self.arrived)


def _request(source, slot, arrived):
    if arrived is not None:
        plgpu.commit_smem()  # orders ordinary loads before writes of the copy engine
    plgpu.copy_gmem_to_smem(source, slot, arrived, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def _wait(arrived):
    if arrived is None:
        plgpu.wait_gmem_to_smem(0)
    else:
        plgpu.barrier_wait(arrived)


def _write(values, slot, there):
    """Writes to global memory, by way of shared memory: as a product leaves them, four threads hold
    16 bytes of a row.
    """
    slot[...] = values.astype(slot.dtype)
    there[...] = plgpu.load(
        slot, layout=plgpu.Layout.SMEM_GMEM_COPY(slot.shape, slot.dtype, SWIZZLE)
    )


def _loaded(ref, axis):
    """A vector of global memory, laid out along `axis` of a tile."""
    return plgpu.load(ref, layout=TILE.reduce(1 - axis), optimized=False)


def _channels(head, channels):
    return pl.ds(head * channels, channels)


# ---- products ---------------------------------------------------------------------------------


def _product(x, y, interpreted):
    """x @ y' of two blocks [_, C] in shared memory; an ordinary product in Pallas's interpreter,
    which has no `mma`.
    """
    if interpreted:
        return jnp.dot(x[...], y[...].T, preferred_element_type=jnp.float32)
    result = full((x.shape[0], y.shape[0]), 0.0)
    width = SWIZZLE // x.dtype.itemsize
    for first in range(0, x.shape[1], width):
        channels = pl.ds(first, width)
        left = plgpu.load(x.at[:, channels], layout=plgpu.Layout.MMA_LHS(x.dtype))
        right = plgpu.load(transposed(y.at[:, channels]), layout=plgpu.Layout.MMA_RHS(x.dtype))
        result = plgpu.mma(result, left, right)
    return result


def _accumulated(sums, x, y, interpreted):
    """sums + x @ y, x in registers and rounded to y's dtype, y in shared memory."""
    if interpreted:
        return sums + jnp.dot(x.astype(y.dtype), y[...], preferred_element_type=jnp.float32)
    x = _as_factor(x, y.dtype)
    for first in range(0, y.shape[0], DEPTH):
        right = plgpu.load(y.at[pl.ds(first, DEPTH)], layout=plgpu.Layout.MMA_RHS(y.dtype))
        sums = plgpu.mma(sums, x[:, first : first + DEPTH], right)
    return sums


def _as_factor(array, dtype):
    """A product's result, rounded, as the left factor of the next product: each thread already
    holds the values it needs, under other register numbers.

    In both layouts, register [j, c, r] of a thread belongs to columns 16 j + 8 c and rows 8 r of
    its warp's; in the result j and c are one axis.
    """
    layout = plgpu.Layout.MMA_LHS(dtype)

    @plgpu.inline_mgpu(
        arg_types=(TILE,), return_type=plgpu.ShapeDtypeStruct(array.shape, dtype, layout)
    )
    def renumbered(context, result):
        rounded = result.astype(mgpu.utils.dtype_to_ir_type(dtype))
        registers = rounded.registers.reshape(layout.to_mgpu().registers_shape(result.shape))
        return mgpu.FragmentedArray(_registers=registers, _layout=layout.to_mgpu(), _is_signed=None)

    return renumbered(array)
