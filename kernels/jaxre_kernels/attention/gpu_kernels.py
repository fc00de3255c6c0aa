"""Not yet run on a Hopper GPU: unverified. `tools/hardware_check --only attention` confirms it.

The three Mosaic GPU kernels of packed attention for Hopper. Their formulas: `gpu_vjp.py`.

One thread block is one warpgroup. It owns a block of queries of one head (or of keys of one key
head), walks over the blocks that these meet, and keeps its sums in registers until the end: nothing
is accumulated in memory. The copy engine (TMA) brings the data of a step to shared memory while the
step before computes, in two slots. The same warpgroup requests copies and reads them, so it only
ever waits for arrival:

    wait for the slot -> products of the slot, waited for -> request the data of the step after
        next, into the same slot

A copy starts behind a barrier of the warpgroup (that of `commit_smem`, and one that Mosaic GPU
inserts itself, as `CompilerParams.unsafe_no_auto_barriers` is off), so no warp still reads the
slot. Latency is hidden by the thread blocks that share a processor, not by more slots: where
examples are short a list has two or three entries, and a deeper pipeline would not fill.

Arrays in global memory: q, dO~, O and dQ [B, S, H, C], k, v, dK and dV [B, S, K, C], `bounds` [2,
B, S] int32 (visible from, until), `statistics` [2, B, H, S] f32. `others` [B x N, N] and `total` [B
x N] int32: the blocks of its row that a block meets, and their number, at least one. U is the
number of tokens of a block.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
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
from jaxre_kernels.mosaic_gpu import TILE, quotient, remainder, transposed


def forward_kernel(
    q,
    k,
    v,
    bounds,
    others,
    total,
    out,
    statistics,
    queries,
    keys,
    values,
    key_bounds,
    stats,
    own_arrived,
    arrived,
    *,
    group,
    scale,
    interpreted,
):
    """Writes the output of a block of queries, and the highest score and the sum of weights of each
    query (`statistics`).

    Shared memory: `queries` [U, C], `keys` and `values` [2, U, C], `key_bounds` [2, 2, U],
    `stats` [2, U] f32.
    """
    U, C = queries.shape
    own, row, start = own_block(q, U)
    head = lax.axis_index("heads")
    here = row, pl.ds(start, U), head
    plgpu.copy_gmem_to_smem(q.at[here], queries, own_arrived)

    def fetch(step, slot):
        there = row, pl.ds(others[own, step] * U, U), quotient(head, group)
        _fetch_keys(k, v, bounds, there, keys, values, key_bounds, slot, arrived)

    def compute(step, slot, carry):
        sums, highest, count = carry
        (scores,) = _products((queries, transposed(keys.at[slot])))  # queries keys
        seen = _visible(key_bounds.at[slot], start, scores, queries=0)
        weights, shrink, highest, count = online_softmax(scores, seen, highest, count, scale)
        (sums,) = _accumulated(
            interpreted,
            (sums * along(shrink, 0, sums), weights.astype(values.dtype), values.at[slot]),
        )
        return sums, highest, count

    steps = _fetch_first(total[own], fetch)
    plgpu.barrier_wait(own_arrived)
    before = full((U, C), 0.0), full((U,), HIDDEN, TILE.reduce(1)), full((U,), 0.0, TILE.reduce(1))
    sums, highest, count = _each_step(steps, arrived, fetch, compute, before)
    queries[...] = (sums / along(count, 0, sums)).astype(queries.dtype)
    stats.at[0][...] = highest
    stats.at[1][...] = count
    _write((queries, out.at[here]), (stats, statistics.at[:, row, head, pl.ds(start, U)]))


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
    queries,
    douts,
    keys,
    values,
    key_bounds,
    stats,
    middle,
    own_arrived,
    arrived,
    *,
    group,
    scale,
    interpreted,
):
    """Writes the gradient of a block of queries, from dO~ (`dsums`) and the highest score and r of
    each query (`statistics`).

    The gradients of a query's scores should sum to zero, but do not with an r from a rounded
    output, nor once they are rounded. Two sums measure the error: `slack`, before rounding,
    corrects r for the other kernel; `rounded`, after it, removes the mean key of the queries' own
    block (`middles` [B, N, K, C] f32) from dQ: keys have a large common part where their projection
    has a bias.

    Shared memory: `queries` and `douts` [U, C], `keys` and `values` [2, U, C], `key_bounds` [2, 2,
    U], `stats` [2, U] f32, `middle` [C] f32.
    """
    U, C = queries.shape
    own, row, start = own_block(q, U)
    head = lax.axis_index("heads")
    here = row, pl.ds(start, U), head
    plgpu.copy_gmem_to_smem(q.at[here], queries, own_arrived)
    plgpu.copy_gmem_to_smem(dsums.at[here], douts, own_arrived)
    plgpu.copy_gmem_to_smem(statistics.at[:, row, head, pl.ds(start, U)], stats, own_arrived)
    plgpu.copy_gmem_to_smem(
        middles.at[row, quotient(start, U), quotient(head, group)], middle, own_arrived
    )

    def fetch(step, slot):
        there = row, pl.ds(others[own, step] * U, U), quotient(head, group)
        _fetch_keys(k, v, bounds, there, keys, values, key_bounds, slot, arrived)

    steps = _fetch_first(total[own], fetch)
    plgpu.barrier_wait(own_arrived)
    highest, mean = (plgpu.load(stats.at[i], layout=TILE.reduce(1)) for i in (0, 1))

    def compute(step, slot, carry):
        sums, slack, rounded = carry
        scores, dweights = _products(
            (queries, transposed(keys.at[slot])),
            (douts, transposed(values.at[slot])),
        )  # queries keys
        weights = weights_again(
            scores,
            _visible(key_bounds.at[slot], start, scores, queries=0),
            along(highest, 0, scores),
            scale,
        )
        dscores = weights * (dweights - along(mean, 0, scores))
        slack = slack + dscores.sum(1)
        dscores = dscores.astype(keys.dtype)
        rounded = rounded + dscores.astype(jnp.float32).sum(1)
        (sums,) = _accumulated(interpreted, (sums, dscores, keys.at[slot]))
        return sums, slack, rounded

    nothing = full((U,), 0.0, TILE.reduce(1))
    sums, slack, rounded = _each_step(
        steps, arrived, fetch, compute, (full((U, C), 0.0), nothing, nothing)
    )
    common = along(rounded, 0, sums) * along(plgpu.load(middle, layout=TILE.reduce(0)), 1, sums)
    queries[...] = ((sums - common) * scale).astype(queries.dtype)
    stats.at[0][...] = slack
    _write((queries, dq.at[here]), (stats.at[0], slacks.at[row, head, pl.ds(start, U)]))


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
    keys,
    values,
    queries,
    douts,
    key_bounds,
    stats,
    own_arrived,
    arrived,
    *,
    group,
    scale,
    interpreted,
):
    """Writes the gradients of a block of keys and values of one key head, summed over the queries
    of all heads that use it.

    Scores are transposed, [keys, queries]: the result of one product is the factor of the next as
    it is. Shared memory: `keys` and `values` [U, C], `queries` and `douts` [2, U, C], `key_bounds`
    [2, U], `stats` [2, 2, U] f32.
    """
    U, C = keys.shape
    own, row, start = own_block(k, U)
    head = lax.axis_index("heads")
    here = row, pl.ds(start, U), head
    plgpu.copy_gmem_to_smem(k.at[here], keys, own_arrived)
    plgpu.copy_gmem_to_smem(v.at[here], values, own_arrived)
    plgpu.copy_gmem_to_smem(bounds.at[:, row, pl.ds(start, U)], key_bounds, own_arrived)

    def first_query(step):
        """The heads of a block of queries come one after another, then the next block."""
        return others[own, quotient(step, group)] * U

    def fetch(step, slot):
        there, query_head = pl.ds(first_query(step), U), head * group + remainder(step, group)
        plgpu.copy_gmem_to_smem(q.at[row, there, query_head], queries.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(dsums.at[row, there, query_head], douts.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(
            statistics.at[:, row, query_head, there], stats.at[slot], arrived.at[slot]
        )

    steps = _fetch_first(total[own] * group, fetch)
    plgpu.barrier_wait(own_arrived)

    def compute(step, slot, carry):
        dkeys, dvalues = carry
        scores, dweights = _products(
            (keys, transposed(queries.at[slot])),
            (values, transposed(douts.at[slot])),
        )  # keys queries
        highest, mean = (
            along(plgpu.load(stats.at[slot, i], layout=TILE.reduce(0)), 1, scores) for i in (0, 1)
        )
        weights = weights_again(
            scores, _visible(key_bounds, first_query(step), scores, queries=1), highest, scale
        )
        dscores = weights * (dweights - mean)
        return _accumulated(
            interpreted,
            (dkeys, dscores.astype(keys.dtype), queries.at[slot]),
            (dvalues, weights.astype(keys.dtype), douts.at[slot]),
        )

    dkeys, dvalues = _each_step(steps, arrived, fetch, compute, (full((U, C), 0.0),) * 2)
    keys[...] = (dkeys * scale).astype(keys.dtype)
    values[...] = dvalues.astype(values.dtype)
    _write((keys, dk.at[here]), (values, dv.at[here]))


# ---- copies to and from shared memory ---------------------------------------------------------


def _fetch_keys(k, v, bounds, there, keys, values, key_bounds, slot, arrived):
    row, tokens, _ = there
    plgpu.copy_gmem_to_smem(k.at[there], keys.at[slot], arrived.at[slot])
    plgpu.copy_gmem_to_smem(v.at[there], values.at[slot], arrived.at[slot])
    plgpu.copy_gmem_to_smem(bounds.at[:, row, tokens], key_bounds.at[slot], arrived.at[slot])


def _fetch_first(steps, fetch):
    """Requests the data of the first two steps (or one); returns `steps`, for `_each_step`."""
    fetch(0, 0)

    @pl.when(steps > 1)
    def _():
        fetch(1, 1)

    return steps


def _each_step(steps, arrived, fetch, compute, carry):
    """Runs `carry = compute(step, slot, carry)` for each step, once the data that `fetch(step,
    slot)` requested has arrived in its slot.

    `compute` waits for its products, so its slot may be refilled when it returns.
    """

    def step_of(step, carry):
        slot = remainder(step, 2)
        plgpu.barrier_wait(arrived.at[slot])
        carry = compute(step, slot, carry)

        @pl.when(step + 2 < steps)
        def _():
            # orders ordinary loads before writes of the copy engine
            plgpu.commit_smem()
            fetch(step + 2, slot)

        return carry

    return lax.fori_loop(0, steps, step_of, carry)


def _write(*pairs):
    """Copies pairs from shared to global memory, and waits: shared memory ends with its thread
    block.
    """
    plgpu.commit_smem()
    for here, there in pairs:
        plgpu.copy_smem_to_gmem(here, there)
    plgpu.wait_smem_to_gmem(0)


# ---- products ---------------------------------------------------------------------------------


def _products(*pairs):
    """x @ y of each pair, both in shared memory; all start before the first is waited for."""

    def form(*results):
        for result, (x, y) in zip(results, pairs, strict=True):
            plgpu.wgmma(result, x, y)
        return tuple(result[...] for result in results)

    return pl.run_scoped(
        form, *(plgpu.ACC((x.shape[0], y.shape[1]), jnp.float32) for x, y in pairs)
    )


def _accumulated(interpreted, *terms):
    """sums + x @ y of each term, x in registers, y in shared memory; all start before the first is
    waited for.

    Pallas's interpreter supports no factor in registers: there it is an ordinary product, of the
    same numbers.
    """
    if interpreted:
        return tuple(
            sums + jnp.dot(x, y[...], preferred_element_type=jnp.float32) for sums, x, y in terms
        )

    def add(results):
        for result, (_, x, y) in zip(results, terms, strict=True):
            plgpu.wgmma(result, x, y)

    return pl.run_state(add)(tuple(plgpu.ACC.init(sums) for sums, _, _ in terms))


def _visible(key_bounds, start, scores, *, queries):
    """`key_bounds` [2, U] in shared memory are the bounds of the keys."""
    since, until = (plgpu.load(key_bounds.at[i], layout=TILE.reduce(queries)) for i in (0, 1))
    return visible(since, until, start, scores, queries=queries)
