"""Packed attention for GPUs, for Hopper and for what is older, in Pallas's interpreter, against
dense attention under a mask in f64.

Blocks have 8 tokens here; on a GPU they have 64. The interpreter takes f32, a GPU bf16 alone.
Relative is max|difference| / max|reference| of a tensor.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kernels import BLOCK, CLOSE, ROWS, N, assert_close, draws, in_f64, relative, segments
from forests import LAYOUTS, T, fitted, flat, row_of, span_of, trees
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreters import needs_interpreter, strict
from jaxre_kernels.attention import Heads, attention, choose, gpu, gpu_sm80, visible_mask


@partial(jax.jit, static_argnames=("bounds", "races", "kernels"))
def kernel(
    q, k, v, dy, visible_until, visible_from=None, bounds=(0, None), races=False, kernels=gpu
):
    """Output and gradients of q, k and v."""
    where = dict(zip(("prefix", "span"), bounds, strict=True))
    attend = partial(
        kernels.packed_attention, block=BLOCK, interpret=strict(detect_races=races), **where
    )
    out, back = jax.vjp(lambda q, k, v: attend(q, k, v, visible_until, visible_from), q, k, v)
    return out, *back(dy)


def told(value) -> str:
    """A number, or the name of a module."""
    return getattr(value, "__name__", str(value)).rpartition(".")[2]


both_kernels = pytest.mark.parametrize("kernels", [gpu, gpu_sm80], ids=["hopper", "sm80"])


@needs_interpreter
@pytest.mark.parametrize(
    ("kernels", "heads", "kv_heads", "channels"),
    [
        *((gpu, *sizes) for sizes in [(1, 1, 64), (4, 1, 64), (6, 2, 128), (7, 1, 80), (8, 1, 24)]),
        *((gpu_sm80, *sizes) for sizes in [(3, 1, 128), (6, 2, 24)]),
    ],
    ids=told,
)
def test_output_and_gradients_equal_dense_attention_in_f64(kernels, heads, kv_heads, channels):
    """Ratios of 1, 3, 4, 7 and 8 query heads a key head, rows that are no multiple of the block,
    widths that are padded.

    Two rows where there are two key heads, so that heads and rows cannot be taken for one another;
    one elsewhere.
    """
    rows = np.stack(
        [row_of(LAYOUTS[layout]) for layout in ("nested prefixes", "packed")[:kv_heads]]
    ).astype(np.int32)
    arrays = draws(heads, kv_heads, channels, rows=len(rows))
    for ours, reference in zip(
        kernel(*arrays, rows, kernels=kernels), in_f64(*arrays, visible_mask(rows)), strict=True
    ):
        assert ours.dtype == jnp.float32
        assert relative(ours, reference) < CLOSE


SHORT = 20  # tokens: two blocks and a half


@needs_interpreter
@pytest.mark.parametrize(("heads", "channels"), [(1, 64), (4, 24), (7, 80), (8, 64)], ids=str)
def test_older_gpus_have_every_number_of_query_heads_a_key_head(heads, channels):
    """A prefix that two examples share, a token that sees itself alone, one example over a boundary
    of blocks, pads.
    """
    rows = row_of([(5, [(3, []), (4, [])]), (1, []), (4, [])], SHORT).astype(np.int32)[None]
    arrays = draws(heads, 1, channels, rows=1, tokens=SHORT)
    assert_close(kernel(*arrays, rows, kernels=gpu_sm80), in_f64(*arrays, visible_mask(rows)))


@needs_interpreter
@both_kernels
def test_each_layout_alone_equals_dense_attention(kernels):
    arrays = draws(1, 1, 64)
    assert_close(
        kernel(*arrays, ROWS, kernels=kernels), in_f64(*arrays, visible_mask(ROWS)), list(LAYOUTS)
    )


@jax.jit
def xla(q, k, v, dy, visible_until):
    out, back = jax.vjp(lambda q, k, v: attention(q, k, v, visible_until), q, k, v)
    return out, *back(dy)


@needs_interpreter
@pytest.mark.parametrize(("common", "allowed"), [(0.0, 1.15), (4.0, 1.02)])
def test_bfloat16_is_as_close_to_f32_as_the_xla_implementation(common, allowed):
    """Root mean square. Keys have a common part where their projection has a bias, and the gradient
    of queries feels it.

    Without one that gradient is at 1.10 of the distance: dS is formed with a mean from the rounded
    output. With one, at half of it.
    """
    rows = np.stack(
        [row_of(LAYOUTS[layout]) for layout in ("one example", "nested prefixes", "two roots")]
    ).astype(np.int32)
    q, k, v, dy = draws(3, 1, 64, rows=len(rows), dtype=jnp.bfloat16)
    arrays = q, k + jnp.bfloat16(common), v, dy
    reference = in_f64(*(value.astype(jnp.float32) for value in arrays), visible_mask(rows))

    def distance(value, exact):
        return float(np.sqrt(np.mean((np.asarray(value, np.float64) - exact) ** 2)))

    for ours, theirs, exact in zip(
        kernel(*arrays, rows), xla(*arrays, rows), reference, strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        assert distance(ours, exact) < allowed * distance(theirs, exact)


# Query heads of a key head, and rows of 20 tokens.
BOTH_WAYS = {
    1: [flat(20), flat(11, 1, 5), flat(8, 8, 4), flat(), flat(*[1] * 20)],
    3: [flat(20)],
    4: [flat(11, 1, 5)],
    7: [flat(3, 9, 2, 6)],
    8: [flat(1, 1, 14, 2)],
}


@needs_interpreter
@pytest.mark.parametrize(
    ("heads", "kernels"),
    [*((heads, gpu) for heads in BOTH_WAYS), (1, gpu_sm80), (7, gpu_sm80)],
    ids=told,
)
def test_segments_seen_both_ways_equal_dense_attention(heads, kernels):
    """Encoders: a token sees all of its own segment. One segment, whole blocks, pads alone, tokens
    alone, and what lies across blocks.
    """
    first, until, mask = segments(BOTH_WAYS[heads], SHORT)
    arrays = draws(heads, 1, 64, rows=len(until), tokens=SHORT)
    assert_close(kernel(*arrays, until, first, kernels=kernels), in_f64(*arrays, mask))


@needs_interpreter
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.lists(st.integers(1, 20), max_size=8), min_size=5, max_size=5),
    kernels=st.sampled_from([gpu, gpu_sm80]),
)
def test_any_segments_seen_both_ways_equal_dense_attention(lengths, kernels):
    """Five rows, as above: what was compiled is used again."""
    first, until, mask = segments([fitted(flat(*row), SHORT)[0] for row in lengths], SHORT)
    arrays = draws(1, 1, 64, rows=5, tokens=SHORT)
    assert_close(kernel(*arrays, until, first, kernels=kernels), in_f64(*arrays, mask))


@needs_interpreter
def test_bounds_change_nothing():
    row = row_of(LAYOUTS["nested prefixes"]).astype(np.int32)[None]
    bounds = (6, span_of(row, 6))
    arrays = draws(2, 1, 64, rows=1)
    for ours, unbound in zip(
        kernel(*arrays, row, bounds=bounds), kernel(*arrays, row), strict=True
    ):
        assert np.array_equal(ours, unbound)


@needs_interpreter
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    forest=st.lists(trees(3), max_size=6),
    seed=st.integers(0, 99),
    kernels=st.sampled_from([gpu, gpu_sm80]),
)
def test_any_layout_equals_dense_attention(forest, seed, kernels):
    row = row_of(fitted(forest, T)[0]).astype(np.int32)[None]
    arrays = draws(1, 1, 64, rows=1, seed=seed)
    assert_close(kernel(*arrays, row, kernels=kernels), in_f64(*arrays, visible_mask(row)))


@needs_interpreter
@both_kernels
@pytest.mark.parametrize("both_ways", [False, True])
def test_no_race_no_read_out_of_bounds_and_nothing_read_before_it_is_written(both_ways, kernels):
    """Rows with blocks that are skipped, blocks that meet one, two and all others, three query
    heads a key head.
    """
    if both_ways:
        first, rows, mask = segments([LAYOUTS["packed"]])
    else:
        rows = np.stack([row_of(LAYOUTS[layout]) for layout in ("packed", "one example")]).astype(
            np.int32
        )
        first, mask = None, visible_mask(rows)
    arrays = draws(3, 1, 64, rows=len(rows))
    found = kernel(*arrays, rows, first, races=True, kernels=kernels)
    for ours, reference in zip(found, in_f64(*arrays, mask), strict=True):
        assert relative(ours, reference) < CLOSE


@needs_interpreter
@both_kernels
def test_blocks_without_a_visible_pair_are_not_looked_at(kernels):
    """NaN in keys, values and gradients of one example would reach any block that multiplies them,
    whatever its mask.
    """
    row = np.full((1, T), T)
    row[:, :16] = 16  # two blocks, and what is behind
    arrays = [value.at[:, :16].set(jnp.nan) for value in draws(2, 1, 64, rows=1)]
    row = row.astype(np.int32)
    found = kernel(*arrays, row, kernels=kernels)
    for ours, clean in zip(
        found, kernel(*draws(2, 1, 64, rows=1), row, kernels=kernels), strict=True
    ):
        assert np.isnan(ours[:, :16]).all()
        assert np.array_equal(ours[:, 16:], clean[:, 16:])


@needs_interpreter
def test_backward_pass_keeps_two_numbers_a_query_and_head():
    q, k, v, _ = draws(4, 2, 64)
    _, back = jax.eval_shape(
        lambda q, k, v: jax.vjp(
            lambda q, k, v: gpu.packed_attention(q, k, v, ROWS, block=BLOCK, interpret=strict()),
            q,
            k,
            v,
        ),
        q,
        k,
        v,
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(back)]
    statistics, bounds = (2, len(ROWS), 4, N * BLOCK), (2, len(ROWS), N * BLOCK)
    assert sorted(shapes) == sorted([q.shape, k.shape, v.shape, q.shape, statistics, bounds])


# ---- by its public name -----------------------------------------------------------------------


NAMES = {"pallas_gpu": gpu, "pallas_gpu_sm80": gpu_sm80}


@needs_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_attention_runs_it_by_name_and_never_by_itself(name, monkeypatch):
    """160 tokens: three blocks of 64."""
    monkeypatch.setattr(
        NAMES[name], "packed_attention", partial(NAMES[name].packed_attention, interpret=strict())
    )
    draw = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(draw.standard_normal((1, 160, heads, 64)), jnp.bfloat16) for heads in (3, 1, 1)
    )
    until = jnp.asarray(np.repeat([40, 131, 160], [40, 91, 29])[None])
    found = attention(q, k, v, until, span=91, implementation=name)
    assert "attention_forward" not in str(jax.make_jaxpr(attention)(q, k, v, until))
    # Both round weights and output to bf16, at different maxima.
    assert relative(found, attention(q, k, v, until)) < 2**-7


@pytest.mark.parametrize(
    ("length", "heads", "words"),
    [
        (1024, Heads(8, 9, 3, 64, jnp.float32), "it takes bfloat16, not float32"),
        (1024, Heads(8, 9, 2, 64, jnp.bfloat16), "9 query heads are no multiple of 2 key heads"),
        (1024, Heads(8, 9, 3, 192, jnp.bfloat16), "at most 128 channels, not 192"),
        (2**20, Heads(8, 9, 3, 64, jnp.bfloat16), "131,072 blocks of 64 tokens"),
    ],
    ids=str,
)
@needs_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_what_it_does_not_take_is_said_beforehand(length, heads, words, name):
    with pytest.raises(ValueError, match=words):
        choose(length, heads=heads, implementation=name)
    assert choose(length, heads=heads)[0] == "xla"


@pytest.mark.skipif(gpu.MISSING is None, reason="this jax has what the kernels need")
@pytest.mark.parametrize("name", NAMES)
def test_a_jax_that_is_too_old_is_named_in_the_refusal(name):
    with pytest.raises(ValueError, match="needs jax"):
        choose(1024, heads=Heads(8, 9, 3, 64, jnp.bfloat16), implementation=name)


@needs_interpreter
@pytest.mark.parametrize("name", NAMES)
def test_what_it_takes_is_told_with_its_blocks(name):
    chosen, why = choose(8192, 40, 200, heads=Heads(8, 9, 3, 64, jnp.bfloat16), implementation=name)
    assert chosen == name and "unverified" in why and "blocks of 64 tokens of 8,192" in why
    assert "unverified" in choose(implementation=name)[1]


# ---- layouts of registers ---------------------------------------------------------------------


def places(layout, shape):
    """[warps, lanes, registers, numbers of a register]: which element of an array of `shape` each
    thread holds where.
    """
    from jax.experimental.mosaic.gpu.fragmented_array import Replicated

    numbers = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        outer = numbers.ndim - len(tile)
        split = [
            size
            for length, part in zip(numbers.shape[outer:], tile, strict=True)
            for size in (length // part, part)
        ]
        numbers = numbers.reshape(*numbers.shape[:outer], *split)
        numbers = numbers.transpose(
            *range(outer), *range(outer, numbers.ndim, 2), *range(outer + 1, numbers.ndim, 2)
        )
    warps, lanes = (
        [dim for dim in dims if not isinstance(dim, Replicated)]
        for dims in (layout.warp_dims, layout.lane_dims)
    )
    first = [*warps, *lanes]
    numbers = np.moveaxis(numbers, [*first, layout.vector_dim], [*range(len(first)), -1])
    copies = np.prod(
        [dim.times for dim in layout.warp_dims if isinstance(dim, Replicated)], dtype=int
    )
    held = numbers.reshape(-1, 32, int(np.prod(numbers.shape[len(first) : -1])), numbers.shape[-1])
    return np.tile(held, (copies, 1, 1, 1))


@needs_interpreter
def test_a_result_of_mma_is_a_left_factor_of_the_next_under_other_numbers():
    """That is all that the kernels for older GPUs do between the two, and it is not run by the
    interpreter.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxre_kernels.attention.gpu_tiles import TILE

    tile, factor = TILE.to_mgpu(), plgpu.Layout.MMA_LHS(jnp.bfloat16).to_mgpu()
    assert tile == plgpu.Layout.MMA_ACC(jnp.bfloat16).to_mgpu()
    for shape in [(64, 64), (64, 32)]:
        assert np.array_equal(places(tile, shape), places(factor, shape))
    # PTX ISA, mma.m16n8k16: number i of A is in row lane / 4 (+ 8 for i of 2, 3, 6, 7), column 2
    # (lane % 4) + i % 2 (+ 8 from i = 4 on).
    warp, lane, i = np.ogrid[:4, :32, :8]
    row, column = 16 * warp + lane // 4 + 8 * (i // 2 % 2), 2 * (lane % 4) + i % 2 + 8 * (i // 4)
    assert np.array_equal(places(factor, (64, 16)).reshape(4, 32, 8), 16 * row + column)
