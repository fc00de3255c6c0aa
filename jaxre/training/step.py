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
from jaxre_kernels.lora import token_keys

from jaxre.config import Config
from jaxre.data.packing import RowShape
from jaxre.data.rows import Rows
from jaxre.models.architecture import Architecture, EncoderArchitecture
from jaxre.models.lora import model_of
from jaxre.models.ops import ONE_DEVICE, Ops
from jaxre.objectives import objective_of

Tree = Any
LossSum = Callable[..., jax.Array]  # called as `objectives.sft.loss_sum` is


class State(NamedTuple):
    """State that an update changes. step: [] int32, updates done. trainable, optimiser: f32
    pytrees.
    """

    step: jax.Array
    trainable: Tree
    optimiser: Tree


class Metrics(NamedTuple):
    """Figures of an update, f32 scalars. loss: per supervised token. gradient_norm: before
    clipping.
    """

    loss: jax.Array
    gradient_norm: jax.Array

    def numbers(self) -> dict[str, float]:
        return {"loss": float(self.loss), "gradient_norm": float(self.gradient_norm)}


def make_optimiser(config: Config, steps: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm; only matrices decay."""
    train = config.train

    def decayed(tree: Tree) -> Tree:
        # By name, as a stacked norm or bias has two dimensions.
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
    """Learning rate by update: linear warm-up over the share `warmup` of the steps, then linear or
    cosine decay to zero, or constant.
    """
    train = config.train
    warm = math.ceil(train.warmup * steps)
    rest = max(1, steps - warm)
    decay = {
        "linear": optax.linear_schedule(train.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(train.learning_rate, rest),
        "constant": optax.constant_schedule(train.learning_rate),
    }[train.schedule]
    return optax.join_schedules(
        [optax.linear_schedule(0.0, train.learning_rate, max(1, warm)), decay], [warm]
    )


def make_update(
    config: Config,
    architecture: Architecture | EncoderArchitecture,
    optimiser: optax.GradientTransformation,
    dtype: jnp.dtype,
    ops: Ops = ONE_DEVICE,
    remat: str = "none",
    loss: LossSum | None = None,
) -> Callable[[State, Tree, Rows, RowShape], tuple[State, Metrics]]:
    """Makes the update function, to be jitted with the state donated and the shape static.

    Its rows have a leading axis A, the micro-batches of the update ([A, B, T], [A, B, S]).

    Args:
      ops: operations of the devices that share the rows.
      remat: what the backward pass recomputes: `none` or `block` (see compilation.py).
      loss: replaces that of the config's objective.
    """
    loss = loss or objective_of(config).loss_sum
    dropout = config.train.method == "lora" and config.lora.dropout

    def update(
        state: State, base: Tree, rows: Rows, shape: RowShape | None = None
    ) -> tuple[State, Metrics]:
        count = jnp.maximum(jnp.sum(rows.weights), 1.0)

        def micro_loss(trainable: Tree, micro: Rows) -> jax.Array:
            keys = dropout_keys(config.seed, state.step, micro)
            params, adapter = model_of(trainable, base, config, keys if dropout else None, dtype)
            return loss(params, adapter, micro, architecture, ops, shape, remat, keys) / count

        def accumulate(
            carry: tuple[jax.Array, Tree], micro: Rows
        ) -> tuple[tuple[jax.Array, Tree], None]:
            loss_and_gradients = jax.value_and_grad(micro_loss)(state.trainable, micro)
            return jax.tree.map(jnp.add, carry, loss_and_gradients), None

        if rows.tokens.shape[0] == 1:
            mean, gradients = jax.value_and_grad(micro_loss)(
                state.trainable, jax.tree.map(lambda array: array[0], rows)
            )
        else:
            zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.trainable))
            (mean, gradients), _ = jax.lax.scan(accumulate, zero, rows)

        with jax.named_scope("optimiser"):
            changes, optimiser_state = optimiser.update(gradients, state.optimiser, state.trainable)
            trainable = optax.apply_updates(state.trainable, changes)
        metrics = Metrics(mean, optax.tree.norm(gradients))
        return State(state.step + 1, trainable, optimiser_state), metrics

    return update


def dropout_keys(seed: int, step: jax.Array, rows: Rows) -> jax.Array:
    """[B, T] dropout keys of a micro-batch."""
    return token_keys(seed, step, rows.owner, rows.positions)
