"""The LoRA group for TPUs in Pallas's interpreters, dense and NF4, against autodiff of the plain
formula in f64.

Blocks have 8 tokens and spans 16 here, lanes are 16 and chunks of channels too; on a TPU these are
128 to 512, 2,048, 128 and 256. Relative is max|difference| / max|reference| of a tensor. B is never
zero.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreters import STRICT
from jax.experimental import pallas as pl
from jaxre_kernels.lora import choose, lora_group
from jaxre_kernels.lora.tpu import (
    VMEM_LIMIT,
    Blocks,
    Tiling,
    pallas_lora_group,
    tiling_of,
    unsupported,
)
from jaxre_kernels.nf4 import NF4Tiles, dequantise, dequantise_tiles, quantise, tiled
from jaxre_kernels.nf4.tpu_kernels import decode
from jaxre_kernels.nf4.weight import BLOCK
from lora_kernels import (
    QWEN,
    RATE,
    SCALE,
    as_near_as_xla,
    draws,
    exact,
    gradients,
    groups,
    in_bfloat16,
    keep_mask_of,
    largest,
    mask_drawn,
    words_of,
    xla,
)

# f32: sums of at most 192 products, in another order than the reference's, which is in f64
CLOSE = 2e-6


def small(parts=(1, 1), interpret=True) -> Tiling:
    """`parts` of the outputs forwards and of the inputs backwards."""
    return Tiling(
        Blocks(8, parts[0]), Blocks(8, parts[1]), span=16, chunk=16, lanes=16, interpret=interpret
    )


@partial(jax.jit, static_argnames=("rate", "tiling"))
def kernel(inputs, rate, tiling):
    return gradients(partial(pallas_lora_group, tiling=tiling), *inputs, rate)


# (rows, I, outputs, ranks, which are NF4, rate, parts). 21 tokens are three blocks in two spans; 40
# inputs are parts of 32 and 8.
CASES = {
    "q k v, parts that are not full": ((3, 7), 40, (48, 40, 24), (4, 20, 4), (), RATE, (2, 2)),
    "k not targeted, no dropout": ((3, 7), 40, (48, 40, 24), (4, 0, 16), (), 0.0, (2, 3)),
    "none targeted": ((21,), 40, (48, 24), (0, 0), (), RATE, (2, 1)),
    "fewer inputs than a chunk": ((21,), 12, (8, 16), (4, 3), (), RATE, (1, 1)),
    "one token": ((1, 1), 24, (40,), (5,), (), RATE, (1, 1)),
    "NF4": ((3, 7), 192, (48, 40), (4, 4), (0, 1), RATE, (2, 2)),
    "NF4 that is not targeted beside a dense one": (
        (16,),
        128,
        (40, 24),
        (0, 3),
        (0,),
        RATE,
        (1, 1),
    ),
    "NF4 without LoRA": ((21,), 192, (33,), (0,), (0,), 0.0, (1, 3)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_equal_autodiff_of_the_plain_formula(case):
    *shapes, rate, parts = case
    inputs = draws(*shapes)
    found = kernel(inputs, rate, small(parts))
    assert largest(found, exact(inputs, rate)) < CLOSE


def test_kernels_race_nowhere_and_read_nothing_that_is_not_theirs():
    inputs = draws((3, 7), 192, (48, 40), (4, 4), (1,))
    assert largest(kernel(inputs, RATE, small((2, 2), STRICT)), exact(inputs, RATE)) < CLOSE


def test_dropout_is_the_mask_of_the_counters():
    """Forwards and backwards."""
    rows, width = (2, 12), 48
    for found in mask_drawn(rows, width, lambda inputs: kernel(inputs, RATE, small((3, 3)))):
        np.testing.assert_array_equal(found, keep_mask_of(rows, width, RATE))


@pytest.mark.parametrize("nf4", [(), (0, 1)], ids=["dense", "nf4"])
def test_bfloat16_is_as_near_to_float32_as_the_xla_implementation(nf4):
    """Masters stay f32, and so do their gradients."""
    inputs = draws((32,), 128, (64, 48), (8, 8), nf4)
    found = kernel(in_bfloat16(inputs), RATE, small((2, 2)))
    assert [leaf.dtype.name for leaf in jax.tree.leaves(found)] == ["bfloat16"] * 3 + [
        "float32"
    ] * 4
    assert as_near_as_xla(found, inputs, RATE)


def test_what_is_kept_for_the_backward_pass_is_narrow():
    """x, the counters and L, whose ranks 4 and 20 are padded to 16 and 32; of NF4 neither the
    values nor the form of the kernels.
    """
    inputs = draws((3, 7), 64, (48, 40), (4, 20), (1,))

    def back(x, weights, factors):
        op = partial(pallas_lora_group, tiling=small())
        return jax.vjp(
            lambda x, factors: op(x, weights, factors, words_of((3, 7)), SCALE, RATE), x, factors
        )[1]

    kept = [
        leaf.shape
        for leaf in jax.tree.leaves(jax.eval_shape(back, inputs.x, inputs.weights, inputs.factors))
    ]
    given = [np.shape(leaf) for leaf in jax.tree.leaves((inputs.weights, inputs.factors))]
    assert sorted(kept) == sorted([*given, (3, 7, 64), (3, 7), (48, 21)])


def test_one_kernel_forwards_and_one_backwards_and_no_product_outside():
    """24 tokens, padded to 32; a product in a kernel is of a block of 8."""
    inputs = draws((24,), 64, (48,), (4,))
    laid = inputs._replace(weights=[tiled(quantise(inputs.weights[0].T))])
    program = str(jax.make_jaxpr(lambda laid: kernel(laid, RATE, small()))(laid))
    assert (
        program.count("pallas_call") == 2
        and "lora_forward" in program
        and "lora_backward" in program
    )
    products = [line.split("=")[0] for line in program.splitlines() if "dot_general" in line]
    assert len(products) >= 6 and not any("[24," in line or "[32," in line for line in products)


# ---- NF4 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "half"), [((96, 64), 32), ((40, 192), 32), ((1, 128), 32), ((40, 256), 64)], ids=str
)
def test_the_layout_of_the_kernels_loses_nothing(shape, half):
    """Codes go back to what they were, and every value is the same bit for bit, also by way of the
    layout with other halves.
    """
    weight = quantise(np.random.default_rng(1).standard_normal(shape).astype(np.float32))
    laid = jax.jit(tiled, static_argnums=1)(weight, half)
    outputs, inputs = shape
    assert laid.codes.shape == (inputs // 2, outputs) and laid.absmax.shape == (
        inputs // BLOCK,
        outputs,
    )
    halves = np.asarray(laid.codes).reshape(-1, half, outputs)
    codes = (
        np.concatenate([halves >> 4, halves & 15], axis=1).reshape(inputs, outputs).T.reshape(-1)
    )
    np.testing.assert_array_equal(codes[0::2] << 4 | codes[1::2], weight.codes)
    np.testing.assert_array_equal(tiled(tiled(weight), half).codes, laid.codes)
    for dtype in (jnp.float32, jnp.bfloat16):
        expected = np.asarray(dequantise(weight, dtype).T)
        assert (
            np.asarray(jax.jit(dequantise_tiles, static_argnums=1)(laid, dtype)).tobytes()
            == expected.tobytes()
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_decoding_in_a_kernel_gives_the_bits_of_dequantise(dtype):
    """All 16 codes, in both halves of a byte."""
    weight = quantise(np.random.default_rng(2).standard_normal((48, 192)).astype(np.float32))
    laid = tiled(weight)
    assert set(np.unique(laid.codes >> 4)) == set(np.unique(laid.codes & 15)) == set(range(16))
    found = pl.pallas_call(
        decode, out_shape=jax.ShapeDtypeStruct((192, 48), dtype), interpret=True
    )(laid.codes, laid.absmax)
    assert np.asarray(found).tobytes() == np.asarray(dequantise(weight, dtype).T).tobytes()


def test_weights_in_the_layout_of_the_kernels_run_in_xla_too():
    inputs = draws((5,), 64, (48,), (4,), (0,))
    laid = inputs._replace(weights=[tiled(inputs.weights[0])])
    assert largest(xla(laid, RATE), exact(inputs, RATE)) < CLOSE


# ---- which runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", QWEN)
def test_all_projections_of_the_studied_sizes_have_blocks_that_fit(size, dtype, nf4):
    for tokens in (64, 4096):
        for projections in groups(size, tokens, dtype=dtype, nf4=nf4).values():
            refusal, tiling = unsupported(projections), tiling_of(projections)
            if (size, dtype, sum(projections.outputs)) == ("3B", "float32", 22016):
                assert "fits" in refusal  # all outputs of 128 tokens and 128 inputs do not
                continue
            assert refusal is None
            assert all(blocks.tokens % 128 == 0 for blocks in (tiling.forward, tiling.backward))
            assert tokens > 64 or tiling.forward.tokens == tiling.backward.tokens == 128


def test_what_does_not_run_is_said_beforehand():
    projections = groups("0.5B")["qkv"]
    name, why = choose(projections, implementation="pallas_tpu")
    assert name == "pallas_tpu" and why.startswith(
        "asked for; unverified, it has not run on a TPU; "
    )
    assert (
        "512 tokens and all outputs at a time forwards, 512 tokens and all inputs at a time"
        " backwards" in why
    )
    assert choose()[0] == choose(projections)[0] == "xla" and "opt-in, unverified" in choose()[1]
    assert "float16" in unsupported(projections._replace(dtype="float16"))
    assert "a multiple of 64 inputs, not 100" in unsupported(
        projections._replace(inputs=100, nf4=(True, False, False))
    )
    assert f"fits {VMEM_LIMIT:,} bytes" in unsupported(projections._replace(inputs=10**6))
    with pytest.raises(ValueError, match="a multiple of 64 inputs"):
        tiled(quantise(np.ones((64, 32), np.float32)))
    x = jnp.zeros((3, 8), jnp.float16)
    with pytest.raises(
        ValueError, match=r"does not run here: it takes float32 and bfloat16, not float16"
    ):
        lora_group(
            x, [jnp.zeros((8, 8), jnp.float16)], [None], None, 1.0, 0.0, implementation="pallas_tpu"
        )
    with pytest.raises(ValueError, match="'cuda' does not exist"):
        lora_group(x, [x.T], [None], None, 1.0, 0.0, implementation="cuda")


def test_nf4_tiles_are_counted_as_nf4():
    laid = NF4Tiles(jnp.zeros((48, 128), jnp.uint8), jnp.zeros((1, 128)))  # 96 inputs
    with pytest.raises(ValueError, match="a multiple of 64 inputs, not 96"):
        lora_group(jnp.zeros((3, 96)), [laid], [None], None, 1.0, 0.0, implementation="pallas_tpu")
