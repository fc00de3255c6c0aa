"""The update step: one jitted function over plain pytrees, with the state donated.

Loss is the sum over supervised tokens divided by their number in the whole update, across rows,
devices and accumulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxre_kernels.cross_entropy import cross_entropy
from jaxre_kernels.lora import token_keys

from jaxre.config import Config
from jaxre.data.packing import RowShape
from jaxre.data.rows import Rows
from jaxre.models import decoder, encoder, lora
from jaxre.models.architecture import Architecture, EncoderArchitecture
from jaxre.models.ops import ONE_DEVICE, Ops

Tree = Any


class State(NamedTuple):
    """What an update changes. step: [] int32, updates done; trainable and optimiser: f32
    pytrees.
    """

    step: jax.Array
    trainable: Tree
    optimiser: Tree


class Metrics(NamedTuple):
    """Of one update, f32 scalars: loss per supervised token, norm of the gradient before
    clipping.
    """

    loss: jax.Array
    gradient_norm: jax.Array

    def numbers(self) -> dict[str, float]:
        return {"loss": float(self.loss), "gradient_norm": float(self.gradient_norm)}


def loss_sum(
    params: Tree,
    adapter: decoder.Adapter | None,
    rows: Rows,
    architecture: Architecture,
    ops: Ops = ONE_DEVICE,
    shape: RowShape | None = None,
    remat: str = "none",
) -> jax.Array:
    """Sum of the weighted cross-entropy of one micro-batch; last layer and head run at supervised
    positions only.

    Args:
      ops: of the devices that share the rows.
      shape: of the rows, where attention must look; the whole row if not given.
    """
    look = {"prefix": shape.prefix, "span": shape.span} if shape else {}
    given = (rows.tokens, rows.positions, rows.visible_until)
    # B S D
    x = decoder.forward(
        params, *given, architecture, adapter, ops, chosen=rows.supervised, remat=remat, **look
    )
    with jax.named_scope("head"):
        normed, table = decoder.head_factors(params, x, architecture)
        return ops.cross_entropy(normed, table, rows.targets, rows.weights)


def classification_loss_sum(
    params: Tree,
    keys: jax.Array | None,
    rows: Rows,
    architecture: EncoderArchitecture,
    ops: Ops = ONE_DEVICE,
    remat: str = "none",
) -> jax.Array:
    """`loss_sum` of an encoder: each example is supervised once, at its first token; `keys` [B, T]
    switch dropout on.
    """
    packed = (rows.tokens, rows.positions, rows.visible_until, rows.supervised)
    logits = encoder.classify(params, *packed, architecture, keys, ops, remat)
    return cross_entropy(logits, rows.targets, rows.weights)  # B S N


def model_of(
    trainable: Tree, base: Tree, config: Config, keys: jax.Array | None, dtype: jnp.dtype
) -> tuple[Tree, decoder.Adapter | None]:
    """(params, adapter) of the forward pass: LoRA factors beside the base, or the f32 masters cast
    to `dtype`.
    """
    if config.train.method == "full":
        return jax.tree.map(lambda master: master.astype(dtype), trainable), None
    return base, decoder.Adapter(trainable, lora.scale_of(config.lora), config.lora.dropout, keys)


def make_optimiser(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm; biases and norms are not
    decayed.
    """
    train = config.train

    def decayed(tree: Tree) -> Tree:
        # Matrices only; a stacked norm or bias has two dimensions but is named as what it is.
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: not str(path[-1].key).endswith(("norm", "bias")), tree
        )

    return optax.chain(
        optax.clip_by_global_norm(train.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            train.beta1,
            train.beta2,
            train.epsilon,
            weight_decay=train.weight_decay,
            mask=decayed,
        ),
    )


def make_schedule(config: Config, steps: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up over `warmup` of the steps, then linear or cosine to
    zero, or constant.
    """
    train = config.train
    warm = math.ceil(train.warmup * steps)
    rest = max(1, steps - warm)
    after = {
        "linear": optax.linear_schedule(train.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(train.learning_rate, rest),
        "constant": optax.constant_schedule(train.learning_rate),
    }[train.schedule]
    return optax.join_schedules(
        [optax.linear_schedule(0.0, train.learning_rate, max(1, warm)), after], [warm]
    )


def make_update(
    config: Config,
    architecture: Architecture | EncoderArchitecture,
    optimiser: optax.GradientTransformation,
    dtype: jnp.dtype,
    ops: Ops = ONE_DEVICE,
    remat: str = "none",
) -> Callable[[State, Tree, Rows, RowShape], tuple[State, Metrics]]:
    """The update function, to be jitted with the state donated and the shape static.

    Args:
      ops: of the devices that share the rows.
      remat: what the backward pass computes again: `none` or `block` (see compilation.py).

    Its rows have a leading axis A, the micro-batches of the update ([A, B, T], [A, B, S]).
    """

    def update(
        state: State, base: Tree, rows: Rows, shape: RowShape | None = None
    ) -> tuple[State, Metrics]:
        count = jnp.maximum(jnp.sum(rows.weights), 1.0)

        def micro_loss(trainable: Tree, micro: Rows) -> jax.Array:
            if isinstance(architecture, EncoderArchitecture):
                params, _ = model_of(trainable, base, config, None, dtype)
                keys = dropout_keys(config.seed, state.step, micro)
                return (
                    classification_loss_sum(params, keys, micro, architecture, ops, remat) / count
                )
            keys = None
            if config.train.method == "lora" and config.lora.dropout:
                keys = dropout_keys(config.seed, state.step, micro)
            params, adapter = model_of(trainable, base, config, keys, dtype)
            return loss_sum(params, adapter, micro, architecture, ops, shape, remat) / count

        def accumulate(
            carry: tuple[jax.Array, Tree], micro: Rows
        ) -> tuple[tuple[jax.Array, Tree], None]:
            loss, gradients = jax.value_and_grad(micro_loss)(state.trainable, micro)
            return jax.tree.map(jnp.add, carry, (loss, gradients)), None

        if rows.tokens.shape[0] == 1:
            loss, gradients = jax.value_and_grad(micro_loss)(
                state.trainable, jax.tree.map(lambda array: array[0], rows)
            )
        else:
            zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.trainable))
            (loss, gradients), _ = jax.lax.scan(accumulate, zero, rows)

        with jax.named_scope("optimiser"):
            changes, optimiser_state = optimiser.update(gradients, state.optimiser, state.trainable)
            trainable = optax.apply_updates(state.trainable, changes)
        metrics = Metrics(loss, optax.tree.norm(gradients))
        return State(state.step + 1, trainable, optimiser_state), metrics

    return update


def dropout_keys(seed: int, step: jax.Array, rows: Rows) -> jax.Array:
    """[B, T] dropout keys of a micro-batch."""
    return token_keys(seed, step, rows.owner, rows.positions)
