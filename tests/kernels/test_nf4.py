"""NF4 against bitsandbytes on CPU, bit for bit, and the product's gradient."""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jaxre_kernels.nf4 import dequantise, forms, nf4_linear, quantise
from jaxre_kernels.nf4.quantise import quantise_absmax, torch_sum
from jaxre_kernels.nf4.weight import DYNAMIC, NF4

if sys.version_info < (3, 12):
    import torch
    from bitsandbytes import functional as bitsandbytes
else:
    pytest.skip("comparisons with bitsandbytes run on Python 3.11", allow_module_level=True)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
on_device = jax.jit(dequantise, static_argnums=1)


@pytest.fixture(autouse=True)
def one_thread():
    """With more, torch sums 32,768 absmax and longer in as many parts: its mean then depends on the
    machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bits(array: np.ndarray | jax.Array | torch.Tensor) -> np.ndarray:
    """The bytes of each element, so that -0 differs from 0 and NaN equals itself."""
    if isinstance(array, torch.Tensor):
        array = array.reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def theirs(matrix: torch.Tensor, dtype: str) -> dict[str, np.ndarray]:
    """Codes, statistics and dequantised values of bitsandbytes, as bits."""
    codes, state = bitsandbytes.quantize_4bit(
        matrix, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    scales = bitsandbytes.dequantize_blockwise(state.absmax, state.state2) + state.offset
    # As one row of an even length: for rows of 16, 32, 48, 80, ... values, multiples of 16 and not
    # of 64, its CPU kernel takes wrong scales (0.50.2, AVX512), and for odd ones it compiles
    # another.
    size = matrix.numel() + matrix.numel() % 2
    values = torch.ops.bitsandbytes.dequantize_4bit(
        codes, scales, 64, "nf4", (1, size), DTYPES[dtype]
    )
    return {
        "codes": bits(codes),
        "absmax": bits(state.absmax),
        "nested_absmax": bits(state.state2.absmax),
        "offset": bits(state.offset),
        "values": bits(values.reshape(-1)[: matrix.numel()]),
    }


def ours(matrix: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    weight = quantise(matrix)
    values = on_device(weight, jnp.dtype(dtype))
    assert values.shape == matrix.shape and values.dtype == dtype
    assert {
        name: (getattr(weight, name).shape, getattr(weight, name).dtype)
        for name in forms(matrix.shape)
    } == forms(matrix.shape)
    return {name: bits(getattr(weight, name)) for name in forms(matrix.shape)} | {
        "values": bits(values)
    }


def assert_same_bits(matrix: np.ndarray, stored: str, dtype: str) -> None:
    given = torch.tensor(matrix).to(DTYPES[stored])
    numpy = given.float().numpy().astype(ml_dtypes.bfloat16 if stored == "bfloat16" else stored)
    expected, found = theirs(given, dtype), ours(numpy, dtype)
    assert {name: int((found[name] != expected[name]).sum()) for name in expected} == dict.fromkeys(
        expected, 0
    )


# Whole blocks, a short last block, an odd number of values; one nested block, several, a short one;
# one that torch would cut in parts.
SHAPES = [
    (1, 1),
    (1, 2),
    (3, 5),
    (7, 64),
    (8, 64),
    (48, 32),
    (33, 66),
    (63, 65),
    (64, 256),
    (100, 300),
    (257, 64),
    (129, 258),
    (1030, 2048),
]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_matrices_equal_bitsandbytes_bit_for_bit(shape, stored):
    matrix = np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) * 0.05
    assert_same_bits(matrix, stored, stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_rounded_once_to_the_compute_dtype(dtype):
    """Whatever the stored one was."""
    assert_same_bits(
        np.random.default_rng(1).standard_normal((96, 200)).astype(np.float32), "float32", dtype
    )


def at_decision_boundaries() -> np.ndarray:
    """Every midpoint of two levels, and its neighbours on both sides, in blocks whose largest value
    is a power of two.
    """
    between = (NF4[:-1] + NF4[1:]) / np.float32(2)
    around = np.concatenate(
        [between, np.nextafter(between, np.float32(-2)), np.nextafter(between, np.float32(2)), NF4]
    )
    block = np.append(around, np.ones(64 - len(around), np.float32))
    return np.stack([block * np.float32(2.0**power) for power in range(-20, 12)])


def with_nested_ties() -> np.ndarray:
    """Blocks whose absmax lie at and beside the midpoints of the dynamic type's levels."""
    between = (DYNAMIC[:-1] + DYNAMIC[1:]) / np.float32(2)
    absmax = np.float32(4) + np.concatenate(
        [between, DYNAMIC, np.nextafter(between, np.float32(2))]
    )
    matrix = np.random.default_rng(0).uniform(-1, 1, (len(absmax), 64)).astype(np.float32)
    matrix[:, 7] = 1
    return matrix * absmax[:, None]


