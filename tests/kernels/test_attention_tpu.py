"""Packed attention for TPUs in Pallas's interpreters, against dense attention under a mask in f64.

Blocks have 8 tokens here; on a TPU they have 128 or 256. Relative is max|difference| /
max|reference| of a tensor.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kernels import (
    BLOCK,
    CLOSE,
    ROWS,
    SEGMENTS,
    N,
    assert_close,
    draws,
    in_f64,
    relative,
    segments,
)
from forests import LAYOUTS, T, fitted, flat, row_of, span_of, trees
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreters import STRICT
from jax.experimental.pallas import tpu as pltpu
from jaxre_kernels.attention import Heads, attention, choose, visible_mask
from jaxre_kernels.attention.pairs import listed, meeting, reach_of
from jaxre_kernels.attention.tpu import packed_attention


@partial(jax.jit, static_argnames=("bounds", "interpret"))
def kernel(q, k, v, dy, visible_until, visible_from=None, bounds=(0, None), interpret=True):
    """Output and gradients of q, k and v."""
    where = dict(zip(("prefix", "span"), bounds, strict=True))
    out, back = jax.vjp(
        lambda q, k, v: packed_attention(
            q, k, v, visible_until, visible_from, block=BLOCK, interpret=interpret, **where
        ),
        q,
        k,
        v,
    )
    return out, *back(dy)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels"),
    [(2, 2, 64), (3, 1, 128), (8, 2, 32), (7, 1, 80), (16, 2, 24)],
    ids=lambda value: str(value),
)
def test_output_and_gradients_equal_dense_attention_in_f64(heads, kv_heads, channels):
    """Every layout is a row of the batch; the row is no multiple of the block; 24 channels are no
    multiple of 16.
    """
    arrays = draws(heads, kv_heads, channels)
    for ours, reference in zip(
        kernel(*arrays, ROWS), in_f64(*arrays, visible_mask(ROWS)), strict=True
    ):
        assert ours.dtype == jnp.float32
        assert relative(ours, reference) < CLOSE


def test_each_layout_alone_equals_dense_attention():
    arrays = draws(3, 1, 128)
    assert_close(kernel(*arrays, ROWS), in_f64(*arrays, visible_mask(ROWS)), list(LAYOUTS))


@jax.jit
def xla(q, k, v, dy):
    out, back = jax.vjp(lambda q, k, v: attention(q, k, v, jnp.asarray(ROWS)), q, k, v)
    return out, *back(dy)


@pytest.mark.parametrize(("common", "allowed"), [(0.0, 1.15), (4.0, 1.02)])
def test_bfloat16_is_as_close_to_f32_as_the_xla_implementation(common, allowed):
    """Root mean square. Keys have a common part where their projection has a bias, and the gradient
    of queries feels it.

    Without one that gradient is 1.10 of the distance here: dS is formed with a mean from the
    rounded output. With one, at half of it.
    """
    q, k, v, dy = draws(6, 2, 64, dtype=jnp.bfloat16)
    arrays = q, k + jnp.bfloat16(common), v, dy
    reference = in_f64(*(value.astype(jnp.float32) for value in arrays), visible_mask(ROWS))

    def distance(value, exact):
        return float(np.sqrt(np.mean((np.asarray(value, np.float64) - exact) ** 2)))

    for ours, theirs, exact in zip(kernel(*arrays, ROWS), xla(*arrays), reference, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert distance(ours, exact) < allowed * distance(theirs, exact)


@pytest.mark.parametrize(
    ("heads", "kv_heads"),
    [
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(2, 2), (4, 1), (7, 1)]),
        (3, 1),
        (8, 1),
    ],
    ids=str,
)
def test_segments_seen_both_ways_equal_dense_attention(heads, kv_heads):
    """Encoders: a token sees all of its own segment."""
    first, until, mask = segments(SEGMENTS.values())
    arrays = draws(heads, kv_heads, 16, rows=len(until))
    assert_close(kernel(*arrays, until, first), in_f64(*arrays, mask), list(SEGMENTS))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(lengths=st.lists(st.lists(st.integers(1, 20), max_size=8), min_size=5, max_size=5))
def test_any_segments_seen_both_ways_equal_dense_attention(lengths):
    """Five rows of three heads, as above: what was compiled is used again."""
    first, until, mask = segments([fitted(flat(*row), T)[0] for row in lengths])
    arrays = draws(3, 1, 16, rows=5)
    assert_close(kernel(*arrays, until, first), in_f64(*arrays, mask))


def test_bounds_change_nothing_but_the_length_of_the_lists():
    row = row_of(LAYOUTS["nested prefixes"]).astype(np.int32)[None]
    bounds = (6, span_of(row, 6))
    assert reach_of(T, BLOCK, *bounds).bound(N) < reach_of(T, BLOCK).bound(N)
    arrays = draws(2, 1, 16, rows=1)
    for ours, unbound in zip(
        kernel(*arrays, row, bounds=bounds), kernel(*arrays, row), strict=True
    ):
        assert np.array_equal(ours, unbound)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(forest=st.lists(trees(3), max_size=6), seed=st.integers(0, 99))
def test_any_layout_equals_dense_attention(forest, seed):
    row = row_of(fitted(forest, T)[0]).astype(np.int32)[None]
    arrays = draws(2, 1, 16, rows=1, seed=seed)
    assert_close(kernel(*arrays, row), in_f64(*arrays, visible_mask(row)))


@pytest.mark.parametrize("both_ways", [False, True])
def test_no_race_no_read_out_of_bounds_and_nothing_read_before_it_is_written(both_ways):
    """Rows with blocks that are skipped, two key heads in a step."""
    if both_ways:
        first, rows, mask = segments([LAYOUTS["packed"]])
    else:
        rows = np.stack(
            [row_of(LAYOUTS[layout]) for layout in ("packed", "tokens of length one")]
        ).astype(np.int32)
        first, mask = None, visible_mask(rows)
    arrays = draws(6, 2, 16, rows=len(rows))
    found = kernel(*arrays, rows, first, interpret=STRICT)
    for ours, reference in zip(found, in_f64(*arrays, mask), strict=True):
        assert relative(ours, reference) < CLOSE


# ---- what is skipped --------------------------------------------------------------------------


def block_pairs(mask: np.ndarray) -> set[tuple[int, int]]:
    """Blocks of queries and keys with a visible pair, by looking at every pair; the blocks of all
    rows numbered through.
    """
    rows = len(mask)
    behind = N * BLOCK - T
    padded = np.pad(mask, ((0, 0), (0, behind), (0, behind)))
    padded |= np.eye(N * BLOCK, dtype=bool)  # tokens behind the row see themselves
    seen = padded.reshape(rows, N, BLOCK, N, BLOCK).any((2, 4))
    return {(int(b * N + m), int(b * N + n)) for b, m, n in np.argwhere(seen)}


def lists(visible_from: np.ndarray, visible_until: np.ndarray, reach):
    """Pairs of (queries, keys), as the kernels of queries and of keys walk over them."""
    pad = np.broadcast_to(np.arange(T, N * BLOCK), (len(visible_from), N * BLOCK - T))
    meets = meeting(
        jnp.asarray(np.hstack([visible_from, pad])),
        jnp.asarray(np.hstack([visible_until, pad + 1])),
        BLOCK,
        reach,
    )
    found = []
    for transposed in (False, True):
        pairs = jax.tree.map(
            np.asarray, listed(meets.swapaxes(1, 2) if transposed else meets, reach)
        )
        assert pairs.own.shape == (len(visible_from) * reach.bound(N),)
        total = int(pairs.total[0])
        assert (np.diff(pairs.own[:total]) >= 0).all()  # the pairs of a block follow one another
        walked = list(zip(pairs.own[:total].tolist(), pairs.other[:total].tolist(), strict=True))
        assert len(set(walked)) == total
        found.append({pair[::-1] for pair in walked} if transposed else set(walked))
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    forests=st.lists(st.lists(trees(3), max_size=6), min_size=2, max_size=2),
    prefix=st.sampled_from([0, 5]),
    bound=st.booleans(),
)
def test_lists_name_exactly_the_block_pairs_with_a_visible_pair(forests, prefix, bound):
    rows = np.stack([row_of(fitted(forest, T)[0]) for forest in forests])
    reach = reach_of(T, BLOCK, prefix, max(span_of(row, prefix) for row in rows) if bound else None)
    expected = block_pairs(np.asarray(visible_mask(rows)))
    for found in lists(np.broadcast_to(np.arange(T), rows.shape), rows, reach):
        assert found == expected


@settings(max_examples=30, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 20), max_size=8), bound=st.booleans())
def test_lists_of_segments_seen_both_ways_name_exactly_the_block_pairs_with_a_visible_pair(
    lengths, bound
):
    first, until, mask = segments([fitted(flat(*lengths), T)[0]])
    reach = reach_of(T, BLOCK, 0, int((until - first).max()) if bound else None, causal=False)
    for found in lists(first, until, reach):
        assert found == block_pairs(mask)


def test_blocks_without_a_visible_pair_are_not_looked_at():
    """NaN in keys, values and gradients of one example would reach any block that multiplies them,
    whatever its mask.
    """
    row = np.full((1, T), T)
    row[:, :16] = 16  # two blocks, and what is behind
    arrays = [value.at[:, :16].set(jnp.nan) for value in draws(2, 1, 16, rows=1)]
    for ours, clean in zip(
        kernel(*arrays, row.astype(np.int32)),
        kernel(*draws(2, 1, 16, rows=1), row.astype(np.int32)),
        strict=True,
    ):
        assert np.isnan(ours[:, :16]).all()
        assert np.array_equal(ours[:, 16:], clean[:, 16:])


def test_backward_pass_keeps_two_numbers_a_query_and_head():
    q, k, v, _ = draws(4, 2, 16)
    _, back = jax.eval_shape(
        lambda q, k, v: jax.vjp(
            lambda q, k, v: packed_attention(q, k, v, ROWS, block=BLOCK), q, k, v
        ),
        q,
        k,
        v,
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(back)]
    statistics, bounds = (4, 2, len(ROWS) * N * BLOCK), (2, len(ROWS), N * BLOCK)
    assert sorted(shapes) == sorted([q.shape, k.shape, v.shape, q.shape, statistics, bounds])


# ---- by its public name -----------------------------------------------------------------------


def test_attention_runs_it_by_name_and_never_by_itself():
    """160 tokens: two blocks of 128. Two groups of key heads do not fit a step."""
    draw = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(draw.standard_normal((1, 160, heads, 16)), jnp.float32) for heads in (20, 2, 2)
    )
    until = jnp.asarray(np.repeat([40, 131, 160], [40, 91, 29])[None])
    with pltpu.force_tpu_interpret_mode(STRICT):
        found = attention(q, k, v, until, span=91, implementation="pallas_tpu")
        assert "pallas_call" not in str(jax.make_jaxpr(attention)(q, k, v, until))
    assert relative(found, attention(q, k, v, until)) < CLOSE


@pytest.mark.parametrize(
    ("length", "heads", "words"),
    [
        (1024, Heads(8, 9, 3, 64, jnp.float64), "it takes float32 and bfloat16, not float64"),
        (1024, Heads(8, 9, 3, 64, jnp.float16), "not float16"),
        (1024, Heads(8, 9, 2, 64, jnp.bfloat16), "9 query heads are no multiple of 2 key heads"),
        (131072, Heads(1, 9, 3, 64, jnp.bfloat16), "scalar memory"),
        (1024, Heads(1, 256, 1, 512, jnp.float32), "vector memory"),
    ],
    ids=str,
)
def test_what_it_does_not_take_is_said_beforehand(length, heads, words):
    with pytest.raises(ValueError, match=words):
        choose(length, heads=heads, implementation="pallas_tpu")
    assert choose(length, heads=heads)[0] == "xla"


def test_what_it_takes_is_told_with_its_blocks():
    heads = Heads(8, 9, 3, 64, jnp.bfloat16)
    name, why = choose(8192, 40, 200, heads=heads, implementation="pallas_tpu")
    assert name == "pallas_tpu" and "unverified" in why and "blocks of 128 tokens of 8,192" in why
    assert "blocks of 256 tokens" in choose(8192, heads=heads, implementation="pallas_tpu")[1]
    assert "unverified" in choose(implementation="pallas_tpu")[1]


def test_arrays_it_does_not_take_are_refused_by_attention():
    with jax.enable_x64(True), pytest.raises(ValueError, match="not float64"):
        attention(
            *(jnp.ones((1, 16, 1, 8), jnp.float64) for _ in range(3)),
            jnp.full((1, 16), 16),
            implementation="pallas_tpu",
        )
