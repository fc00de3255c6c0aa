"""Linear cross-entropy for GPUs in Pallas's interpreter, against autodiff of the dense formula in
f64.

A tile has 16 tokens, 32 entries and 16 channels here; on a GPU 128, 256 and 64. The interpreter
takes f32, a GPU bf16 alone. Relative is max|difference| / max|reference| of a tensor.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cross_entropy_kernels import CLOSE, distance, draws, exact, gradients, relative
from interpreters import needs_interpreter, strict
from jaxre_kernels.cross_entropy import (
    Channels,
    choose,
    dense_cross_entropy,
    gpu,
    linear_cross_entropy,
)
from jaxre_kernels.cross_entropy.gpu import (
    Tiling,
    pallas_cross_entropy,
    tiles_of_a_split,
    unsupported,
)

# (tokens, D, V, tokens at a time)
SHAPES = {
    "whole tiles": ((16,), 48, 64, 16),
    "tokens that fill no tile, two chunks": ((3, 7), 40, 48, 16),
    "entries that fill no tile, nor 16 bytes": ((16,), 24, 77, 16),
    "one token, few channels, fewer entries than a tile": ((1,), 5, 11, 64),
}


def small(**options) -> Tiling:
    """One thread block walks over several tiles, as two processors have them all."""
    return Tiling(tokens=8, entries=32, channels=16, processors=2, interpret=strict(**options))


@partial(jax.jit, static_argnames=("at_most", "races"))
def kernel(inputs, at_most=64, races=False):
    """Loss, and gradients by x, head and weights."""
    return gradients(
        partial(pallas_cross_entropy, at_most=at_most, tiling=small(detect_races=races)), *inputs
    )


@needs_interpreter
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_equal_dense_autodiff(shape):
    *sizes, at_most = shape
    inputs = draws(*sizes)
    for found, expected in zip(kernel(inputs, at_most), exact(*inputs), strict=True):
        assert relative(found, expected) < CLOSE


@needs_interpreter
def test_no_race_and_nothing_read_before_it_is_written():
    """Nine steps of a ring of four slots, two whole tiles that leave by two slots, one that is not
    whole, a pair that shares them.
    """
    inputs = draws((11,), 48, 77)
    for found, expected in zip(kernel(inputs, races=True), exact(*inputs), strict=True):
        assert relative(found, expected) < CLOSE


@needs_interpreter
def test_a_loss_whose_exponentials_overflow_is_right():
    """Logits to 1e4, so that f32 logits are off by 1e-3; all tokens of one chunk, and none of the
    other.
    """
    x, head, targets, weights = draws((32,), 8, 40)
    x[16:] *= 1e3
    found, expected = kernel((x, head, targets, weights), 16), exact(x, head, targets, weights)
    assert expected[0] > 100 * len(x) and all(np.isfinite(leaf).all() for leaf in found)
    assert relative(found[0], expected[0]) < CLOSE
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert relative(one, other) < 1e-3
    assert relative(found[1][:16], expected[1][:16]) < CLOSE


@needs_interpreter
def test_a_target_that_has_nearly_all_of_the_softmax_keeps_its_gradient():
    """What it leaves to the others is less than bf16 can tell from 1."""
    draw = np.random.default_rng(0)
    head = draw.standard_normal((40, 64)).astype(np.float32)
    targets = draw.integers(0, 40, 16).astype(np.int32)
    x = head[targets] * (14 / np.sum(head[targets] ** 2, axis=1, keepdims=True))
    half = [jnp.asarray(array, jnp.bfloat16) for array in (x, head)] + [
        targets,
        np.ones(16, np.float32),
    ]
    exactly = exact(*(np.asarray(array, np.float32) for array in half[:2]), *half[2:])
    assert 0 < exactly[0] / 16 < 2**-9
    for found, expected in zip(kernel(half)[1:3], exactly[1:3], strict=True):
        assert relative(found, expected) < 0.02


@needs_interpreter
def test_bfloat16_is_as_near_to_float32_as_the_dense_formula():
    inputs = draws((32,), 64, 200, scale=0.5)
    half = [jnp.asarray(array, jnp.bfloat16) for array in inputs[:2]] + inputs[2:]
    found, plain = kernel(half), jax.jit(partial(gradients, dense_cross_entropy))(*half)
    assert [leaf.dtype.name for leaf in found] == ["float32", "bfloat16", "bfloat16", "float32"]
    for one, other, true, most in zip(
        found, plain, exact(*inputs), (1.01, 1.02, 1.25, 1.01), strict=True
    ):
        # for the head's gradient what is summed over tokens is rounded
        assert distance(one, true) < most * distance(other, true)


@needs_interpreter
def test_a_target_of_weight_zero_is_not_looked_at():
    x, head, targets, weights = draws((19,), 8, 33)
    assert (weights == 0).any()
    other = np.where(weights == 0, -100, targets).astype(np.int32)
    found, expected = (kernel((x, head, one, weights))[:3] for one in (other, targets))
    for one, same in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, same)
    assert not np.asarray(found[1])[weights == 0].any()


@needs_interpreter
def test_what_is_not_asked_for_is_not_formed():
    """No array of [N, V], and of [n, V] the exponentials alone: one product beside the kernel where
    the head is frozen.
    """
    x, head, targets, weights = map(jnp.asarray, draws((64,), 32, 48))
    x, head = x.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    op = partial(pallas_cross_entropy, at_most=32, tiling=small())

    def program(op):
        return str(jax.make_jaxpr(op)(x, head, targets, weights))

    alone, frozen, trained = (
        program(op),
        program(jax.grad(op)),
        program(jax.grad(op, argnums=(0, 1))),
    )
    for formed in (alone, frozen, trained):
        assert "[64,48]" not in formed and "f32[32,48]" not in formed
    assert "bf16[32,48]" not in alone and "bf16[32,48]" in frozen
    assert "f32[48,32]" not in frozen and "f32[48,32]" in trained


def test_thread_blocks_leave_few_processors_without_work():
    """Tokens at a time and entries of real heads, in blocks of 128 and tiles of 256."""
    for tokens in (1024, 2048, 3072, 4096):
        for entries in (49152, 128256, 151936):
            blocks, tiles = tokens // 128, -(-entries // 256)
            each = tiles_of_a_split(blocks, tiles)
            rounds = each * -(-blocks * -(-tiles // each) // 132)
            assert blocks * tiles / (132 * rounds) > 0.93, (tokens, entries)


# ---- by its public name -----------------------------------------------------------------------


@needs_interpreter
def test_linear_cross_entropy_runs_it_by_name_and_never_by_itself(monkeypatch):
    """A pair of blocks of 128 tokens and two tiles of 256 entries."""
    monkeypatch.setattr(
        gpu,
        "pallas_cross_entropy",
        partial(pallas_cross_entropy, tiling=Tiling(interpret=strict())),
    )
    x, head, targets, weights = draws((2, 70), 64, 264)
    half = [jnp.asarray(array, jnp.bfloat16) for array in (x / 8, head)] + [targets, weights]
    found = linear_cross_entropy(*half, implementation="pallas_gpu", tiles={"at_most": 128})
    assert "cross_entropy_exponentials" not in str(jax.make_jaxpr(linear_cross_entropy)(*half))
    assert relative(found, linear_cross_entropy(*half)) < CLOSE


@needs_interpreter
def test_what_does_not_run_is_said_beforehand():
    name, why = choose(
        (16, 256), 151936, implementation="pallas_gpu", channels=Channels(896, "bfloat16")
    )
    assert name == "pallas_gpu" and why.startswith("asked for; unverified, it has not run on a GPU")
    assert why.endswith("their exponentials do in bf16, of 2,048 tokens at a time, 593.5 MiB")
    assert choose((4, 32), 151936, implementation="pallas_gpu")[1].endswith(
        "of 128 tokens at a time, 37.1 MiB"
    )
    assert unsupported(896, "bfloat16") is None
    for said, options in (
        ("these are on 4: call it inside of shard_map", {"shards": 4}),
        ("bfloat16, not float32", {}),
    ):
        x = jnp.zeros((3, 8))
        with pytest.raises(ValueError, match=said):
            linear_cross_entropy(
                x, x, jnp.zeros(3, jnp.int32), jnp.ones(3), implementation="pallas_gpu", **options
            )


@pytest.mark.skipif(gpu.MISSING is None, reason="this jax has what the kernels need")
def test_a_jax_that_is_too_old_is_named_in_the_refusal():
    with pytest.raises(ValueError, match="needs jax"):
        choose((4, 32), 151936, implementation="pallas_gpu", channels=Channels(896, "bfloat16"))
