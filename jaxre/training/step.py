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
LossSum = Callable[..., jax.Array]  # called as `loss_sum` is


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


def loss_sum(
    params: Tree,
    adapter: decoder.Adapter | None,
    rows: Rows,
    architecture: Architecture,
    ops: Ops = ONE_DEVICE,
    shape: RowShape | None = None,
    remat: str = "none",
) -> jax.Array:
    """Sums the weighted cross-entropy of a micro-batch; last layer and head run only at supervised
    positions.

    Args:
      ops: operations of the devices that share the rows.
      shape: bounds of attention in the rows; whole rows by default.
    """
    bounds = {"prefix": shape.prefix, "span": shape.span} if shape else {}
    packed = (rows.tokens, rows.positions, rows.visible_until)
    # B S D
    x = decoder.forward(
        params, *packed, architecture, adapter, ops, chosen=rows.supervised, remat=remat, **bounds
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
    """`loss_sum` of an encoder, which supervises each example once, at its first token; `keys`
    [B, T] switch dropout on.
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
    loss: LossSum = loss_sum,
) -> Callable[[State, Tree, Rows, RowShape], tuple[State, Metrics]]:
    """Makes the update function, to be jitted with the state donated and the shape static.

    Its rows have a leading axis A, the micro-batches of the update ([A, B, T], [A, B, S]).

    Args:
      ops: operations of the devices that share the rows.
      remat: what the backward pass recomputes: `none` or `block` (see compilation.py).
      loss: loss of a decoder.
    """

    def update(
        state: State, base: Tree, rows: Rows, shape: RowShape | None = None
    ) -> tuple[State, Metrics]:
        count = jnp.maximum(jnp.sum(rows.weights), 1.0)

        def micro_loss(trainable: Tree, micro: Rows) -> jax.Array:
            encodes = isinstance(architecture, EncoderArchitecture)
            keys = None
            if encodes or (config.train.method == "lora" and config.lora.dropout):
                keys = dropout_keys(config.seed, state.step, micro)
            params, adapter = model_of(trainable, base, config, keys, dtype)
            if encodes:
                total = classification_loss_sum(params, keys, micro, architecture, ops, remat)
            else:
                total = loss(params, adapter, micro, architecture, ops, shape, remat)
            return total / count

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
