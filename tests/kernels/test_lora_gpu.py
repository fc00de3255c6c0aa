"""The LoRA group for GPUs in Pallas's interpreter, dense and NF4, against autodiff of the plain
formula in f64.

Tiles have 256 tokens and 64 or 128 channels here as on a GPU, a step of a sum 64. The interpreter
takes f32, a GPU bf16 alone.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreters import needs_interpreter, strict
from jaxre_kernels.lora import choose, gpu, lora_group
from jaxre_kernels.lora.gpu import pallas_lora_group, unsupported
from jaxre_kernels.nf4 import dequantise, quantise, tiled
from lora_kernels import (
    QWEN,
    RATE,
    SCALE,
    Inputs,
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
)

# f32: sums of at most 576 products, in another order than the reference's, which is in f64
CLOSE = 2e-6


@partial(jax.jit, static_argnames=("rate", "races"))
def kernel(inputs, rate, races=False):
    return gradients(
        partial(pallas_lora_group, interpret=strict(detect_races=races)), *inputs, rate
    )


# (rows, I, outputs, ranks, which are NF4, rate). Four slots, three with NF4: the sums are of fewer
# steps, of as many and of more.
CASES = {
    "q k v, tokens and ranks that are padded": (
        (3, 100),
        192,
        (128, 64, 64),
        (4, 70, 64),
        (),
        RATE,
    ),
    "more steps than slots": ((256,), 576, (128,), (32,), (), RATE),
    "k not targeted, no dropout": ((2, 128), 128, (256, 128), (0, 16), (), 0.0),
    "none targeted": ((1,), 64, (64,), (0,), (), RATE),
    "NF4, as many ranks as slots": ((30,), 384, (64, 64, 64), (4, 64, 4), (0, 1, 2), RATE),
    "NF4 that is not targeted beside a dense one": ((7, 40), 128, (128, 128), (0, 3), (0,), RATE),
}


@needs_interpreter
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_equal_autodiff_of_the_plain_formula(case):
    *shapes, rate = case
    inputs = draws(*shapes)
    assert largest(kernel(inputs, rate), exact(inputs, rate)) < CLOSE


@needs_interpreter
def test_no_race_no_read_out_of_bounds_and_nothing_read_before_it_is_written():
    """Two tiles of tokens, more steps than slots, one NF4 and one dense projection, dropout."""
    inputs = draws((300,), 256, (128, 128), (4, 4), (1,))
    assert largest(kernel(inputs, RATE, races=True), exact(inputs, RATE)) < CLOSE


@needs_interpreter
def test_dropout_is_the_mask_of_the_counters():
    """Forwards and backwards."""
    rows, width = (2, 15), 128
    for found in mask_drawn(rows, width, partial(kernel, rate=RATE)):
        np.testing.assert_array_equal(found, keep_mask_of(rows, width, RATE))


@needs_interpreter
@pytest.mark.parametrize("nf4", [(), (0, 1)], ids=["dense", "nf4"])
def test_bfloat16_is_as_near_to_float32_as_the_xla_implementation(nf4):
    """Masters stay f32, and so do their gradients."""
    inputs = draws((64,), 128, (64, 64), (8, 8), nf4)
    found = kernel(in_bfloat16(inputs), RATE)
    assert [leaf.dtype.name for leaf in jax.tree.leaves(found)] == ["bfloat16"] * 3 + [
        "float32"
    ] * 4
    assert as_near_as_xla(found, inputs, RATE)


@needs_interpreter
@pytest.mark.parametrize("half", [32, 64])
def test_decoding_gives_the_bits_of_dequantise_forwards_and_backwards(half):
    """x and dY pick out rows and columns of W, all 16 codes in both halves of a byte; its layout
    may have other halves.
    """
    weight = quantise(np.random.default_rng(2).standard_normal((128, 256)).astype(np.float32))
    laid = tiled(weight, half)
    assert set(np.unique(laid.codes >> 4)) == set(np.unique(laid.codes & 15)) == set(range(16))
    values = np.asarray(dequantise(weight, jnp.float32).T)
    ones = Inputs(
        np.eye(256, dtype=np.float32), [laid], [None], [np.eye(256, 128, dtype=np.float32)]
    )
    (found,), dx, _ = kernel(ones, 0.0)
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(dx[:128], values.T)


# ---- what is formed and what is kept ----------------------------------------------------------


@needs_interpreter
def test_what_is_kept_for_the_backward_pass_is_narrow():
    """x, the counters and L, whose ranks 4 and 70 are padded to 64 and 128; of NF4 neither the
    values nor the form of the kernels.
    """
    inputs = draws((3, 7), 128, (64, 128), (4, 70), (1,))

    def back(x, weights, factors):
        op = partial(pallas_lora_group, interpret=strict())
        return jax.vjp(
            lambda x, factors: op(x, weights, factors, words_of((3, 7)), SCALE, RATE), x, factors
        )[1]

    kept = [
        leaf.shape
        for leaf in jax.tree.leaves(jax.eval_shape(back, inputs.x, inputs.weights, inputs.factors))
    ]
    given = [np.shape(leaf) for leaf in jax.tree.leaves((inputs.weights, inputs.factors))]
    assert sorted(kept) == sorted([*given, (3, 7, 128), (3, 7), (3, 7, 192)])


@needs_interpreter
def test_no_wide_product_stands_outside_of_the_kernels():
    """Nor a mask: two kernels forwards and two backwards. Outside there is dA, of a rank; it has
    not the channels of Y.
    """
    inputs = draws((256,), 128, (320,), (4,))
    program = str(jax.make_jaxpr(lambda inputs: kernel(inputs, RATE))(inputs))
    assert all(
        program.count(f"name={name}") == 1
        for name in ("lora_low", "lora_forward", "lora_backward", "lora_narrow")
    )
    products = [line.split("=")[0] for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 1 and not any(
        "[256,128]" in line or "[256,320]" in line for line in products
    )


# ---- which runs -------------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize("nf4", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("size", QWEN)
def test_all_projections_of_the_studied_sizes_run_in_the_wider_tiles(size, nf4):
    for rank in (16, 64):
        for projections in groups(size, rank=rank, nf4=nf4).values():
            name, why = choose(projections, implementation="pallas_gpu")
            assert name == "pallas_gpu" and why.startswith(
                "asked for; unverified, it has not run on a GPU; "
            )
            assert "tiles of 256 tokens and 128 outputs forwards, 128 inputs backwards" in why


@needs_interpreter
def test_what_does_not_run_is_said_beforehand():
    projections = groups("0.5B")["qkv"]
    assert unsupported(projections._replace(dtype="float32")) == "it takes bfloat16, not float32"
    assert (
        unsupported(projections._replace(inputs=100))
        == "it takes multiples of 64 inputs and outputs, not 100"
    )
    assert (
        unsupported(projections._replace(outputs=(896, 128, 96)))
        == "it takes multiples of 64 inputs and outputs, not 96"
    )
    assert unsupported(projections._replace(inputs=960)) is None
    assert "a multiple of 128 inputs, not 960" in unsupported(
        projections._replace(inputs=960, nf4=(False, False, True))
    )
    assert "ranks of 65 and 65 and 1, each padded to 64, are more than 256 together" in unsupported(
        projections._replace(ranks=(65, 65, 1))
    )
    assert unsupported(projections._replace(ranks=(128, 64, 64))) is None
    assert "more than 192 together" in unsupported(
        projections._replace(ranks=(128, 64, 64), nf4=(True,) * 3)
    )
    x = jnp.zeros((3, 64))
    with pytest.raises(
        ValueError, match="'pallas_gpu' does not run here: it takes bfloat16, not float32"
    ):
        lora_group(x, [jnp.zeros((64, 64))], [None], None, 1.0, 0.0, implementation="pallas_gpu")


@needs_interpreter
def test_the_group_runs_it_by_name_and_never_by_itself(monkeypatch):
    monkeypatch.setattr(gpu, "pallas_lora_group", partial(pallas_lora_group, interpret=strict()))
    x, weights, factors, _ = in_bfloat16(draws((2, 5), 64, (64,), (4,)))
    arguments = x, weights, factors, words_of((2, 5)), SCALE, RATE
    assert "lora_forward" not in str(jax.make_jaxpr(lambda x: lora_group(x, *arguments[1:]))(x))
    (found,), (plain,) = lora_group(*arguments, implementation="pallas_gpu"), lora_group(*arguments)
    # XLA rounds the base product and the low-rank product to bf16 before it adds them.
    assert found.dtype == jnp.bfloat16 and largest(found, plain) < 2**-7


@pytest.mark.skipif(gpu.MISSING is None, reason="this jax has what the kernels need")
def test_a_jax_that_is_too_old_is_named_in_the_refusal():
    with pytest.raises(ValueError, match="needs jax"):
        choose(groups("0.5B")["qkv"], implementation="pallas_gpu")
