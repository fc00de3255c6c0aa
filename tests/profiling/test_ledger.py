"""The ledger's FLOPs against the products of traced programs, counts by hand, and masks written
out.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreters import needs_interpreter
from jaxre_kernels.attention import Window, attention, visible_mask
from tiny import ARCHITECTURE
from tiny_encoders import fields_of

from jaxre.config import Lora
from jaxre.data.packing import RowShape
from jaxre.data.rows import Rows, empty_rows
from jaxre.models import decoder
from jaxre.models.architecture import architecture_of
from jaxre.models.lora import init_adapter
from jaxre.models.module import init_weights
from jaxre.objectives import classify
from jaxre.objectives.sft import loss_sum
from jaxre.profiling.ledger import Work, flops_of, program_flops, savings_of, work_of

B, T = 2, 12
SOME = Lora(rank=3, targets=("q", "v", "down"))
DECODERS = {
    "grouped heads, tied": {},
    "head channels of their own": {"model_type": "qwen3", "head_dim": 12},
    "one layer, untied": {"num_hidden_layers": 1, "tie_word_embeddings": False},
}


def full_rows(supervised: int = T) -> Rows:
    """One example fills each row, `supervised` of its positions are supervised."""
    rows = empty_rows(RowShape(B, T, supervised))
    rows.positions[:] = np.arange(T)
    rows.visible_until[:] = T
    rows.supervised[:] = np.arange(supervised)
    rows.weights[:] = 1.0
    return rows


@pytest.mark.parametrize(
    "lora", [Lora(rank=5), SOME, None], ids=["all projections", "some", "full"]
)
@pytest.mark.parametrize("family", DECODERS)
def test_forward_flops_are_the_products_of_the_traced_forward_pass(
    family: str, lora: Lora | None
) -> None:
    architecture = architecture_of(ARCHITECTURE | DECODERS[family], "tiny")
    params = jax.eval_shape(lambda: init_weights(architecture, 0))
    factors = (
        jax.eval_shape(lambda: init_adapter(architecture, lora, jax.random.key(0)))
        if lora
        else None
    )

    def forward(params, factors, rows):
        return loss_sum(params, decoder.Adapter(factors, 2.0) if lora else None, rows, architecture)

    counted = program_flops(jax.make_jaxpr(forward)(params, factors, full_rows()))
    # Dense attention scores every pair of a row; every position is supervised, so nothing is left
    # out.
    parts = flops_of(Work(B * T, B * T, B * T, B * T * T, B * T * T), architecture, lora)
    passes = {
        "base": 3 if lora is None else 2,
        "LoRA": 3,
        "attention": 3,
        "head": 3 if lora is None else 2,
    }
    assert counted == sum(value / passes[part] for part, value in parts.items())


@pytest.mark.parametrize(
    "name", ["bert, two token types", "bert, one layer", "roberta, positions from 2"]
)
def test_encoder_flops_are_the_products_of_the_traced_forward_pass(name: str) -> None:
    architecture = architecture_of(fields_of(name), "tiny")
    params = jax.eval_shape(lambda: init_weights(architecture, 0))
    rows = full_rows(supervised=2)  # the last layer and the head run there only
    counted = program_flops(
        jax.make_jaxpr(lambda params, rows: classify.loss_sum(params, None, rows, architecture))(
            params, rows
        )
    )
    work = work_of(rows, both_ways=True)
    assert work == Work(B * T, B * 2, B * 2, B * T * T, B * 2 * T)
    assert counted == sum(flops_of(work, architecture, None).values()) / 3


def test_training_takes_four_times_the_frozen_and_six_times_the_trained_products() -> None:
    tokens, width, rank = 7, 16, 3
    shape = jax.ShapeDtypeStruct
    x, w, a, b = (
        shape(size, jnp.float32)
        for size in ((tokens, width), (width, width), (width, rank), (rank, width))
    )

    def layer(x, a, b, w):
        return jnp.tanh(x @ w + (x @ a) @ b)

    def loss(x, a, b, w):
        return layer(layer(x, a, b, w), a, b, w).sum()

    counted = program_flops(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x, a, b, w))
    assert counted == 2 * tokens * (4 * width * width + 6 * 2 * rank * width)


def test_flops_are_those_counted_by_hand() -> None:
    architecture = architecture_of(ARCHITECTURE, "tiny")  # D 64, F 96, H 8, K 4, C 8, V 512, L 3
    work = Work(tokens=100, last=10, head=10, pairs=2000, last_pairs=300)
    parts = flops_of(work, architecture, Lora(rank=2, targets=("k", "o")))
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    assert parts["base"] == 4 * (
        2 * 100 * layer + 100 * 2 * 64 * 32 + 10 * (2 * 64 * 64 + 3 * 64 * 96)
    )
    assert parts["LoRA"] == 6 * 2 * (
        2 * 100 * (64 + 32 + 64 + 64) + 100 * (64 + 32) + 10 * (64 + 64)
    )
    assert parts["attention"] == 12 * 8 * 8 * (2 * 2000 + 300)
    assert parts["head"] == 4 * 10 * 64 * 512
    trained = flops_of(work, architecture, None)
    assert (
        trained["base"] == 1.5 * parts["base"]
        and trained["head"] == 1.5 * parts["head"]
        and trained["LoRA"] == 0
    )


def test_loops_count_as_often_as_they_run() -> None:
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def looped(x):
        x, _ = jax.lax.scan(lambda carry, _: (jax.jit(lambda c: c @ c)(carry), None), x, length=5)
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y, x)

    assert program_flops(jax.make_jaxpr(looped)(x)) == (5 + 2) * 2 * 4**3


def test_what_each_device_of_a_mesh_runs_counts_for_all_of_them() -> None:
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mesh = jax.sharding.AbstractMesh(
        (4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    # Over the tensor axis XLA splits what is left.
    split = jax.shard_map(
        jnp.matmul, mesh=mesh, in_specs=(rows, whole), out_specs=rows, axis_names={"data"}
    )
    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 3), (3, 5)))
    assert program_flops(jax.make_jaxpr(split)(x, w)) == 2 * 8 * 3 * 5


@pytest.mark.parametrize(
    "implementation",
    ["pallas_tpu", pytest.param("pallas_gpu", marks=[pytest.mark.slow, needs_interpreter])],
)
def test_products_that_a_kernel_hides_are_not_counted(implementation: str) -> None:
    """The TPU kernel's grid depends on the data; the GPU kernel's products are no `dot_general`."""
    q, k, v = (jax.ShapeDtypeStruct((1, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2))
    until = jax.ShapeDtypeStruct((1, 256), jnp.int32)

    def scanned(q, k, v, until):
        return jax.lax.scan(
            lambda q, _: (attention(q, k, v, until, implementation=implementation), None),
            q,
            length=3,
        )

    assert program_flops(jax.make_jaxpr(scanned)(q, k, v, until)) is None


def test_recomputation_counts() -> None:
    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)

    def block(x):
        return jnp.tanh(jnp.sin(x @ x) @ x)

    def flops(f):
        return program_flops(jax.make_jaxpr(jax.grad(lambda x: f(x).sum()))(x))

    assert flops(jax.checkpoint(block)) == flops(block) + 2 * 2 * 4**3


def laid_out(
    *places: tuple[int, int, int, int, int], supervised: dict[int, tuple[int, ...]]
) -> Rows:
    """Rows of 24 with stretches (row, start, end, position of the first, visible until); all else
    is pad.
    """
    rows = empty_rows(RowShape(3, 24, 6))
    for b, start, end, position, until in places:
        rows.positions[b, start:end] = np.arange(position, position + end - start)
        rows.visible_until[b, start:end] = until
    for b, chosen in supervised.items():
        rows.supervised[b, : len(chosen)] = chosen
        rows.weights[b, : len(chosen)] = 0.5
    return rows


def tree_rows() -> Rows:
    """A prefix of 3 tokens with two branches of 2 and 4, the second with two endings of 1 and 2; an
    example of 5; a row of pads.
    """
    places = [
        (0, 3, 0, 12),
        (3, 5, 3, 5),
        (5, 9, 3, 12),
        (9, 10, 7, 10),
        (10, 12, 7, 12),
        (12, 17, 0, 17),
    ]
    return laid_out(*((0, *place) for place in places), supervised={0: (4, 9, 11, 16)})


def ragged_rows() -> Rows:
    """Examples of 2 and 9 tokens; of 4, 7 and 13, without pads; a row of pads."""
    places = [
        (0, 0, 2, 0, 2),
        (0, 2, 11, 0, 11),
        (1, 0, 4, 0, 4),
        (1, 4, 11, 0, 11),
        (1, 11, 24, 0, 24),
    ]
    return laid_out(*places, supervised={0: (0, 5, 6), 1: (2, 22, 23)})


@pytest.mark.parametrize(
    ("rows", "both_ways"),
    [(tree_rows(), False), (ragged_rows(), False), (ragged_rows(), True)],
    ids=["prefix tree", "ragged rows", "an encoder's ragged rows"],
)
def test_work_is_what_the_written_out_mask_shows(rows: Rows, both_ways: bool) -> None:
    of_example = rows.visible_until[:, :, None] == rows.visible_until[:, None, :]
    mask = of_example if both_ways else np.asarray(visible_mask(rows.visible_until))
    # A pad sees itself alone and nothing but itself sees it.
    pad = (mask.sum(axis=1) == 1) & (mask.sum(axis=2) == 1)
    asked = [(b, rows.supervised[b, s]) for b, s in zip(*np.nonzero(rows.weights), strict=True)]
    work = work_of(rows, both_ways)
    assert work.tokens == (~pad).sum()
    assert work.pairs == mask[~pad].sum()
    assert work.head == work.last == len(asked)
    assert work.last_pairs == sum(mask[place].sum() for place in asked)


def test_savings_lead_from_the_padded_run_to_what_is_needed() -> None:
    architecture, lora = architecture_of(ARCHITECTURE, "tiny"), Lora(rank=2)
    rows, lengths = tree_rows(), [5, 8, 9, 5]  # the leaves of the tree, as whole examples
    work = work_of(rows, both_ways=False)
    savings = savings_of(work, lengths, 24, architecture, lora)
    padded, pairs = 4 * 9, 4 * 9 * 9
    # The padded run scores every pair of its rows and forms the gradient of every weight, three
    # products where two are needed.
    start = flops_of(Work(padded, padded, padded, pairs, pairs), architecture, lora)
    assert (
        savings[0].before
        == 1.5 * (start["base"] + start["head"]) + start["LoRA"] + start["attention"]
    )
    assert savings[-1].after == sum(flops_of(work, architecture, lora).values())
    assert [one.after for one in savings[:-1]] == [one.before for one in savings[1:]]
    assert all(0 < one.removed < 1 for one in savings)


def test_the_last_two_savings_are_the_gradients_of_frozen_weights_and_the_invisible_pairs() -> None:
    architecture, lora = architecture_of(ARCHITECTURE, "tiny"), Lora(rank=2)
    work = work_of(tree_rows(), both_ways=False)
    gradients, pairs = savings_of(work, [5, 8, 9, 5], 24, architecture, lora)[4:]
    parts = flops_of(work, architecture, lora)
    assert gradients.before - gradients.after == 0.5 * (parts["base"] + parts["head"])
    # Each of the 17 tokens, and of the 4 that the last layer runs at, scored all of its row of 24.
    every = flops_of(
        dataclasses.replace(work, pairs=17 * 24, last_pairs=4 * 24), architecture, lora
    )
    assert pairs.before - pairs.after == every["attention"] - parts["attention"] > 0
    # all weights are trained
    assert savings_of(work, [5, 8, 9, 5], 24, architecture, None)[4].removed == 0


@pytest.mark.parametrize("rows", [tree_rows(), ragged_rows()], ids=["prefix tree", "ragged rows"])
def test_a_window_hides_what_the_written_out_mask_shows(rows: Rows) -> None:
    """And layers count by their kind: two of three scanned ones slide, the last one too."""
    window = 3
    mask = np.asarray(visible_mask(rows.visible_until))
    near = np.asarray(visible_mask(rows.visible_until, Window(rows.positions, window)))
    pad = (mask.sum(axis=1) == 1) & (mask.sum(axis=2) == 1)
    asked = [(b, rows.supervised[b, s]) for b, s in zip(*np.nonzero(rows.weights), strict=True)]
    work, plain = work_of(rows, False, window), work_of(rows, False)
    assert work.pairs - work.hidden == near[~pad].sum() < work.pairs == plain.pairs
    assert work.last_pairs - work.last_hidden == sum(near[place].sum() for place in asked)
    assert (plain.hidden, plain.last_hidden) == (0, 0)
    architecture = dataclasses.replace(
        architecture_of(ARCHITECTURE, "tiny"),
        layers=4,
        window=window,
        sliding=(True, False, True, True),
    )
    pairs = 3 * work.pairs - 2 * work.hidden + work.last_pairs - work.last_hidden
    parts = flops_of(work, architecture, None)
    assert parts["attention"] == 3 * 4 * architecture.size("HC") * pairs
