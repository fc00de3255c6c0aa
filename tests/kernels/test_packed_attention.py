"""Packed attention against a loop over queries that follows the definition, and blockwise against
dense under a mask.

Relative is max|difference| / max|reference| of a tensor.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forests import LAYOUTS, T, fitted, row_of, span_of, trees
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxre_kernels.attention import (
    Blocks,
    Window,
    attention,
    blocks_of,
    blockwise,
    blockwise_attention,
    choose,
    masked_attention,
    visible_mask,
)

from jaxre.profiling.ledger import program_flops

# Sums of at most 40 products in f32, in another order.
CLOSE = 2e-6

# [T] `visible_until` of a row: one example, three packed, a prefix shared by two examples, with
# pads behind.
ROWS = {
    "one example": [12] * 12,
    "packed": [4] * 4 + [9] * 5 + [12] * 3,
    "shared prefix": [12] * 5 + [8] * 3 + [12] * 4,
    "tree of two levels": [11] * 2 + [7] * 2 + [5] + [7] * 2 + [11] * 4 + [12],
    "pads": [5] * 5 + [6, 7, 8, 9, 10, 11, 12],
}


def draws(heads: int, kv_heads: int, rows: int = 1, length: int = 12, channels: int = 8):
    draw = np.random.default_rng(0)
    return [
        draw.standard_normal((rows, length, count, channels)).astype(np.float32)
        for count in (heads, kv_heads, kv_heads, heads)
    ]


def by_definition(q, k, v, visible_until):
    """Token i of a row sees token j exactly when j <= i < visible_until[j]; query head h uses key
    head h // (H/K).
    """
    out = np.zeros(q.shape, np.float64)
    B, T, H, C = q.shape
    for b, i, h in np.ndindex(B, T, H):
        shared = h // (H // k.shape[2])
        seen = [j for j in range(i + 1) if i < visible_until[b][j]]
        scores = np.array([q[b, i, h] @ k[b, j, shared] for j in seen], np.float64) / np.sqrt(C)
        weights = np.exp(scores - scores.max())
        out[b, i, h] = (weights / weights.sum()) @ v[b, seen, shared].astype(np.float64)
    return out


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_equals_its_definition(row, heads, kv_heads):
    q, k, v, _ = draws(heads, kv_heads)
    visible_until = np.array([ROWS[row]])
    found = np.asarray(attention(q, k, v, jnp.asarray(visible_until)))
    expected = by_definition(q, k, v, visible_until)
    assert np.abs(found - expected).max() / np.abs(expected).max() < CLOSE


def test_rows_of_a_batch_have_their_own_masks():
    q, k, v, _ = draws(4, 2, rows=len(ROWS))
    visible_until = np.array(list(ROWS.values()))
    found = np.asarray(attention(q, k, v, jnp.asarray(visible_until)))
    assert np.abs(found - by_definition(q, k, v, visible_until)).max() < CLOSE * 10


@pytest.mark.parametrize("row", ROWS)
def test_gradients_of_a_packed_row_are_finite_and_stay_within_what_is_seen(row):
    """The gradient of token i's output reaches exactly the keys that i sees."""
    q, k, v, dy = map(jnp.asarray, draws(4, 2))
    visible_until = jnp.asarray([ROWS[row]])
    seen = np.asarray(visible_mask(visible_until))[0]

    @jax.jit
    def reach(i):
        def one(q, k, v):
            return (attention(q, k, v, visible_until)[0, i] * dy[0, i]).sum()

        return jax.grad(one, argnums=(0, 1, 2))(q, k, v)

    for i in range(12):
        dq, dk, dv = map(np.asarray, reach(i))
        assert np.isfinite(dq).all() and np.isfinite(dk).all() and np.isfinite(dv).all()
        assert np.array_equal(np.abs(dv[0]).sum((1, 2)) > 0, seen[i])
        assert not np.abs(dk[0][~seen[i]]).any() and not np.abs(np.delete(dq[0], i, axis=0)).any()


def test_bfloat16_output_is_the_float32_one_rounded():
    q, k, v, _ = (jnp.asarray(value, jnp.bfloat16) for value in draws(4, 2))
    visible_until = jnp.asarray([ROWS["packed"]])
    exact = by_definition(
        *(np.asarray(value, np.float32) for value in (q, k, v)), np.asarray(visible_until)
    )
    found = attention(q, k, v, visible_until)
    assert found.dtype == jnp.bfloat16
    # weights and output are rounded to 8 bits: 2^-8 each of values up to about 2
    assert np.abs(np.asarray(found, np.float32) - exact).max() < 2e-2


