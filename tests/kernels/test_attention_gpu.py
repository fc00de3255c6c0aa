"""Packed attention for GPUs in Pallas's interpreter, against dense attention under a mask in f64.

Blocks have 8 tokens here; on a GPU they have 64. The interpreter takes f32, a GPU bf16 alone. Relative is max|difference| /
max|reference| of a tensor.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_kernels import BLOCK, CLOSE, ROWS, N, draws, in_f64, relative, segments
from forests import LAYOUTS, T, fitted, row_of, span_of, trees
from gpu_interpreter import fresh_interpreter, strict  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxre_kernels.attention import Heads, attention, choose, gpu, visible_mask
from jaxre_kernels.attention.gpu import packed_attention

needs_interpreter = pytest.mark.skipif(gpu.MISSING is not None, reason=str(gpu.MISSING))


@partial(jax.jit, static_argnames=("bounds", "races"))
def kernel(q, k, v, dy, visible_until, visible_from=None, bounds=(0, None), races=False):
    """Output and gradients of q, k and v."""
    where = dict(zip(("prefix", "span"), bounds, strict=True))
    out, back = jax.vjp(
        lambda q, k, v: packed_attention(q, k, v, visible_until, visible_from, block=BLOCK, interpret=strict(detect_races=races), **where),
        q,
        k,
        v,
    )
    return out, *back(dy)


@needs_interpreter
@pytest.mark.parametrize(
    ("heads", "kv_heads", "channels"), [(1, 1, 64), (3, 1, 128), (4, 1, 64), (7, 1, 80), (16, 2, 24)], ids=lambda value: str(value)
)
def test_output_and_gradients_equal_dense_attention_in_f64(heads, kv_heads, channels):
    """Ratios of 1, 3, 4, 7 and 8 query heads a key head, rows that are no multiple of the block, widths that are padded."""
    rows = np.stack([row_of(LAYOUTS[layout]) for layout in ("packed", "nested prefixes", "pads behind")]).astype(np.int32)
    arrays = draws(heads, kv_heads, channels, rows=len(rows))
    for ours, reference in zip(kernel(*arrays, rows), in_f64(*arrays, visible_mask(rows)), strict=True):
        assert ours.dtype == jnp.float32
        assert relative(ours, reference) < CLOSE


@needs_interpreter
def test_each_layout_alone_equals_dense_attention():
    """Row by row, so that no layout hides behind the largest number of another."""
    arrays = draws(2, 1, 64)
    for ours, reference in zip(kernel(*arrays, ROWS), in_f64(*arrays, visible_mask(ROWS)), strict=True):
        for layout, one, other in zip(LAYOUTS, np.asarray(ours), reference, strict=True):
            # Gradients of scores are differences of products dO V', about the root of 64 channels large; where a token sees itself
            # alone they are zero, and what is left is the rounding of these.
            assert np.abs(one - other).max() < CLOSE * max(64**0.5, np.abs(other).max()), layout


@jax.jit
def xla(q, k, v, dy):
    out, back = jax.vjp(lambda q, k, v: attention(q, k, v, jnp.asarray(ROWS)), q, k, v)
    return out, *back(dy)


@needs_interpreter
@pytest.mark.parametrize(("common", "allowed"), [(0.0, 1.15), (4.0, 1.02)])
def test_bfloat16_is_as_close_to_f32_as_the_xla_implementation(common, allowed):
    """Root mean square. Keys have a common part where their projection has a bias, and the gradient of queries feels it.

    Without one that gradient is at 1.10 of the distance: dS is formed with a mean from the rounded output. With one, at half of it.
    """
    q, k, v, dy = draws(6, 2, 64, dtype=jnp.bfloat16)
    arrays = q, k + jnp.bfloat16(common), v, dy
    reference = in_f64(*(value.astype(jnp.float32) for value in arrays), visible_mask(ROWS))

    def distance(value, exact):
        return float(np.sqrt(np.mean((np.asarray(value, np.float64) - exact) ** 2)))

    for ours, theirs, exact in zip(kernel(*arrays, ROWS), xla(*arrays), reference, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert distance(ours, exact) < allowed * distance(theirs, exact)


@needs_interpreter
@pytest.mark.parametrize("layout", ["one example", "packed", "all pad", "tokens of length one"])
def test_segments_seen_both_ways_equal_dense_attention(layout):
    """Encoders: a token sees all of its own segment."""
    first, until = segments(row_of(LAYOUTS[layout]).astype(np.int32))
    arrays = draws(2, 1, 64, rows=1)
    same = first[None, :, None] == first[None, None, :]
    for ours, reference in zip(kernel(*arrays, until[None], first[None]), in_f64(*arrays, same), strict=True):
        assert np.abs(np.asarray(ours) - reference).max() < CLOSE * max(64**0.5, np.abs(reference).max())


@needs_interpreter
def test_bounds_change_nothing():
    row = row_of(LAYOUTS["nested prefixes"]).astype(np.int32)[None]
    bounds = (6, span_of(row, 6))
    arrays = draws(2, 1, 64, rows=1)
    for ours, unbound in zip(kernel(*arrays, row, bounds=bounds), kernel(*arrays, row), strict=True):
        assert np.array_equal(ours, unbound)


@needs_interpreter
@settings(max_examples=10, deadline=None, derandomize=True)
@given(forest=st.lists(trees(3), max_size=6), seed=st.integers(0, 99))
def test_any_layout_equals_dense_attention(forest, seed):
    row = row_of(fitted(forest, T)[0]).astype(np.int32)[None]
    arrays = draws(2, 1, 64, rows=1, seed=seed)
    for ours, reference in zip(kernel(*arrays, row), in_f64(*arrays, visible_mask(row)), strict=True):
        assert np.abs(np.asarray(ours) - reference).max() < CLOSE * max(64**0.5, np.abs(reference).max())


@needs_interpreter
@pytest.mark.parametrize("both_ways", [False, True])
def test_no_race_no_read_out_of_bounds_and_nothing_read_before_it_is_written(both_ways, capfd):
    """Rows with blocks that are skipped, blocks that meet one, two and all others, three query heads a key head."""
    rows = np.stack([row_of(LAYOUTS[layout]) for layout in ("packed", "one example")]).astype(np.int32)
    if both_ways:
        first, rows = segments(rows[0])
        first, rows = first[None], rows[None]
        mask = first[:, :, None] == first[:, None, :]
    else:
        first, mask = None, visible_mask(rows)
    arrays = draws(3, 1, 64, rows=len(rows))
    found = kernel(*arrays, rows, first, races=True)
    for ours, reference in zip(found, in_f64(*arrays, mask), strict=True):
        assert relative(ours, reference) < CLOSE
    assert "RACE" not in "".join(capfd.readouterr())


@needs_interpreter
def test_blocks_without_a_visible_pair_are_not_looked_at():
    """NaN in keys, values and gradients of one example would reach any block that multiplies them, whatever its mask."""
    row = np.full((1, T), T)
    row[:, :16] = 16  # two blocks, and what is behind
    arrays = [value.at[:, :16].set(jnp.nan) for value in draws(2, 1, 64, rows=1)]
    for ours, clean in zip(kernel(*arrays, row.astype(np.int32)), kernel(*draws(2, 1, 64, rows=1), row.astype(np.int32)), strict=True):
        assert np.isnan(ours[:, :16]).all()
        assert np.array_equal(ours[:, 16:], clean[:, 16:])


@needs_interpreter
def test_backward_pass_keeps_two_numbers_a_query_and_head():
    q, k, v, _ = draws(4, 2, 64)
    _, back = jax.eval_shape(
        lambda q, k, v: jax.vjp(lambda q, k, v: packed_attention(q, k, v, ROWS, block=BLOCK, interpret=strict()), q, k, v), q, k, v
    )
    shapes = [leaf.shape for leaf in jax.tree.leaves(back)]
    statistics, bounds = (2, len(ROWS), 4, N * BLOCK), (2, len(ROWS), N * BLOCK)
    assert sorted(shapes) == sorted([q.shape, k.shape, v.shape, q.shape, statistics, bounds])


# ---- by its public name -----------------------------------------------------------------------


@needs_interpreter
def test_attention_runs_it_by_name_and_never_by_itself(monkeypatch):
    """160 tokens: three blocks of 64."""
    monkeypatch.setattr(gpu, "packed_attention", partial(packed_attention, interpret=strict()))
    draw = np.random.default_rng(0)
    q, k, v = (jnp.asarray(draw.standard_normal((1, 160, heads, 64)), jnp.bfloat16) for heads in (3, 1, 1))
    until = jnp.asarray(np.repeat([40, 131, 160], [40, 91, 29])[None])
    found = attention(q, k, v, until, span=91, implementation="pallas_gpu")
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
def test_what_it_does_not_take_is_said_beforehand(length, heads, words):
    with pytest.raises(ValueError, match=words):
        choose(length, heads=heads, implementation="pallas_gpu")
    assert choose(length, heads=heads)[0] == "xla"


@pytest.mark.skipif(gpu.MISSING is None, reason="this jax has what the kernels need")
def test_a_jax_that_is_too_old_is_named_in_the_refusal():
    with pytest.raises(ValueError, match="needs jax"):
        choose(1024, heads=Heads(8, 9, 3, 64, jnp.bfloat16), implementation="pallas_gpu")


@needs_interpreter
def test_what_it_takes_is_told_with_its_blocks():
    name, why = choose(8192, 40, 200, heads=Heads(8, 9, 3, 64, jnp.bfloat16), implementation="pallas_gpu")
    assert name == "pallas_gpu" and "unverified" in why and "blocks of 64 tokens of 8,192" in why
    assert "unverified" in choose(implementation="pallas_gpu")[1]
