"""Not yet run on a TPU: unverified. `tools/hardware_check --only attention` confirms it.

The three Pallas kernels of packed attention on TPUs; a step computes a block pair and some key
heads. Their formulas: `gpu_vjp.py`.

Every array has its tokens along the lanes: queries [C, M], keys [C, U], scores [U, M]. The softmax
statistics of a query are then one lane of [1, M], summed over sublanes, and heads of 64 channels
leave no lane empty. `own` [S], `other` [S], `total` [1]: the list of block pairs (`pairs.Pairs`),
in scalar memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxre_kernels.mosaic_tpu import product

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # finite even when added to a score


def forward_kernel(
    own,
    other,
    total,
    q_ref,
    k_ref,
    v_ref,
    bounds_ref,
    out_ref,
    statistics_ref,
    sums,
    highest,
    count,
    *,
    group,
    scale,
):
    """Adds a block of keys to the running softmax of a block of queries.

    `sums` [heads, C, M], `highest` and `count` [heads, 1, M]: weighted sum of values, highest score
    and sum of weights so far. A query that has not seen a key yet has highest = HIDDEN and weights
    of one; the first score it sees rescales all of that by exp(HIDDEN - score) = 0.
    """
    step = pl.program_id(1)
    heads = range(k_ref.shape[0])

    @pl.when(_is_first(own, step))
    def _():
        sums[...] = jnp.zeros_like(sums)
        highest[...] = jnp.full_like(highest, HIDDEN)
        count[...] = jnp.zeros_like(count)

    hidden = _hidden(own, step, bounds_ref, group)
    # C M
    for head in heads:
        scores = product(k_ref[head], _grouped(q_ref, head, group), 0, 0) * scale + hidden  # U M
        before = highest[head]  # 1 M
        now = jnp.maximum(before, scores.max(0, keepdims=True))
        shrink, weights = jnp.exp(before - now), jnp.exp(scores - now)
        highest[head] = now
        count[head] = count[head] * shrink + weights.sum(0, keepdims=True)
        sums[head] = sums[head] * shrink + product(v_ref[head], weights.astype(v_ref.dtype), 1, 0)

    @pl.when(_is_last(own, total, step))
    def _():
        for head in heads:
            _store_grouped(out_ref, head, group, sums[head] / count[head])
            _store_grouped(
                statistics_ref, head, group, jnp.concatenate([highest[head], count[head]], axis=0)
            )


def dq_kernel(
    own,
    other,
    total,
    q_ref,
    k_ref,
    v_ref,
    bounds_ref,
    dsums_ref,
    statistics_ref,
    dq_ref,
    mean_ref,
    dq,
    slack,
    rounded,
    middle,
    *,
    group,
    scale,
):
    """Adds the contribution of a block of keys to the gradient of a block of queries. `dq` is
    [heads, C, M].

    The gradients of a query's scores should sum to zero, but do not with a `mean` from a rounded
    output, nor once they are rounded. Two sums measure the error: `slack` [heads, 1, M], before
    rounding, corrects `mean` for the other kernel; `rounded`, after it, removes the mean key from
    `dq`. `middle` [heads, C, 1] is that mean over the queries' own block: keys have a large common
    part where their projection has a bias.
    """
    step = pl.program_id(1)
    heads = range(k_ref.shape[0])

    @pl.when(_is_first(own, step))
    def _():
        dq[...] = jnp.zeros_like(dq)
        slack[...] = jnp.zeros_like(slack)
        rounded[...] = jnp.zeros_like(rounded)

    @pl.when(own[step] == other[step])
    def _():
        for head in heads:
            middle[head] = k_ref[head].astype(jnp.float32).mean(1, keepdims=True)

    hidden = _hidden(own, step, bounds_ref, group)
    for head in heads:
        queries, dsums = _grouped(q_ref, head, group), _grouped(dsums_ref, head, group)
        highest, _, mean = _rows(_grouped(statistics_ref, head, group))
        _, dscores = _weights_again(
            queries, k_ref[head], v_ref[head], dsums, highest, mean, hidden, scale
        )
        slack[head] += dscores.sum(0, keepdims=True)
        dscores = dscores.astype(queries.dtype)
        rounded[head] += dscores.astype(jnp.float32).sum(0, keepdims=True)
        dq[head] += product(k_ref[head], dscores, 1, 0)  # C M

    @pl.when(_is_last(own, total, step))
    def _():
        for head in heads:
            _store_grouped(dq_ref, head, group, (dq[head] - middle[head] * rounded[head]) * scale)
            _, count, mean = _rows(_grouped(statistics_ref, head, group))
            _store_grouped(mean_ref, head, group, mean + slack[head] / count)


def dkv_kernel(
    own,
    other,
    total,
    q_ref,
    k_ref,
    v_ref,
    bounds_ref,
    dsums_ref,
    statistics_ref,
    mean_ref,
    dk_ref,
    dv_ref,
    dk,
    dv,
    *,
    group,
    scale,
):
    """Adds the contribution of a block of queries, all of a group, to the gradients of a block of
    keys. `dk` and `dv` are [heads, U, C].

    As [U, C] the large factor of their products streams through the matrix unit untransposed.
    """
    step = pl.program_id(1)
    heads = range(k_ref.shape[0])

    @pl.when(_is_first(own, step))
    def _():
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    hidden = _hidden(other, step, bounds_ref, group)
    for head in heads:
        queries, dsums = _grouped(q_ref, head, group), _grouped(dsums_ref, head, group)
        highest, _, _ = _rows(_grouped(statistics_ref, head, group))
        statistics = highest, _grouped(mean_ref, head, group)
        weights, dscores = _weights_again(
            queries, k_ref[head], v_ref[head], dsums, *statistics, hidden, scale
        )
        dk[head] += product(dscores.astype(queries.dtype), queries, 1, 1)  # U C
        dv[head] += product(weights.astype(queries.dtype), dsums, 1, 1)

    @pl.when(_is_last(own, total, step))
    def _():
        for head in heads:
            dk_ref[head] = (dk[head] * scale).T.astype(dk_ref.dtype)
            dv_ref[head] = dv[head].T.astype(dv_ref.dtype)


def _weights_again(queries, keys, values, dsums, highest, mean, hidden, scale):
    """Recomputes the weights and the gradients of the scaled scores, both [U, M] f32, from highest
    score and mean [1, M].
    """
    weights = jnp.exp(product(keys, queries, 0, 0) * scale + hidden - highest)
    return weights, weights * (product(values, dsums, 0, 0) - mean)


def _is_first(own, step):
    return (step == 0) | (own[jnp.maximum(step - 1, 0)] != own[step])


def _is_last(own, total, step):
    end = total[0] - 1
    return (step == end) | (own[jnp.minimum(step + 1, end)] != own[step])


def _hidden(query_blocks, step, bounds_ref, group):
    """[U, M] f32: zero where a query sees a key, else HIDDEN. Computed once a step for all heads,
    it costs them one addition a score.
    """
    block = bounds_ref.shape[1]
    bounds = bounds_ref[...].T  # U 8: keys lie along sublanes, as in the scores
    query = query_blocks[step] * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 1)
    hidden = jnp.where((bounds[:, 0:1] <= query) & (query < bounds[:, 1:2]), 0.0, HIDDEN)
    return jnp.concatenate([hidden] * group, axis=1)


def _rows(statistics):
    """[3, M] -> three of [1, M]: highest score, sum of weights, mean gradient of the weights."""
    return statistics[0:1], statistics[1:2], statistics[2:3]


def _grouped(ref, head, group):
    """[C, M] of a key head: its query heads side by side."""
    return jnp.concatenate([ref[head * group + g] for g in range(group)], axis=1)


def _store_grouped(ref, head, group, value):
    block = value.shape[1] // group
    for g in range(group):
        ref[head * group + g] = value[:, g * block : (g + 1) * block].astype(ref.dtype)
