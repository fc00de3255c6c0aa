"""The three Mosaic GPU kernels of packed attention for Hopper. See `gpu.py` for what they compute.

One thread block is one warpgroup. It owns a block of queries of one head (or of keys of one key
head), walks over the blocks that these meet, and keeps its sums in registers until the end: nothing
is added up in memory. What a step needs is brought to shared memory by the copy engine (TMA) while
the step before computes, in two slots. The same warpgroup asks for a copy and reads what came, so
all that it waits for is arrival:

    wait for the slot -> products of the slot, waited for -> ask for what the step after next
        needs, into the same slot

A copy starts behind a barrier of the warpgroup (that of `commit_smem`, and one that Mosaic GPU puts
there by itself, as `CompilerParams.unsafe_no_auto_barriers` is off), so no warp still reads the
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
    TILE,
    along,
    full,
    online_softmax,
    own_block,
    quotient,
    remainder,
    visible,
    weights_again,
)


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
    near,
    kept,
    own_arrived,
    arrived,
    *,
    group,
    scale,
    interpreted,
):
    """Output of a block of queries, and of each query the highest score and the sum of weights
    (`statistics`).

    Shared memory: `queries` [U, C], `keys` and `values` [2, U, C], `near` [2, 2, U] the bounds of
    the keys, `kept` [2, U] f32.
    """
    U, C = queries.shape
    own, row, start = own_block(q, U)
    head = lax.axis_index("heads")
    here = row, pl.ds(start, U), head
    plgpu.copy_gmem_to_smem(q.at[here], queries, own_arrived)

    def fetch(step, slot):
        there = row, pl.ds(others[own, step] * U, U), quotient(head, group)
        _fetch_keys(k, v, bounds, there, keys, values, near, slot, arrived)

    def compute(step, slot, carry):
        sums, highest, count = carry
        (scores,) = _products((queries, _transposed(keys.at[slot])))  # queries keys
        seen = _visible(near.at[slot], start, scores, queries=0)
        weights, shrink, highest, count = online_softmax(scores, seen, highest, count, scale)
        (sums,) = _added(
            interpreted,
            (sums * along(shrink, 0, sums), weights.astype(values.dtype), values.at[slot]),
        )
        return sums, highest, count

    steps = _fetch_first(total[own], fetch)
    plgpu.barrier_wait(own_arrived)
    before = full((U, C), 0.0), full((U,), HIDDEN, TILE.reduce(1)), full((U,), 0.0, TILE.reduce(1))
    sums, highest, count = _each_step(steps, arrived, fetch, compute, before)
    queries[...] = (sums / along(count, 0, sums)).astype(queries.dtype)
    kept.at[0][...] = highest
    kept.at[1][...] = count
    _leave((queries, out.at[here]), (kept, statistics.at[:, row, head, pl.ds(start, U)]))


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
    near,
    kept,
    middle,
    own_arrived,
    arrived,
    *,
    group,
    scale,
    interpreted,
):
    """Gradient of a block of queries, from dO~ (`dsums`) and of each query the highest score and r
    (`statistics`).

    The gradients of a query's scores add up to zero, but not with an r from a rounded output, nor
    once they are rounded. What they add up to is kept: `slack`, before rounding, corrects r for the
    other kernel; `rounded`, after it, takes the middle of the keys of the queries' own block
    (`middles` [B, N, K, C] f32) out of dQ: keys have a large common part where their projection has
    a bias.

    Shared memory: `queries` and `douts` [U, C], `keys` and `values` [2, U, C], `near` [2, 2, U],
    `kept` [2, U] f32, `middle` [C] f32.
    """
    U, C = queries.shape
    own, row, start = own_block(q, U)
    head = lax.axis_index("heads")
    here = row, pl.ds(start, U), head
    plgpu.copy_gmem_to_smem(q.at[here], queries, own_arrived)
    plgpu.copy_gmem_to_smem(dsums.at[here], douts, own_arrived)
    plgpu.copy_gmem_to_smem(statistics.at[:, row, head, pl.ds(start, U)], kept, own_arrived)
    plgpu.copy_gmem_to_smem(
        middles.at[row, quotient(start, U), quotient(head, group)], middle, own_arrived
    )

    def fetch(step, slot):
        there = row, pl.ds(others[own, step] * U, U), quotient(head, group)
        _fetch_keys(k, v, bounds, there, keys, values, near, slot, arrived)

    steps = _fetch_first(total[own], fetch)
    plgpu.barrier_wait(own_arrived)
    highest, mean = (plgpu.load(kept.at[i], layout=TILE.reduce(1)) for i in (0, 1))

    def compute(step, slot, carry):
        sums, slack, rounded = carry
        scores, dweights = _products(
            (queries, _transposed(keys.at[slot])),
            (douts, _transposed(values.at[slot])),
        )  # queries keys
        weights = weights_again(
            scores,
            _visible(near.at[slot], start, scores, queries=0),
            along(highest, 0, scores),
            scale,
        )
        dscores = weights * (dweights - along(mean, 0, scores))
        slack = slack + dscores.sum(1)
        dscores = dscores.astype(keys.dtype)
        rounded = rounded + dscores.astype(jnp.float32).sum(1)
        (sums,) = _added(interpreted, (sums, dscores, keys.at[slot]))
        return sums, slack, rounded

    nothing = full((U,), 0.0, TILE.reduce(1))
    sums, slack, rounded = _each_step(
        steps, arrived, fetch, compute, (full((U, C), 0.0), nothing, nothing)
    )
    common = along(rounded, 0, sums) * along(plgpu.load(middle, layout=TILE.reduce(0)), 1, sums)
    queries[...] = ((sums - common) * scale).astype(queries.dtype)
    kept.at[0][...] = slack
    _leave((queries, dq.at[here]), (kept.at[0], slacks.at[row, head, pl.ds(start, U)]))


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
    near,
    kept,
    own_arrived,
    arrived,
    *,
    group,
    scale,
    interpreted,
):
    """Gradients of a block of keys and values of one key head, over the queries of all heads that
    use it.

    Scores stand the other way round, [keys, queries]: as they come out of one product they go into
    the next. Shared memory: `keys` and `values` [U, C], `queries` and `douts` [2, U, C], `near` [2,
    U], `kept` [2, 2, U] f32.
    """
    U, C = keys.shape
    own, row, start = own_block(k, U)
    head = lax.axis_index("heads")
    here = row, pl.ds(start, U), head
    plgpu.copy_gmem_to_smem(k.at[here], keys, own_arrived)
    plgpu.copy_gmem_to_smem(v.at[here], values, own_arrived)
    plgpu.copy_gmem_to_smem(bounds.at[:, row, pl.ds(start, U)], near, own_arrived)

    def first_query(step):
        """All heads of a block of queries follow one another, then comes the next block."""
        return others[own, quotient(step, group)] * U

    def fetch(step, slot):
        there, query_head = pl.ds(first_query(step), U), head * group + remainder(step, group)
        plgpu.copy_gmem_to_smem(q.at[row, there, query_head], queries.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(dsums.at[row, there, query_head], douts.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(
            statistics.at[:, row, query_head, there], kept.at[slot], arrived.at[slot]
        )

    steps = _fetch_first(total[own] * group, fetch)
    plgpu.barrier_wait(own_arrived)

    def compute(step, slot, carry):
        dkeys, dvalues = carry
        scores, dweights = _products(
            (keys, _transposed(queries.at[slot])),
            (values, _transposed(douts.at[slot])),
        )  # keys queries
        highest, mean = (
            along(plgpu.load(kept.at[slot, i], layout=TILE.reduce(0)), 1, scores) for i in (0, 1)
        )
        weights = weights_again(
            scores, _visible(near, first_query(step), scores, queries=1), highest, scale
        )
        dscores = weights * (dweights - mean)
        return _added(
            interpreted,
            (dkeys, dscores.astype(keys.dtype), queries.at[slot]),
            (dvalues, weights.astype(keys.dtype), douts.at[slot]),
        )

    dkeys, dvalues = _each_step(steps, arrived, fetch, compute, (full((U, C), 0.0),) * 2)
    keys[...] = (dkeys * scale).astype(keys.dtype)
    values[...] = dvalues.astype(values.dtype)
    _leave((keys, dk.at[here]), (values, dv.at[here]))


# ---- blocks that come and go ------------------------------------------------------------------


def _fetch_keys(k, v, bounds, there, keys, values, near, slot, arrived):
    row, tokens, _ = there
    plgpu.copy_gmem_to_smem(k.at[there], keys.at[slot], arrived.at[slot])
    plgpu.copy_gmem_to_smem(v.at[there], values.at[slot], arrived.at[slot])
    plgpu.copy_gmem_to_smem(bounds.at[:, row, tokens], near.at[slot], arrived.at[slot])


def _fetch_first(steps, fetch):
    """Asks for what the first two of at least one step need; `steps`, for `_each_step`."""
    fetch(0, 0)

    @pl.when(steps > 1)
    def _():
        fetch(1, 1)

    return steps


def _each_step(steps, arrived, fetch, compute, carry):
    """`carry = compute(step, slot, carry)` for each step, with what `fetch(step, slot)` asked for
    in its slot.

    `compute` waits for its products: when it is back, its slot may be filled again.
    """

    def step_of(step, carry):
        slot = remainder(step, 2)
        plgpu.barrier_wait(arrived.at[slot])
        carry = compute(step, slot, carry)

        @pl.when(step + 2 < steps)
        def _():
            # orders what ordinary loads read before what the copy engine writes
            plgpu.commit_smem()
            fetch(step + 2, slot)

        return carry

    return lax.fori_loop(0, steps, step_of, carry)


def _leave(*pairs):
    """Copies from shared to global memory, and waits: shared memory lives no longer than its thread
    block.
    """
    plgpu.commit_smem()
    for here, there in pairs:
        plgpu.copy_smem_to_gmem(here, there)
    plgpu.wait_smem_to_gmem(0)


# ---- products ---------------------------------------------------------------------------------


def _products(*pairs):
    """one @ other of each pair, both in shared memory; all under way before the first is waited
    for.
    """

    def form(*results):
        for result, (one, other) in zip(results, pairs, strict=True):
            plgpu.wgmma(result, one, other)
        return tuple(result[...] for result in results)

    return pl.run_scoped(
        form, *(plgpu.ACC((one.shape[0], other.shape[1]), jnp.float32) for one, other in pairs)
    )


def _added(interpreted, *terms):
    """sums + one @ other of each term, one in registers, other in shared memory; all under way
    before the first is waited for.

    Pallas's interpreter takes no factor in registers: there it is an ordinary product, of the same
    numbers.
    """
    if interpreted:
        return tuple(
            sums + jnp.dot(one, other[...], preferred_element_type=jnp.float32)
            for sums, one, other in terms
        )

    def add(results):
        for result, (_, one, other) in zip(results, terms, strict=True):
            plgpu.wgmma(result, one, other)

    return pl.run_state(add)(tuple(plgpu.ACC.init(sums) for sums, _, _ in terms))


def _transposed(ref):
    return ref.transpose((1, 0))


def _visible(near, start, scores, *, queries):
    """`near` [2, U] in shared memory are the bounds of the keys."""
    since, until = (plgpu.load(near.at[i], layout=TILE.reduce(queries)) for i in (0, 1))
    return visible(since, until, start, scores, queries=queries)
