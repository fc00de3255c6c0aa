"""Packing is exact: loss and gradients of packed rows equal one example a row under a plain causal
mask.

Relative is max|difference| / max|reference| of a tensor; f32 sums in another order reach 2e-6 here,
the promise is 1e-5.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import ARCHITECTURE

from jaxre.config import Config, check_config
from jaxre.data.packing import RowShape, plan_by_examples, plan_by_tokens
from jaxre.data.prefixes import find_prefixes
from jaxre.data.rows import Rows, fill_rows, fill_update
from jaxre.data.template import Encoded
from jaxre.data.tokens import TokenSet
from jaxre.models.architecture import architecture_of
from jaxre.models.lora import init_adapter, model_of
from jaxre.models.module import init_weights
from jaxre.objectives.sft import loss_sum
from jaxre.training.step import State, dropout_keys, make_update

ROW, EXAMPLES, STEP = 64, 24, 5
TOLERANCE = 1e-5
# That of one example a row too, so that both sides are one compiled function.
SHAPE = RowShape(EXAMPLES, ROW, ROW)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}
FIELDS = ARCHITECTURE | SIZES
TINY = architecture_of(FIELDS, "tiny")


def perturbed(tree, seed: int):
    """Biases away from 0, norms away from 1, B of every LoRA pair away from 0."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            np.asarray(leaf) + 0.1 * draw.standard_normal(leaf.shape), jnp.float32
        ),
        tree,
    )


@pytest.fixture(scope="module")
def tokens() -> TokenSet:
    draw = np.random.default_rng(0)
    encoded = []
    for number in range(EXAMPLES):
        length = ROW if number == 0 else int(draw.integers(3, 40))  # one fills its row
        encoded.append(
            Encoded(
                draw.integers(0, TINY.vocabulary, length).tolist(), int(draw.integers(1, length))
            )
        )
    return TokenSet.of(encoded, [f"example-{number}" for number in range(EXAMPLES)])


@pytest.fixture(scope="module")
def base() -> dict:
    return perturbed(init_weights(TINY, seed=1), 1)


def settings(method: str, dropout: float = 0.0) -> Config:
    return check_config(
        {
            "name": "tiny",
            "model": {"path": "tiny"},
            "data": {"train": {"dataset": "facts"}},
            "lora": {"rank": 4, "alpha": 8, "dropout": dropout},
            "train": {"method": method, "batch_tokens": ROW, "row_length": ROW},
        },
        "tiny",
    )


def trainable_of(config: Config, base: dict):
    return (
        base
        if config.train.method == "full"
        else perturbed(init_adapter(TINY, config.lora, jax.random.key(2)), 2)
    )


def unpacked(tokens: TokenSet, prompt_weight: float) -> Rows:
    """One example a row under the plain causal mask, written without `fill_rows`."""
    B, T = len(tokens), int(tokens.lengths.max())
    rows = Rows(
        tokens=np.zeros((B, T), np.int32),
        positions=np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
        visible_until=np.full((B, T), T, np.int32),
        owner=np.zeros((B, T), np.uint32),
        supervised=np.broadcast_to(
            np.arange(T, dtype=np.int32), (B, T)
        ),  # every position is scored,
        targets=np.zeros((B, T), np.int32),
        weights=np.zeros((B, T), np.float32),  # most with weight 0
    )
    owners = find_prefixes(tokens).owners
    for b in range(B):
        rows.owner[b, : len(tokens[b])] = owners[tokens.starts[b] : tokens.starts[b + 1]]
        ids, prompt = tokens[b], int(tokens.prompt_lengths[b])
        rows.tokens[b, : len(ids)] = ids
        rows.targets[b, : len(ids) - 1] = ids[1:]
        rows.weights[b, : prompt - 1] = prompt_weight
        rows.weights[b, prompt - 1 : len(ids) - 1] = 1
    return rows


@partial(jax.jit, static_argnums=(3, 4))
def compiled(trainable, base, rows: Rows, method: str, dropout: float):
    config = settings(method, dropout)

    def loss(trainable):
        keys = dropout_keys(config.seed, jnp.int32(STEP), rows) if dropout else None
        params, adapter = model_of(trainable, base, config, keys, jnp.dtype(jnp.float32))
        return loss_sum(params, adapter, rows, TINY) / jnp.sum(rows.weights)

    return jax.value_and_grad(loss)(trainable)


def gradients(trainable, base, rows: Rows, config: Config):
    """Loss per supervised token and its gradient."""
    return compiled(trainable, base, rows, config.train.method, config.lora.dropout)


