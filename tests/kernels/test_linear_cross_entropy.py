"""Linear cross-entropy some positions at a time against autodiff of the dense formula and against
torch.

Relative is max|difference| / max|reference| of a tensor.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxre_kernels.cross_entropy import (
    choose,
    chunked_cross_entropy,
    dense_cross_entropy,
    dispatch,
    linear_cross_entropy,
    positions_at_once,
)

# Sums of at most 300 products in f32, in another order.
CLOSE = 1e-6
COTANGENT = 0.37  # of the loss, as the division by the number of tokens gives it

# (targets [..., S], D, V, positions at a time, devices)
SHAPES = {
    "one token": ((1,), 8, 11, 4, 1),
    "one token at a time": ((5,), 8, 11, 1, 1),
    "chunks that fit": ((2, 8), 16, 33, 4, 1),
    "a last chunk that is not full": ((3, 13), 16, 300, 5, 1),
    "fewer positions than a chunk": ((2, 3), 16, 33, 64, 1),
    "rows on four devices": ((4, 7), 8, 29, 3, 4),
    "rows that devices do not divide": ((3, 7), 8, 29, 3, 2),
    "micro-batches": ((2, 3, 5), 8, 17, 2, 2),
    "one entry": ((4,), 8, 1, 2, 1),
}


class Inputs(NamedTuple):
    x: np.ndarray
    head: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


def draws(tokens, channels: int, entries: int, dtype=np.float32, scale: float = 1.0) -> Inputs:
    """Random inputs; the first and the last entry are targets, a fifth of the weights is zero."""
    draw = np.random.default_rng(0)
    targets = draw.integers(0, entries, tokens).astype(np.int32)
    targets.flat[0], targets.flat[-1] = 0, entries - 1
    weights = draw.random(tokens) * (draw.random(tokens) > 0.2)
    weights.flat[0] = weights.flat[-1] = 0.7
    x, head = draw.standard_normal((*tokens, channels)), draw.standard_normal((entries, channels))
    return Inputs(
        (scale * x).astype(dtype),
        head.astype(dtype),
        targets,
        weights.astype(np.float64 if dtype == np.float64 else np.float32),
    )


def gradients(op, inputs: Inputs):
    """Loss, and gradients by x, head and weights at a cotangent that is not 1."""
    x, head, targets, weights = map(jnp.asarray, inputs)
    loss, back = jax.vjp(lambda x, head, weights: op(x, head, targets, weights), x, head, weights)
    return loss, *back(jnp.asarray(COTANGENT, loss.dtype))


@partial(jax.jit, static_argnames=("positions", "shards"))
def ours(inputs: Inputs, positions: int, shards: int = 1):
    return gradients(partial(chunked_cross_entropy, positions=positions, shards=shards), inputs)


dense = jax.jit(partial(gradients, dense_cross_entropy))


def exact(inputs: Inputs):
    """By autodiff of the dense formula in f64."""
    with jax.enable_x64(True):
        wide = [np.asarray(array, np.float64) for array in (inputs.x, inputs.head, inputs.weights)]
        return jax.device_get(dense(Inputs(wide[0], wide[1], inputs.targets, wide[2])))


def relative(value, reference) -> float:
    value, reference = (np.asarray(array, np.float64) for array in (value, reference))
    assert value.shape == reference.shape
    largest = np.abs(reference).max()
    return float(np.abs(value - reference).max() / (largest or 1.0))


def largest(found, expected) -> float:
    """The largest relative difference over two trees of one form."""
    return max(jax.tree.leaves(jax.tree.map(relative, found, expected)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradients_equal_dense_autodiff(shape):
    *sizes, positions, shards = shape
    inputs = draws(*sizes)
    assert largest(ours(inputs, positions, shards), exact(inputs)) < CLOSE


@settings(max_examples=12, deadline=None)
@given(
    rows=st.lists(st.integers(1, 3), max_size=2),
    S=st.integers(1, 20),
    channels=st.integers(1, 24),
    entries=st.integers(2, 60),
    positions=st.integers(1, 24),
    shards=st.integers(1, 3),
)
def test_any_shape_equals_dense_autodiff(rows, S, channels, entries, positions, shards):
    with jax.enable_x64(True):
        inputs = draws((*rows, S), channels, entries, np.float64, channels**-0.5)
        assert largest(ours(inputs, positions, shards), exact(inputs)) < 1e-9


@pytest.mark.parametrize("positions", [3, 64])
def test_loss_and_gradients_equal_torch(positions):
    torch = (
        importlib.import_module("torch")
        if sys.version_info < (3, 12)
        else pytest.importorskip("torch")
    )
    inputs = draws((19,), 24, 101)
    x, head, weights = (
        torch.tensor(array, requires_grad=True) for array in (inputs.x, inputs.head, inputs.weights)
    )
    losses = torch.nn.functional.cross_entropy(
        x @ head.T, torch.tensor(inputs.targets, dtype=torch.long), reduction="none"
    )
    loss = (weights * losses).sum()
    loss.backward(torch.tensor(COTANGENT))
    expected = tuple(tensor.detach().numpy() for tensor in (loss, x.grad, head.grad, weights.grad))
    assert largest(ours(inputs, positions), expected) < CLOSE


def test_bfloat16_is_as_near_to_float32_as_the_dense_formula():
    """Inputs rounded to bf16, against gradients of the inputs as they were; the dense formula
    multiplies f32 by bf16.
    """
    inputs = draws((4, 64), 64, 300, scale=0.5)
    rounded = inputs._replace(
        x=jnp.asarray(inputs.x, jnp.bfloat16), head=jnp.asarray(inputs.head, jnp.bfloat16)
    )
    found, plain, reference = ours(rounded, 16), dense(rounded), exact(inputs)
    assert [leaf.dtype.name for leaf in found] == ["float32", "bfloat16", "bfloat16", "float32"]
    for one, other, true, most in zip(
        found, plain, reference, (1.01, 1.01, 1.2, 1.01), strict=True
    ):

        def distance(value, true=true):
            return np.sqrt(np.mean((np.asarray(value, np.float64) - true) ** 2))

        # Rounding of x and head is most of the distance. For the head's gradient what is summed
        # over tokens is rounded: 1.11 measured.
        assert distance(one) < most * distance(other)


@pytest.mark.parametrize(
    "op",
    [partial(chunked_cross_entropy, positions=4), linear_cross_entropy],
    ids=["chunked", "dispatched"],
)
def test_a_target_of_weight_zero_is_not_looked_at(op):
    inputs = draws((2, 9), 8, 11)
    assert (inputs.weights == 0).any()
    other = inputs._replace(
        targets=np.where(inputs.weights == 0, -100, inputs.targets).astype(np.int32)
    )
    found, expected = (gradients(op, one)[:3] for one in (other, inputs))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for row in found[1][inputs.weights == 0]:
        np.testing.assert_array_equal(row, 0)


def test_weights_that_are_all_zero_give_a_loss_and_gradients_of_zero():
    inputs = draws((3, 5), 8, 11)
    loss, dx, dhead, _ = ours(inputs._replace(weights=np.zeros_like(inputs.weights)), 2)
    assert loss == 0 and not np.asarray(dx).any() and not np.asarray(dhead).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits_do_not_overflow(sign):
    """Logits to 1e6, whose exponentials f32 does not hold, all of one sign but for one channel."""
    inputs = draws((2, 7), 8, 33)
    x, head = 1e3 * np.abs(inputs.x), sign * 1e2 * np.abs(inputs.head)
    inputs = inputs._replace(x=x, head=head)
    found = ours(inputs, 3)
    assert all(np.isfinite(leaf).all() for leaf in found)
    assert relative(found[0], exact(inputs)[0]) < 5 * CLOSE and np.abs(found[0]) > 1e4


# ---- what is formed ---------------------------------------------------------------------------

ROWS, S, D, V, AT_ONCE = 4, 160, 8, 352, 5


def programs(value: object) -> list[Jaxpr | ClosedJaxpr]:
    if isinstance(value, Jaxpr | ClosedJaxpr):
        return [value]
    return (
        [part for one in value for part in programs(one)] if isinstance(value, tuple | list) else []
    )


def formed(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every array that a program forms, also inside of loops and calls: (primitive, shape)."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield from ((equation.primitive.name, one.aval.shape) for one in equation.outvars)
        for value in equation.params.values():
            for part in programs(value):
                yield from formed(part)


def largest_with(entries: int, shapes) -> int:
    """Elements of the largest array with an axis of `entries`."""
    return max((math.prod(shape) for _, shape in shapes if entries in shape), default=0)


def update(op, trained: bool):
    """A loss as training has it, below jit and a scan over micro-batches; the head closed over
    where it is frozen.
    """

    def run(x, head, targets, weights):
        def micro(scale, h):
            return op(x * scale, h, targets, weights) / 7.0

        def step(carry, _):
            if trained:
                return carry, jax.jit(jax.value_and_grad(micro, (0, 1)))(carry, head)
            return carry, jax.jit(jax.value_and_grad(lambda scale: micro(scale, head)))(carry)

        return jax.lax.scan(step, jnp.ones(D), length=2)

    shapes = (ROWS, S, D), (V, D), (ROWS, S), (ROWS, S)
    given = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(shapes, ("float32", "float32", "int32", "float32"), strict=True)
    ]
    return run, given


chunked = partial(chunked_cross_entropy, positions=AT_ONCE)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_more_than_a_chunk_of_logits_is_formed(trained):
    """The program's arrays, and the memory of the compiled one: a few arrays of a chunk's logits,
    of x and of the head.
    """
    run, given = update(chunked, trained)
    logits = 4 * ROWS * AT_ONCE * V
    shapes = [
        (name, shape) for name, shape in formed(jax.make_jaxpr(run)(*given)) if D not in shape
    ]
    assert 4 * largest_with(V, shapes) == logits
    spent = jax.jit(run).lower(*given).compile().memory_analysis().temp_size_in_bytes
    assert spent < 3 * logits + 6 * (4 * ROWS * S * D) + 5 * (4 * V * D)
    dense_run, _ = update(dense_cross_entropy, trained)
    # what the walk would have seen
    assert 4 * largest_with(V, formed(jax.make_jaxpr(dense_run)(*given))) == logits * S // AT_ONCE


def test_no_gradient_of_a_frozen_head_is_formed():
    """Neither that nor a zero of its size, and two products in place of three."""
    for op, trained in ((chunked, False), (chunked, True)):
        run, given = update(op, trained)
        shapes = [
            (name, shape)
            for name, shape in formed(jax.make_jaxpr(run)(*given))
            if name not in ("jit", "pjit")
        ]
        of_head = [
            shape for _, shape in shapes if math.prod(shape) >= V * D and V in shape and D in shape
        ]
        products = [shape for name, shape in shapes if name == "dot_general"]
        assert bool(of_head) == trained
        assert len(products) == (3 if trained else 2)


def test_a_loss_without_gradients_takes_one_product():
    _, given = update(chunked, False)
    assert [name for name, _ in formed(jax.make_jaxpr(chunked)(*given))].count("dot_general") == 1


def test_a_head_alone_may_be_trained():
    inputs = draws((2, 9), 8, 33)
    x, head, targets, weights = map(jnp.asarray, inputs)
    grad = jax.grad(lambda head: chunked_cross_entropy(x, head, targets, weights, 4))
    assert relative(COTANGENT * grad(head), exact(inputs)[2]) < CLOSE
    assert [name for name, _ in formed(jax.make_jaxpr(grad)(head))].count("dot_general") == 2


def test_the_heads_gradient_is_summed_apart_on_every_device():
    """So nothing of its size crosses devices inside the loop."""
    run, given = update(partial(chunked, shards=2), True)
    inside = [shape for name, shape in formed(jax.make_jaxpr(run)(*given)) if name == "dot_general"]
    assert (2, D, V) in inside


# ---- which is chosen ---------------------------------------------------------------------------


def test_few_tokens_are_dense_and_many_go_in_chunks(monkeypatch):
    monkeypatch.setattr(dispatch, "TOKENS", 16)
    assert (
        positions_at_once((2, 8)) == 8
        and positions_at_once((2, 9)) == 5
        and positions_at_once((64, 9)) == 1
    )
    assert positions_at_once((8, 9), shards=4) == 5 and positions_at_once((8, 8), shards=4) == 8
    for positions, loops in ((8, False), (9, True)):
        inputs = draws((2, positions), 8, 33)
        names = [name for name, _ in formed(jax.make_jaxpr(linear_cross_entropy)(*inputs))]
        assert ("scan" in names) == loops
        assert (
            largest(jax.jit(partial(gradients, linear_cross_entropy))(inputs), exact(inputs))
            < CLOSE
        )


def test_what_is_chosen_is_told_with_its_memory(monkeypatch):
    monkeypatch.setattr(dispatch, "TOKENS", 1024)
    assert choose() == ("xla", "the default; opt-in, unverified: pallas_tpu, pallas_gpu")
    assert choose((8, 128), 4096)[1].endswith("all logits at once, 16.0 MiB a device")
    assert choose((16, 512), 4096, 2)[1].endswith(
        "128 of a row's 512 positions at a time, logits of 16.0 of 64.0 MiB a device"
    )


def test_an_implementation_that_does_not_exist_is_refused_by_name():
    with pytest.raises(ValueError, match="'liger' does not exist; there is xla, pallas_tpu"):
        linear_cross_entropy(*draws((3,), 8, 11), implementation="liger")