def draw(seed: int = 0, shape: tuple[int, int] = (40, 128)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def changed(index: tuple, value: object) -> np.ndarray:
    matrix = draw()
    matrix[index] = value
    return matrix


ADVERSARIAL = {
    "nothing but zeros": np.zeros((3, 128), np.float32),
    "a short block of zeros": (
        np.append(np.ones(64, np.float32), np.zeros(26, np.float32)).reshape(9, 10)
    ),
    "a block of zeros": changed((3, slice(64)), 0),
    "one outlier": changed((2, 5), 3e4),
    "an outlier in each nested block": changed((slice(None), 0), 500),
    "ties at decision boundaries": at_decision_boundaries(),
    "ties of the nested type": with_nested_ties(),
    "negative zeros": changed((slice(0, 20), slice(0, 128, 3)), -0.0),
    "all blocks alike": np.tile(draw(shape=(1, 64)), (30, 1)),
    "one block that differs": np.concatenate(
        [np.tile(draw(shape=(1, 64)), (600, 1)), draw(shape=(1, 64)) * 9]
    ),
    "the largest negative": -np.abs(draw()),
    "a constant": np.full((12, 64), 0.3, np.float32),
    "near the largest": changed((0, 0), 3e38),
    "blocks of all magnitudes": (
        draw(shape=(300, 64))
        * np.float32(10.0) ** np.linspace(-30, 30, 300, dtype=np.float32)[:, None]
    ),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_matrices_equal_bitsandbytes_bit_for_bit(name):
    assert_same_bits(ADVERSARIAL[name], "float32", "float32")


@pytest.mark.parametrize("magnitude", [1e-41, 1e-38])
def test_what_is_stored_of_subnormal_matrices_equals_bitsandbytes(magnitude):
    """XLA flushes subnormal values to zero when they are dequantised; no weight is that small."""
    matrix = draw() * np.float32(magnitude)
    expected, found = theirs(torch.tensor(matrix), "float32"), ours(matrix, "float32")
    assert all(np.array_equal(found[name], expected[name]) for name in forms(matrix.shape))


def test_a_sum_has_the_order_of_torch():
    """The mean of the absmax in its last bit, for every length up to 300 and some of each further
    level of the cascade.
    """
    random = np.random.default_rng(0)
    for size in [*range(1, 300), 511, 513, 2048, 5000, 12_544, 40_001, 300_007]:
        values = random.random(size, np.float32)
        assert torch_sum(values) / np.float32(size) == torch.tensor(values).mean().numpy(), size


def test_absmax_are_quantised_as_bitsandbytes_does_it():
    """Values that are scaled to where the code changes: a division in place of the reciprocal would
    take another there.
    """
    steps = np.arange(65536) / 65535 * 2 - 1
    nearest = np.abs(steps[:, None] - DYNAMIC).argmin(axis=1)
    changes = (np.flatnonzero(np.diff(nearest)) + 0.5) / 65535 * 2 - 1
    largest = np.random.default_rng(0).uniform(0.01, 3, 200).astype(np.float32)
    centred = np.ones((200, 256)) * largest[:, None]
    centred[:, : len(changes)] *= changes
    centred = centred.astype(np.float32)
    for values in (
        centred,
        np.nextafter(centred, np.float32(-9)),
        np.nextafter(centred, np.float32(9)),
    ):
        codes, state = bitsandbytes.quantize_blockwise(
            torch.tensor(values.reshape(-1)), blocksize=256
        )
        found = quantise_absmax(values.reshape(-1))
        assert np.array_equal(found[0], codes.numpy()) and np.array_equal(
            bits(found[1]), bits(state.absmax)
        )


def test_levels_are_those_of_bitsandbytes():
    assert np.array_equal(DYNAMIC, bitsandbytes.create_dynamic_map().numpy())
    assert np.array_equal(NF4, bitsandbytes.get_4bit_type("nf4", device="cpu").numpy())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="not finite"):
        quantise(changed((30, 100), value))


@pytest.mark.parametrize("shape", [(0, 64), (64,), (2, 3, 64)], ids=str)
def test_what_is_no_matrix_is_refused(shape):
    with pytest.raises(ValueError, match="a matrix is quantised"):
        quantise(np.ones(shape, np.float32))


def test_the_source_is_left_as_it_was():
    matrix = draw()
    before = matrix.copy()
    quantise(matrix)
    assert np.array_equal(matrix, before)


# ---- the product ------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(1,), (7,), (2, 9)], ids=str)
@pytest.mark.parametrize("shape", [(96, 64), (10, 7)], ids=str)
def test_product_and_gradient_equal_those_of_the_dequantised_matrix(rows, shape):
    """Against f64, sums of at most 96 products in f32."""
    weight = quantise(draw(shape=shape))
    x, dy = draw(1, (*rows, shape[1])), draw(2, (*rows, shape[0]))
    y, back = jax.jit(
        lambda x, dy: (nf4_linear(x, weight), jax.vjp(lambda x: nf4_linear(x, weight), x)[1](dy)[0])
    )(x, dy)
    dense = np.asarray(on_device(weight, jnp.float32), np.float64)
    for value, reference in ((y, x @ dense.T), (back, dy @ dense)):
        assert value.shape == reference.shape
        assert np.abs(value - reference).max() / np.abs(reference).max() < 2e-6


def test_no_gradient_of_the_frozen_weight_is_formed_and_no_matrix_is_kept():
    """One product forwards, one backwards, neither of W's shape; what the backward pass gets is the
    quantised weight.
    """
    weight, x = quantise(draw(shape=(96, 64))), draw(1, (5, 64))
    program = str(jax.make_jaxpr(jax.grad(lambda x: (nf4_linear(x, weight) ** 2).sum()))(x))
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 2 and all("f32[5," in line.split("=")[0] for line in products)
    _, back = jax.vjp(partial(nf4_linear, weight=weight), jnp.asarray(x))
    kept = [leaf.shape for leaf in jax.tree.leaves(back)]
    assert (96, 64) not in kept and (64, 96) not in kept


def test_the_product_runs_in_the_dtype_of_its_input():
    weight, x = quantise(draw(shape=(96, 64))), draw(1, (5, 64))
    half = nf4_linear(jnp.asarray(x, jnp.bfloat16), weight)
    exact = nf4_linear(jnp.asarray(x), weight)
    assert half.dtype == jnp.bfloat16
    # bf16 keeps 8 bits
    assert np.abs(np.asarray(half, np.float32) - exact).max() / np.abs(exact).max() < 0.02