def worst(found, reference) -> float:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(reference), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


CASES = [("lora", 0.0, 0.0), ("lora", 0.3, 0.0), ("lora", 0.3, 0.2), ("full", 0.0, 0.0)]


@pytest.mark.parametrize(("method", "dropout", "prompt_weight"), CASES)
def test_packed_loss_and_gradients_equal_one_example_a_row(
    tokens: TokenSet, base: dict, method: str, dropout: float, prompt_weight: float
) -> None:
    config = settings(method, dropout)
    trainable = trainable_of(config, base)
    reference_loss, reference = gradients(trainable, base, unpacked(tokens, prompt_weight), config)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(reference))
    supervised = tokens.lengths - 1 if prompt_weight else tokens.supervised
    packings = []
    for seed in (0, 1):
        plan = plan_by_tokens(
            tokens.lengths,
            supervised,
            find_prefixes(tokens),
            seed=seed,
            epochs=1,
            row_length=ROW,
            rows=SHAPE.rows,
            accumulation=1,
        )
        (update,) = plan.updates
        packings.append(update.micro[0])
        rows = fill_rows(tokens, plan.prefixes, update.micro[0], SHAPE, prompt_weight)
        loss, found = gradients(trainable, base, rows, config)
        assert abs(float(loss / reference_loss) - 1) < TOLERANCE
        assert worst(found, reference) < TOLERANCE
    assert packings[0] != packings[1] and max(len(row) for row in packings[0]) > 2


def test_dropout_changes_the_loss(tokens: TokenSet, base: dict) -> None:
    """Or the equality above would hold because nothing is dropped."""
    trainable, rows = trainable_of(settings("lora"), base), unpacked(tokens, 0.0)
    with_dropout, without = (
        float(gradients(trainable, base, rows, settings("lora", rate))[0]) for rate in (0.3, 0.0)
    )
    assert abs(with_dropout / without - 1) > 1e-3


def updated(config: Config, trainable, base, rows: Rows) -> tuple[float, dict]:
    """Loss and gradient as the training's own update computes them; the state of `trace(0)` is the
    gradient.
    """
    kept = optax.trace(decay=0.0)
    update = jax.jit(make_update(config, TINY, kept, jnp.dtype(jnp.float32)))
    state, metrics = update(State(jnp.int32(STEP), trainable, kept.init(trainable)), base, rows)
    return float(metrics.loss), state.optimiser.trace


@pytest.mark.parametrize(("by", "dropout"), [("tokens", 0.3), ("examples", 0.0)])
def test_accumulated_gradients_equal_one_batch(
    tokens: TokenSet, base: dict, by: str, dropout: float
) -> None:
    """The sum over micro-batches is divided by the supervised tokens of all of them, so their sizes
    do not matter.
    """
    config = settings("lora", dropout)
    trainable = trainable_of(config, base)
    same = {"seed": 0, "epochs": 1, "row_length": ROW, "accumulation": 4}
    if by == "tokens":
        plan = plan_by_tokens(
            tokens.lengths, tokens.supervised, find_prefixes(tokens), rows=4, **same
        )  # the last micro-batch holds fewer rows
    else:
        plan = plan_by_examples(
            tokens.lengths,
            tokens.supervised,
            find_prefixes(tokens),
            examples=EXAMPLES,
            multiple=8,
            **same,
        )
    (update,) = plan.updates
    loss, found = updated(config, trainable, base, fill_update(tokens, plan.prefixes, update))
    reference_loss, reference = gradients(trainable, base, unpacked(tokens, 0.0), config)
    assert abs(loss / float(reference_loss) - 1) < TOLERANCE
    assert worst(found, reference) < TOLERANCE


def test_an_empty_micro_batch_changes_nothing(tokens: TokenSet, base: dict) -> None:
    config = settings("lora")
    trainable = trainable_of(config, base)
    plan = plan_by_tokens(
        tokens.lengths,
        tokens.supervised,
        find_prefixes(tokens),
        seed=0,
        epochs=1,
        row_length=ROW,
        rows=SHAPE.rows,
        accumulation=1,
    )
    one, none = (
        fill_rows(tokens, plan.prefixes, packed, SHAPE) for packed in (plan.updates[0].micro[0], [])
    )
    loss, found = updated(
        config, trainable, base, Rows(*(np.stack(pair) for pair in zip(one, none, strict=True)))
    )
    reference_loss, reference = gradients(trainable, base, one, config)
    assert abs(loss / float(reference_loss) - 1) < TOLERANCE
    assert worst(found, reference) < TOLERANCE