def test_an_implementation_that_does_not_exist_is_refused_by_name():
    assert choose()[0] == "xla"
    with pytest.raises(ValueError, match=r"'cudnn' does not exist; there is .*xla"):
        choose(implementation="cudnn")


# ---- where to look ----------------------------------------------------------------------------


def relative(ours, reference) -> float:
    ours, reference = (np.asarray(value, np.float64) for value in (ours, reference))
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def both(q, k, v, dy, visible_until, blocks):
    """Output and gradients of q, k and v: blockwise, and by autodiff of dense attention under the
    mask.
    """
    mask = visible_mask(visible_until)
    ours, back = jax.vjp(
        lambda q, k, v: blockwise_attention(q, k, v, visible_until, blocks), q, k, v
    )
    reference, reference_back = jax.vjp(lambda q, k, v: masked_attention(q, k, v, mask), q, k, v)
    return (ours, *back(dy)), (reference, *reference_back(dy))


both_jitted = jax.jit(both, static_argnums=5)


@pytest.mark.parametrize("queries", [4, 16, T, 64])
@pytest.mark.parametrize("prefix", [0, 9])
def test_output_and_gradients_equal_dense_attention(queries, prefix):
    """In f64, every layout as a row of one batch; blocks that divide the row, or not, or are longer
    than it.
    """
    rows = np.array([row_of(forest) for forest in LAYOUTS.values()])
    blocks = Blocks(queries, min(T, span_of(rows, prefix) - 1), prefix)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(value, jnp.float64) for value in draws(4, 2, len(rows), T)]
        for ours, reference in zip(
            *both_jitted(*arrays, jnp.asarray(rows, jnp.int32), blocks), strict=True
        ):
            assert ours.dtype == jnp.float64
            assert relative(ours, reference) < 1e-13


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bounds_of_each_layout_cover_what_is_seen(layout):
    """The smallest span a layout allows, in f32; another head count than above."""
    row = row_of(LAYOUTS[layout])[None]
    blocks = Blocks(8, span_of(row, 9) - 1, 9)
    for ours, reference in zip(
        *both_jitted(*map(jnp.asarray, draws(3, 1, 1, T)), jnp.asarray(row), blocks), strict=True
    ):
        # Where a token sees itself alone, the gradients of q and k are zero.
        assert float(jnp.abs(ours - reference).max()) < CLOSE * (
            float(jnp.abs(reference).max()) or 1.0
        )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    forest=st.lists(trees(3), max_size=6), prefix=st.sampled_from([0, 5]), seed=st.integers(0, 99)
)
def test_any_layout_within_its_bounds_equals_dense_attention(forest, prefix, seed):
    row = row_of(fitted(forest, T)[0])
    # rounded up, so that few programs are compiled
    back = -(-(span_of(row, prefix) - 1) // 12) * 12
    draw = np.random.default_rng(seed)
    arrays = [
        jnp.asarray(draw.standard_normal((1, T, heads, 4)), jnp.float32) for heads in (2, 1, 1, 2)
    ]
    for ours, reference in zip(
        *both_jitted(*arrays, jnp.asarray(row[None]), Blocks(8, back, prefix)), strict=True
    ):
        # Gradients of q and k are zero where each token sees itself alone; all inputs are of size
        # 1.
        assert np.abs(ours - reference).max() < 1e-5 * max(1, np.abs(reference).max())


def test_bfloat16_gradients_are_as_close_as_those_of_dense_attention():
    row = jnp.asarray(row_of(LAYOUTS["nested prefixes"])[None])
    blocks = Blocks(8, span_of(np.asarray(row), 6) - 1, 6)
    arrays = [jnp.asarray(value, jnp.bfloat16) for value in draws(4, 2, 1, T)]
    _, exact = both_jitted(*(value.astype(jnp.float32) for value in arrays), row, blocks)
    for ours, dense, reference in zip(*both_jitted(*arrays, row, blocks), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        # a few roundings to 8 bits each
        assert relative(ours, reference) < max(2e-2, 1.5 * relative(dense, reference))


def test_bounds_that_are_not_given_change_nothing_but_where_one_looks():
    """640 tokens: attention by its public name takes blocks with a span and a prefix, and is dense
    without.
    """
    forest = [(40, [(90, []), (100, []), (1, []), (70, []), (99, [])])]
    until = np.full(640, 640)
    start = 40
    for own, _ in forest[0][1]:
        until[start : start + own] = start + own
        start += own
    until[:40], until[start:] = start, np.arange(start, 640) + 1
    assert blocks_of(640, 40, 100) == Blocks(128, 128, 40) and blocks_of(640) == Blocks(640)
    q, k, v, _ = map(jnp.asarray, draws(2, 1, 1, 640))
    visible_until = jnp.asarray(until[None])
    dense = attention(q, k, v, visible_until)
    assert relative(attention(q, k, v, visible_until, prefix=40, span=100), dense) < CLOSE
    assert relative(attention(q, k, v, visible_until, span=640), dense) < CLOSE


@pytest.mark.parametrize(
    ("bounds", "blocks", "words"),
    [
        ((1024, 0, None), Blocks(1024), "dense, a token may see any of 1,024"),
        (
            (1024, 26, 120),
            Blocks(128, 128, 26),
            "128 queries at a time look at up to 256 near and 26 shared keys of 1,024",
        ),
        (
            (1024, 0, 129),
            Blocks(128, 128, 0),
            "128 queries at a time look at up to 256 near and 0 shared keys of 1,024",
        ),
        ((256, 64, 100), Blocks(256), "dense"),
        ((4096, 0, 1), Blocks(128, 0, 0), "128 near"),
        ((128, 0, 40), Blocks(128), "dense"),
    ],
    ids=str,
)
def test_the_choice_follows_from_shapes_and_is_told(bounds, blocks, words):
    assert blocks_of(*bounds) == blocks
    assert words in choose(*bounds)[1]


# ---- what it costs ----------------------------------------------------------------------------


def kept_shapes(T: int, **bounds) -> set[tuple[int, ...]]:
    q, k, v = (jax.ShapeDtypeStruct((2, T, heads, 8), jnp.float32) for heads in (4, 2, 2))
    until = jax.ShapeDtypeStruct((2, T), jnp.int32)
    _, back = jax.eval_shape(
        lambda q, k, v, until: jax.vjp(
            lambda q, k, v: attention(q, k, v, until, **bounds), q, k, v
        ),
        q,
        k,
        v,
        until,
    )
    return {leaf.shape for leaf in jax.tree.leaves(back)}


@pytest.mark.parametrize("bounds", [{}, {"span": 100, "prefix": 40}], ids=str)
def test_backward_pass_keeps_no_weights_and_no_mask(bounds):
    """Only q, k, v, `visible_until` and two numbers a query and head; of T x T numbers there are
    1,048,576 a head.
    """
    shapes = kept_shapes(1024, **bounds)
    assert {(2, 1024, 4, 8), (2, 1024, 2, 8), (2, 1024)} <= shapes
    # highest score and sum, of one shape
    (softmax,) = shapes - {
        (2, 1024, 4, 8),
        (2, 1024, 2, 8),
        (2, 1024),
    }
    assert np.prod(softmax) == 2 * 1024 * 4


def test_work_and_memory_grow_with_the_span_and_not_with_the_row():
    """A row twice as long has products and arrays at most twice as large, forwards and backwards; a
    dense one four times.
    """

    def cost(T, **bounds):
        q, k, v = (jax.ShapeDtypeStruct((1, T, heads, 8), jnp.float32) for heads in (4, 2, 2))
        until = jax.ShapeDtypeStruct((1, T), jnp.int32)
        loss = jax.grad(
            lambda q, k, v, until: attention(q, k, v, until, **bounds).sum(), argnums=(0, 1, 2)
        )
        compiled = jax.jit(loss).lower(q, k, v, until).compile()
        return (
            program_flops(jax.make_jaxpr(loss)(q, k, v, until)),
            compiled.memory_analysis().temp_size_in_bytes,
        )

    (flops, memory), (twice_flops, twice_memory) = (
        cost(1024, span=100, prefix=40),
        cost(2048, span=100, prefix=40),
    )
    (dense_flops, dense_memory), (twice_dense, _) = cost(1024), cost(2048)
    assert 0 < twice_flops < 2.2 * flops and twice_dense == 4 * dense_flops
    assert twice_memory < 2.2 * memory
    # A block of 128 queries looks at 296 keys of 1,024.
    assert flops < dense_flops / 3 and memory < dense_memory / 2


def mixed_lengths():
    """[2, 600] rows of a prefix of 40 and examples of 3 to 170 tokens, the same in no block of
    128.
    """
    lengths = np.array([[3, 50, 170, 20, 65, 10, 150, 5], [60, 30, 9, 120, 40, 61, 40, 150]])
    until = np.tile(np.arange(1, 601), (2, 1))
    for row, own in zip(until, lengths, strict=True):
        ends = 40 + np.cumsum(own)
        row[: ends[-1]] = np.concatenate([np.full(40, ends[-1]), np.repeat(ends, own)])
    return until


def test_blocks_that_look_back_less_far_change_nothing():
    until, blocks = mixed_lengths(), Blocks(128, 192, 40)
    first, key = np.arange(0, 600, 128)[:, None], np.arange(600)
    back = np.where((until[:, None] > first) & (key >= 40) & (key < first), first - key, 0).max(
        (0, 2)
    )
    assert blocks.backs == (64, 128, 192) and set(np.searchsorted(blocks.backs, back)) == {0, 1, 2}
    with jax.enable_x64(True):
        arrays = [jnp.asarray(value, jnp.float64) for value in draws(4, 2, 2, 600)]
        for ours, reference in zip(
            *both_jitted(*arrays, jnp.asarray(until, jnp.int32), blocks), strict=True
        ):
            assert relative(ours, reference) < 1e-13


@pytest.mark.parametrize(("at_once", "back", "prefix"), [(2, 192, 40), (3, 300, 40), (5, 256, 0)])
def test_blocks_of_other_platforms_at_once_change_nothing(monkeypatch, at_once, back, prefix):
    """What runs elsewhere than on a CPU, here: all five blocks, or some of them with blocks behind
    the row.
    """
    monkeypatch.setattr(blockwise, "AT_ONCE", at_once * 2 * 4 * 128 * (prefix + back + 128))
    orders = blockwise._orders
    monkeypatch.setattr(blockwise, "_orders", lambda q, blocks: orders(q, blocks)[1:] * 2)
    until, blocks = mixed_lengths(), Blocks(128, back, prefix)
    if not prefix:
        until[:, :40] = np.arange(1, 41)  # each sees itself alone
    assert blockwise._orders(np.zeros((2, 600, 4, 8)), blocks)[0] == (at_once, (back,))
    with jax.enable_x64(True):
        arrays = [jnp.asarray(value, jnp.float64) for value in draws(4, 2, 2, 600)]
        found = jax.jit(lambda *given: both(*given, blocks))(*arrays, jnp.asarray(until, jnp.int32))
        for ours, reference in zip(*found, strict=True):
            assert relative(ours, reference) < 1e-13


def test_most_blocks_are_one_product_elsewhere_than_on_a_cpu():
    """By the program that is lowered: a loop of 32 steps for a CPU, none with a step for each block
    for a GPU.
    """
    q, k, v = (jax.ShapeDtypeStruct((1, 4096, heads, 64), jnp.bfloat16) for heads in (14, 2, 2))
    until = jax.ShapeDtypeStruct((1, 4096), jnp.int32)
    loss = jax.grad(
        lambda q, k, v, until: attention(q, k, v, until, prefix=32, span=176).sum(),
        argnums=(0, 1, 2),
    )
    traced = jax.jit(loss).trace(q, k, v, until)
    widest = {
        platform: max(
            map(
                int,
                re.findall(
                    r"tensor<(\d+)x\d+x\d+x\d+xf32>",
                    traced.lower(lowering_platforms=(platform,)).as_text(),
                ),
            )
        )
        for platform in ("cpu", "cuda")
    }
    assert widest["cuda"] == 32 and widest["cpu"] < 32


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere all blocks look equally far")
def test_a_block_looks_back_no_further_than_its_tokens_see():
    """A value that is not a number spoils every block that looks at it, seen or not."""
    until = np.tile(np.arange(1, 601), (1, 1))
    until[0, :500] = np.repeat([250, 500], 250)  # two examples, then pads
    q, k, v, dy = map(jnp.asarray, draws(2, 1, 1, 600))
    out, back = jax.vjp(
        lambda q, k, v: blockwise_attention(q, k, v, jnp.asarray(until), Blocks(128, 256)),
        q,
        k,
        v.at[0, 440].set(jnp.nan),
    )
    looked = jnp.isnan(out).any((0, 2, 3))
    assert looked[384:512].all() and looked[:384].sum() == 0
    assert not looked[512:].any(), "pads see themselves, and nothing 72 tokens before their block"
    assert jnp.isfinite(back(dy)[0][0, 512:]).all()


@pytest.mark.parametrize(("length", "back", "reduced"), [(48, 10, set()), (320, 200, {"s32[20]"})])
def test_a_batch_split_over_devices_stays_where_it_is(length, back, reduced):
    """On 8 simulated devices, forwards and backwards: no collective but, on a CPU, of how far each
    block looks back in any row.
    """
    program = f"""
import re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxre_kernels.attention import Blocks, blockwise_attention
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = NamedSharding(mesh, PartitionSpec("data"))
q, k, v = (
    jax.ShapeDtypeStruct((16, {length}, heads, 8), jnp.float32, sharding=rows)
    for heads in (4, 2, 2)
)
until = jax.ShapeDtypeStruct((16, {length}), jnp.int32, sharding=rows)
blocks = Blocks(16, {back}, 5)
run = jax.grad(
    lambda q, k, v, until: blockwise_attention(q, k, v, until, blocks).sum(), argnums=(0, 1, 2)
)
compiled = jax.jit(run, out_shardings=rows).lower(q, k, v, until).compile().as_text()
collectives = "all-gather|all-reduce|all-to-all|collective-permute"
moved = re.findall(r"= (.*?) (?:" + collectives + ")[a-z-]*[(]", compiled)
print(*re.findall(r"[a-z0-9]+[[][0-9,]*[]]", " ".join(moved)))
"""
    kernels = str(Path(__file__).parents[2] / "kernels")
    flags = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": kernels,
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == reduced


# ---- sliding windows -------------------------------------------------------------------------


def depths(visible_until: np.ndarray) -> np.ndarray:
    """[B, T] positions of rows: how many tokens each sees, but for itself."""
    return np.asarray(visible_mask(jnp.asarray(visible_until))).sum(-1).astype(np.int32) - 1


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("length", [1, 2, 3, 12])
def test_a_window_is_measured_in_positions(row, length):
    """Written out: token i sees its own last `length` ancestors, itself the last of them, whatever
    lies between them in the row.
    """
    visible_until = np.array([ROWS[row]])
    positions = depths(visible_until)
    found = np.asarray(
        visible_mask(jnp.asarray(visible_until), Window(jnp.asarray(positions), length))
    )[0]
    for i in range(12):
        ancestors = [j for j in range(i + 1) if i < visible_until[0, j]]
        assert np.flatnonzero(found[i]).tolist() == ancestors[-length:]
    q, k, v, _ = map(jnp.asarray, draws(4, 2))
    window = Window(jnp.asarray(positions), jnp.int32(length))
    attended = attention(q, k, v, jnp.asarray(visible_until), window=window)
    dense = masked_attention(q, k, v, jnp.asarray(found)[None])
    assert np.abs(attended - dense).max() / np.abs(dense).max() < CLOSE


@pytest.mark.parametrize("length", [2, 7, 33, 1000])
@pytest.mark.parametrize("at_once", [None, 3 * 2**14])
def test_output_and_gradients_under_a_window_equal_dense_attention(monkeypatch, length, at_once):
    """Five examples of 50 below a prefix of 40, and pads; blocks one after another, or several at
    once.
    """
    visible_until = jnp.asarray(
        np.concatenate(
            [np.full(40, 290), 40 + np.repeat(50 * np.arange(1, 6), 50), np.arange(291, 301)]
        )[None]
    )
    window = Window(jnp.asarray(depths(visible_until)), jnp.int32(length))
    q, k, v, dy = map(jnp.asarray, draws(4, 2, length=300))
    if at_once is not None:
        monkeypatch.setattr(blockwise, "AT_ONCE", at_once)
        monkeypatch.setattr(
            blockwise,
            "_by_platform",
            lambda run, blocks, q, *arrays: run(
                blocks, blockwise._orders(q, blocks)[1], q, *arrays
            ),
        )

    def blocks(q, k, v):
        return blockwise_attention(q, k, v, visible_until, Blocks(32, 64, 40), window)

    def dense(q, k, v):
        return masked_attention(q, k, v, visible_mask(visible_until, window))

    (out, back), (expected, reference) = (jax.vjp(run, q, k, v) for run in (blocks, dense))
    for one, other in zip((out, *back(dy)), (expected, *reference(dy)), strict=True):
        assert np.abs(one - other).max() / np.abs(other).max() < 10 * CLOSE


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu", "pallas_gpu_sm80"])
def test_kernels_that_know_no_window_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name!r} does not run here: it knows no sliding window"):
        choose(implementation=name, window=True)
    assert choose(window=True)[0] == "xla"
