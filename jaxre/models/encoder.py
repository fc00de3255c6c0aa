"""The encoder's forward pass (BERT, RoBERTa) with its classification head: free functions over
plain pytrees.

Learned positions, LayerNorm after each sum, attention in both directions inside an example, GELU.
All layers but the last are scanned; the last runs only at the chosen positions, which are
classified. `weights.py` declares the weights; BERT and RoBERTa differ in their names there, and
here in the offset of positions and the head's dropout.

Letters: B rows, T tokens in a row, S chosen positions in a row, D embedding, H heads, C head
channels, F feed-forward, V vocabulary, N labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxre_kernels.attention import masked_attention
from jaxre_kernels.linear import dense_linear
from jaxre_kernels.lora import keep_mask

from jaxre.models.architecture import EncoderArchitecture
from jaxre.models.ops import ONE_DEVICE, Ops
from jaxre.models.weights import places

Tree = dict[str, Any]

# Dropout sites in a layer; the embeddings and the head count as layers of their own.
AFTER_ATTENTION, AFTER_MLP = range(2)


def classify(
    params: Tree,
    tokens: jax.Array,
    positions: jax.Array,
    visible_until: jax.Array,
    chosen: jax.Array,
    architecture: EncoderArchitecture,
    keys: jax.Array | None = None,
    ops: Ops = ONE_DEVICE,
    remat: str = "none",
) -> jax.Array:
    """Packed rows to label logits at chosen positions, the first tokens of their examples.

    Args:
      params: weights in the compute dtype.
      tokens, positions, visible_until: [B, T] int32, the packed rows. Examples share no prefix, so
        tokens have the same `visible_until`, and see each other, only within an example.
      chosen: [B, S] int32.
      keys: [B, T] uint32 dropout keys of the tokens; None switches dropout off. Attention weights
        are never dropped (transformers drops them too while training).
      ops: operations of the devices that share the rows.
      remat: what the backward pass recomputes: `none` or `block` (from a layer's input).

    Returns:
      [B, S, N] f32 logits.
    """

    def at(array: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, chosen[..., None], axis=1)  # B S ...

    with jax.named_scope("embed"):
        rows = params["positions"][positions + architecture.position_offset]
        x = params["embed"][tokens] + rows + params["types"][0]  # B T D
        x = layer_norm(
            x, params["embed_norm"], params["embed_norm_bias"], architecture.norm_epsilon
        )
        x = ops.constrain(drop(x, keys, architecture.layers, 0, architecture.dropout))
    # Positions count from the first token of an example; a pad token has 0 and sees itself.
    visible_from = jnp.arange(tokens.shape[1]) - positions  # B T

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return ops.attention(q, k, v, visible_until, visible_from)

    def attend_last(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        query = chosen[..., None]  # B S 1
        return masked_attention(
            q, k, v, (visible_from[:, None] <= query) & (query < visible_until[:, None])
        )

    def step(x: jax.Array, layer: tuple[Tree, jax.Array]) -> tuple[jax.Array, None]:
        weights, index = layer
        return ops.constrain(run_layer(weights, x, x, attend, index, architecture, keys)), None

    if architecture.layers > 1:
        scanned = jax.checkpoint(step, prevent_cse=False) if remat == "block" else step
        x, _ = jax.lax.scan(scanned, x, (params["layers"], jnp.arange(architecture.layers - 1)))
    if keys is not None:
        keys = at(keys[..., None])[..., 0]  # B S
    # B S D
    x = run_layer(
        params["last"], at(x), x, attend_last, architecture.layers - 1, architecture, keys
    )
    return head(params, x, architecture, keys)


def run_layer(
    weights: Tree,
    x: jax.Array,
    context: jax.Array,
    attend: Callable[..., jax.Array],
    index: jax.Array | int,
    architecture: EncoderArchitecture,
    keys: jax.Array | None,
) -> jax.Array:
    """One layer: norm(x + attention(x)), then norm(x + mlp(x)).

    Args:
      x: [B, S, D], the states to update. context: [B, T, D], the states they attend to.
      attend: q [B, S, H, C], k and v [B, T, H, C] -> [B, S, H, C].
      index: number of the layer, for dropout. keys: [B, S] uint32 or None.
    """

    def heads(array: jax.Array) -> jax.Array:
        return array.reshape(*array.shape[:2], architecture.heads, -1)  # B . H C

    def finish(x: jax.Array, out: jax.Array, norm: str, place: int) -> jax.Array:
        out = drop(out, keys, index, place, architecture.dropout)
        return layer_norm(
            x + out, weights[norm], weights[f"{norm}_bias"], architecture.norm_epsilon
        )

    with jax.named_scope("attention"):
        q, k, v = (
            heads(linear(weights, name, array))
            for name, array in (("q", x), ("k", context), ("v", context))
        )
        attended = attend(q, k, v).reshape(x.shape)
        x = finish(x, linear(weights, "o", attended), "attention_norm", AFTER_ATTENTION)
    with jax.named_scope("mlp"):
        hidden = jax.nn.gelu(linear(weights, "up", x), approximate=False)  # B S F
        return finish(x, linear(weights, "down", hidden), "mlp_norm", AFTER_MLP)


def head(
    params: Tree, x: jax.Array, architecture: EncoderArchitecture, keys: jax.Array | None = None
) -> jax.Array:
    """Tanh layer and label logits: [B, S, D] -> [B, S, N] f32. RoBERTa drops before the tanh layer
    too.
    """
    rate, layer = architecture.head_dropout, architecture.layers + 1
    with jax.named_scope("head"):
        if architecture.kind == "roberta":
            x = drop(x, keys, layer, 0, rate)
        x = drop(jnp.tanh(linear(params, "dense", x)), keys, layer, 1, rate)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.matmul(x, params["classifier"], preferred_element_type=wide) + params[
            "classifier_bias"
        ].astype(wide)


def linear(weights: Tree, name: str, x: jax.Array) -> jax.Array:
    """x W + b: [..., I] -> [..., O]."""
    return dense_linear(x, weights[name]) + weights[f"{name}_bias"]


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """(x - mean) / sqrt(variance + epsilon) * weight + bias over the last axis, in f32 (at
    least).
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    return (normed * weight + bias).astype(x.dtype)


def drop(
    x: jax.Array, keys: jax.Array | None, layer: jax.Array | int, place: int, rate: float
) -> jax.Array:
    """Dropout of hidden states x [B, S, D] by their tokens' keys [B, S], independent of packing."""
    if keys is None or not rate:
        return x
    return jnp.where(
        keep_mask(keys, layer, place, x.shape[-1], rate),
        x * jnp.asarray(1 / (1 - rate), x.dtype),
        0,
    )


def for_task(
    architecture: EncoderArchitecture,
    params: Tree,
    vocabulary: int,
    new_tokens: Mapping[int, Sequence[int]],
    labels: tuple[str, ...],
    seed: int,
) -> tuple[EncoderArchitecture, Tree, tuple[str, ...]]:
    """Fits an encoder to a task: embedding rows for new tokens, and a head for the given labels.

    Old rows do not change. A new token starts at the mean embedding of the tokens that describe it,
    or at the mean of all if none do (transformers' mean resizing draws around the same mean, with a
    billionth of the covariance). A head for the same labels is reused, in the given order;
    otherwise its last map is drawn at random (normal of the model's `initializer_range`, bias 0),
    and so is a missing tanh layer.

    Args:
      params: numpy, our layout; not changed.
      vocabulary: minimum number of rows (tokens of the tokenizer).
      new_tokens: id of each new token -> ids of old tokens that describe it.

    Returns:
      The architecture, the weights, and the names of the weights that were drawn at random.
    """
    old = params["embed"]
    embed = np.empty((max(vocabulary, len(old)), old.shape[1]), old.dtype)
    embed[: len(old)] = old
    embed[len(old) :] = old.mean(axis=0, dtype=np.float64)
    for token, described in new_tokens.items():
        embed[token] = old[list(described) or ...].mean(axis=0, dtype=np.float64)
    fitted = dataclasses.replace(architecture, vocabulary=len(embed), labels=labels, dense=True)
    weights = dict(params) | {"embed": embed}
    if sorted(labels) == sorted(architecture.labels):
        order = [architecture.labels.index(label) for label in labels]
        weights |= {name: weights[name][..., order] for name in ("classifier", "classifier_bias")}
    else:
        weights.pop("classifier", None)
        weights.pop("classifier_bias", None)
    draw, fresh = np.random.default_rng(seed), []
    for weight, _, shape, _ in places(fitted):
        if not weight.in_layer and weight.name not in weights:
            drawn = (
                fitted.initializer_range * draw.standard_normal(shape)
                if weight.initial == "normal"
                else np.zeros(shape)
            )
            weights[weight.name] = drawn.astype(old.dtype)
            fresh.append(weight.name)
    return fitted, weights, tuple(fresh)
