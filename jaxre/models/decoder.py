"""The decoder's forward pass: free functions over plain pytrees, one definition for training,
scoring and decoding.

RMSNorm, grouped-query attention, rotary positions, SwiGLU (Llama, Qwen2, Qwen3, SmolLM3) or GeGLU
(Gemma 3, with sliding and global layers). Layers but the last are scanned, so compile time does not
grow with depth. The weights are those of `weights.py`.

Letters: B rows, T tokens in a row, S supervised positions in a row, D embedding, H query heads,
K key/value heads, C head channels, F feed-forward, V vocabulary, R rank, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxre_kernels.attention import (
    Part,
    Window,
    joint_attention,
    masked_attention,
    visible_mask,
)
from jaxre_kernels.cross_entropy import logits_of
from jaxre_kernels.linear import dense_linear, packed, unpacked
from jaxre_kernels.lora import Factors, group_words
from jaxre_kernels.nf4 import NF4Tiles, NF4Weight, nf4_linear

from jaxre.models.architecture import Architecture, LinearScaling
from jaxre.models.ops import ONE_DEVICE, Ops
from jaxre.models.quantised import is_nf4

Tree = dict[str, Any]
# Number of positions visible to a token of a layer, its own included; None if all are.
Length = jax.Array | int | None
# (q, k, v, cache of the layer, window of the layer) -> (context, new cache of the layer)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any, Length], tuple[jax.Array, Any]]

GROUPS = ("qkv", "o", "gate_up", "down")
NO_WINDOW = np.iinfo(np.int32).max  # window of a global layer in a stack with sliding layers


@dataclass(frozen=True)
class Adapter:
    """LoRA factors beside the base: `{"layers": {name: {"a": [L-1, I, R], "b": [L-1, R, O]}},
    "last": {...}}`, f32.

    `keys` [B, T] uint32 are the dropout keys of the tokens; None switches dropout off.
    """

    factors: Tree
    scale: float
    rate: float = 0.0
    keys: jax.Array | None = None


class Prefix(NamedTuple):
    """Tokens before all rows, as keys and values: caches `{"layers": ([L-1, K, P, C], same),
    "last": ([K, P, C], same)}`, of which the first `length` places count.
    """

    caches: dict[str, Any]
    length: jax.Array


class Layer(NamedTuple):
    """One layer, or all scanned layers with a leading axis.

    weights: projections and norms by name. factors: LoRA factors as in `Adapter`. cache: as
    `Attend` takes and returns it. index: [] int32, number of the layer. rotates: whether it has
    rotary positions. window: its `Length`; NO_WINDOW or None for a global layer.
    """

    weights: Tree
    factors: Tree
    cache: Any
    index: jax.Array | int
    rotates: jax.Array | bool
    window: Length = None


@dataclass(frozen=True)
class Chosen:
    """Row positions [B, S] int32 where the last layer is computed, and attention for their
    queries.
    """

    positions: jax.Array
    attend: Attend


def forward(
    params: Tree,
    tokens: jax.Array,
    positions: jax.Array,
    visible_until: jax.Array,
    architecture: Architecture,
    adapter: Adapter | None = None,
    ops: Ops = ONE_DEVICE,
    *,
    chosen: jax.Array | None = None,
    before: Prefix | None = None,
    prefix: int = 0,
    span: int | None = None,
    remat: str = "none",
) -> jax.Array:
    """Packed rows to hidden states, before the final norm.

    Args:
      params: base weights in the compute dtype; projections may be `NF4Weight`s.
      tokens, positions, visible_until: [B, T] int32, the packed rows.
      adapter: LoRA factors, if any.
      ops: operations of the devices that run it.
      chosen: [B, S] int32, row positions to return; all by default. The last layer then computes
        only keys and values at every position, and everything else at these.
      before: what comes before all rows, computed already; for prediction.
      prefix, span: bounds of attention, see `jaxre_kernels.attention`.
      remat: what the backward pass recomputes: `none` or `block` (from a layer's input).

    Returns:
      [B, T, D] of the weights' dtype, or [B, S, D] at the chosen positions.
    """

    def attend(q, k, v, cache, length):
        window, part = window_of(positions, length), part_of(before, cache)
        bounds = {"prefix": prefix, "span": span}
        return ops.attention(q, k, v, visible_until, window=window, before=part, **bounds), None

    def attend_last(q, k, v, cache, length):
        window, part = window_of(positions, length), part_of(before, cache)
        return attention_at(chosen, q, k, v, visible_until, window, part), None

    pruned = chosen is not None and pruning_pays(tokens.shape[1], chosen.shape[1])
    last = Chosen(chosen, attend_last) if pruned else None
    caches = before.caches if before else None
    x, _ = run_layers(
        params,
        tokens,
        positions,
        architecture,
        attend,
        caches,
        adapter,
        ops,
        last,
        remat == "block",
    )
    return x if chosen is None or pruned else take(x, chosen)


def window_of(positions: jax.Array, length: Length) -> Window | None:
    """The window of a layer over positions [B, T]; None for a layer without one."""
    return None if length is None else Window(positions, length)


def part_of(prefix: Prefix | None, cache: tuple[jax.Array, jax.Array] | None) -> Part | None:
    """A prefix as a layer's attention takes it; `cache` is the layer's."""
    if prefix is None:
        return None
    keys, values = cache
    place = jnp.arange(keys.shape[1])
    return Part(keys, values, place < prefix.length, place)


def attention_at(
    chosen: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_until: jax.Array,
    window: Window | None = None,
    before: Part | None = None,
) -> jax.Array:
    """Attention of packed rows for the queries [B, S, H, C] at row positions `chosen` [B, S] alone,
    dense.
    """
    mask = visible_mask(visible_until, window, queries=chosen)  # B S T
    if before is None:
        return masked_attention(q, k, v, mask)
    B, S, H, C = q.shape
    K = k.shape[2]

    def by_group(array: jax.Array) -> jax.Array:  # B S ... -> B SG ..., queries of a key head
        return jnp.repeat(array, H // K, axis=1)

    if window is not None:
        selected = jnp.take_along_axis(window.positions, chosen, axis=1)
        before = before.within(window._replace(positions=by_group(selected)))
    own = Part(*(array.transpose(0, 2, 1, 3) for array in (k, v)), by_group(mask)[:, None])
    queries = q.reshape(B, S, K, H // K, C).transpose(0, 2, 1, 3, 4).reshape(B, K, -1, C)
    context = joint_attention(queries, [before, own])
    return context.reshape(B, K, S, H // K, C).transpose(0, 2, 1, 3, 4).reshape(q.shape)


def pruning_pays(length: int, chosen: int) -> bool:
    """True if it is cheaper to compute the last layer only at the chosen positions.

    Its attention is dense there, so the whole layer is cheaper if most of a row is chosen (language
    modelling).
    """
    return 2 * chosen <= length


def run_layers(
    params: Tree,
    tokens: jax.Array,
    positions: jax.Array,
    architecture: Architecture,
    attend: Attend,
    caches: Any = None,
    adapter: Adapter | None = None,
    ops: Ops = ONE_DEVICE,
    pruned: Chosen | None = None,
    remat_layers: bool = False,
) -> tuple[jax.Array, Any]:
    """Embeds `tokens` [B, T] and runs every layer.

    Args:
      caches: `{"layers": stacked, "last": cache of the last layer}`, or None.
      pruned: restricts the last layer to chosen positions.
      remat_layers: the backward pass stores only the inputs of the layers and recomputes the rest.
        Not of the last layer: its backward pass comes first, while its values still exist.

    Returns:
      [B, T, D] hidden states before the final norm ([B, S, D] if `pruned`), and the new caches in
      the same form.
    """
    with jax.named_scope("embed"):
        x = params["embed"][tokens].astype(params["norm"].dtype)  # B T D
        if architecture.embedding_scale is not None:  # rounded first, as in transformers
            x = x * jnp.asarray(architecture.embedding_scale, x.dtype)
        x = ops.constrain(x)
    angles = rotary_angles(positions, architecture)
    factors = adapter.factors if adapter else {"layers": {}, "last": {}}
    caches = caches or {"layers": None, "last": None}

    def step(x, layer):
        x, cache = run_layer(layer, x, angles, architecture, attend, adapter, ops)
        return ops.constrain(x), cache

    stacked = None
    if architecture.layers > 1:
        index = jnp.arange(architecture.layers - 1)
        rotates = jnp.asarray(np.array(architecture.rotary[:-1]))
        windows = None
        if architecture.window is not None:
            lengths = [architecture.layer_window(layer) for layer in range(architecture.layers - 1)]
            lengths = [NO_WINDOW if length is None else length for length in lengths]
            windows = jnp.array(lengths, jnp.int32)
        layers = Layer(
            params["layers"], factors["layers"], caches["layers"], index, rotates, windows
        )
        # A scan needs no barrier against the compiler merging the two computations.
        scanned = jax.checkpoint(step, prevent_cse=False) if remat_layers else step
        x, stacked = jax.lax.scan(scanned, x, layers)
    last = Layer(
        params["last"],
        factors["last"],
        caches["last"],
        architecture.layers - 1,
        architecture.rotary[-1],
        architecture.layer_window(architecture.layers - 1),
    )
    x, cache = run_layer(last, x, angles, architecture, attend, adapter, ops, pruned)
    return ops.constrain(x), {"layers": stacked, "last": cache}


def run_layer(
    layer: Layer,
    x: jax.Array,
    angles: jax.Array,
    architecture: Architecture,
    attend: Attend,
    adapter: Adapter | None,
    ops: Ops = ONE_DEVICE,
    pruned: Chosen | None = None,
) -> tuple[jax.Array, Any]:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)); with `norms_after`, each term is
    normed before it is added.

    Args:
      x: [B, T, D].
      angles: `rotary_angles`.

    Returns:
      [B, T, D], or [B, S, D] if `pruned`, and the layer's new cache.
    """
    weights, window = layer.weights, layer.window
    C = architecture.head_channels
    norm = partial(norm_of, weights, architecture=architecture)

    def project(inputs: jax.Array, names: tuple[str, ...], group: str) -> list[jax.Array]:
        return input_group(inputs, names, GROUPS.index(group), layer, adapter, ops)

    def heads(array: jax.Array) -> jax.Array:
        return array.reshape(*array.shape[:2], -1, C)

    with jax.named_scope("attention"):
        normed = norm("attention_norm", x)
        query_angles = angles
        if pruned is None:
            q, k, v = project(normed, ("q", "k", "v"), "qkv")
        else:
            k, v = project(normed, ("k", "v"), "qkv")
            # From here on only the chosen positions, with the dropout keys of their tokens.
            x, normed, query_angles = (
                take(array, pruned.positions) for array in (x, normed, angles)
            )
            if adapter and adapter.keys is not None:
                adapter = dataclasses.replace(
                    adapter, keys=take(adapter.keys[..., None], pruned.positions)[..., 0]
                )
            attend = pruned.attend
            (q,) = project(normed, ("q",), "qkv")
        q, k, v = heads(q), heads(k), heads(v)  # B . H C, B T K C, B T K C
        if architecture.qk_norm:
            q, k = norm("q_norm", q), norm("k_norm", k)
        if architecture.local_rope_theta is None:
            q, k = rotate(q, query_angles, layer.rotates), rotate(k, angles, layer.rotates)
        else:
            sliding = window is not None and window != NO_WINDOW
            q = rotate_in_layer(q, query_angles, sliding, query_factor(architecture))
            k = rotate_in_layer(k, angles, sliding, 1.0)
        # attention multiplies in the dtype of keys and values
        dtype = product_dtype(weights["k"], x)
        context, cache = attend(q, k.astype(dtype), v.astype(dtype), layer.cache, window)
        (out,) = project(context.reshape(*context.shape[:2], -1), ("o",), "o")
        x = x + (norm("attention_out_norm", out) if architecture.norms_after else out)
    with jax.named_scope("mlp"):
        normed = norm("mlp_norm", x)
        gate, up = project(normed, ("gate", "up"), "gate_up")  # B T F
        if architecture.activation == "gelu_tanh":
            hidden = geglu(gate, up)
        else:
            hidden = swiglu(gate, up, product_dtype(weights["down"], x))
        (out,) = project(hidden, ("down",), "down")
        return x + (norm("mlp_out_norm", out) if architecture.norms_after else out), cache


def input_group(
    x: jax.Array,
    names: tuple[str, ...],
    group: int,
    layer: Layer,
    adapter: Adapter | None,
    ops: Ops,
) -> list[jax.Array]:
    """The projections `names` of one input [B, T, I], each with its LoRA term and bias, if any.

    Projections of a group share a dropout mask (PEFT draws a mask per projection).
    """
    weights = [layer.weights[name] for name in names]
    if adapter is None:
        outputs = [
            nf4_linear(x, weight) if is_nf4(weight) else dense_linear(x, weight)
            for weight in weights
        ]
    else:
        low_rank = layer.factors
        factors = [Factors(**low_rank[name]) if name in low_rank else None for name in names]
        rate = 0.0 if adapter.keys is None else adapter.rate
        words = group_words(adapter.keys, layer.index, group) if rate else None
        outputs = ops.lora_group(x, weights, factors, words, adapter.scale, rate)
    biases = (layer.weights.get(f"{name}_bias") for name in names)
    return [y if bias is None else y + bias for y, bias in zip(outputs, biases, strict=True)]


def take(array: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, T, ...] at positions [B, S] -> [B, S, ...]."""
    return jnp.take_along_axis(array, positions[..., None], axis=1)


def head(params: Tree, x: jax.Array, architecture: Architecture) -> jax.Array:
    """Final norm and vocabulary head: [..., D] -> [..., V] f32."""
    return logits_of(*head_factors(params, x, architecture))


def head_factors(
    params: Tree, x: jax.Array, architecture: Architecture
) -> tuple[jax.Array, jax.Array]:
    """Factors of the logits: the final norm of x, [..., D], and the vocabulary head, [V, D]."""
    return norm_of(params, "norm", x, architecture), (
        params["embed"] if architecture.tied_head else params["head"]
    )


def norm_of(weights: Tree, name: str, x: jax.Array, architecture: Architecture) -> jax.Array:
    """The RMSNorm `name` of x, [..., D] or [..., C]."""
    rms = unit_offset_rms_norm if architecture.unit_offset_norms else rms_norm
    return rms(x, weights[name], architecture.norm_epsilon)


# Autodiff would store four more arrays [B, T, F] for swiglu, and those of rms_norm in f32. The
# backward pass recomputes both from their inputs, which are stored anyway.


def swiglu(gate: jax.Array, up: jax.Array, dtype: DTypeLike) -> jax.Array:
    """silu(gate) * up (Shazeer 2020), in their dtype; `dtype` is that of the product after it."""
    return (_swiglu if gate.dtype == dtype else partial(_swiglu_packed, dtype))(gate, up)


@partial(jax.checkpoint, prevent_cse=False)
def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return jax.nn.silu(gate) * up


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu_packed(dtype: DTypeLike, gate: jax.Array, up: jax.Array) -> jax.Array:
    """`_swiglu` that stores gate and up in `dtype` for the backward pass."""
    return jax.nn.silu(gate) * up


def _swiglu_forward(dtype, gate, up):
    return _swiglu_packed(dtype, gate, up), (packed(gate, dtype), packed(up, dtype))


def _swiglu_backward(dtype, residuals, dy):
    gate, up = (unpacked(residual, dtype).astype(dy.dtype) for residual in residuals)
    return jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)[1](dy)


_swiglu_packed.defvjp(_swiglu_forward, _swiglu_backward)


@partial(jax.checkpoint, prevent_cse=False)
def geglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """gelu(gate) * up with the tanh form of gelu (Hendrycks & Gimpel 2016), computed in f32 (at
    least) and rounded once, as in torch.
    """
    wide = gate.astype(jnp.promote_types(gate.dtype, jnp.float32))
    return jax.nn.gelu(wide, approximate=True).astype(gate.dtype) * up


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def unit_offset_rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """`rms_norm` with weight 1 + w, multiplied in f32 (at least) and rounded once (Gemma)."""
    normed = _normalised(x, epsilon)
    return (normed * (1 + weight.astype(normed.dtype))).astype(x.dtype)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, statistics in f32 (at least)."""
    return _normalised(x, epsilon).astype(x.dtype) * weight


def _normalised(x: jax.Array, epsilon: float) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)


def product_dtype(weight: jax.Array | NF4Weight | NF4Tiles, x: jax.Array) -> jnp.dtype:
    """The dtype in which x and a weight are multiplied."""
    return x.dtype if is_nf4(weight) else weight.dtype


def rotary_angles(positions: jax.Array, architecture: Architecture) -> jax.Array:
    """[B, T] positions -> [B, T, C/2] f32 angles in radians; with local frequencies [B, T, C], the
    angles of global layers before those of sliding layers.
    """
    frequencies = rotary_frequencies(architecture)
    if architecture.local_rope_theta is not None:
        local = plain_frequencies(architecture.local_rope_theta, architecture.head_channels)
        frequencies = np.concatenate([frequencies, local])
    return positions[..., None].astype(jnp.float32) * frequencies


def plain_frequencies(theta: float, channels: int) -> np.ndarray:
    """`rotary_frequencies` without scaling."""
    exponents = np.arange(0, channels, 2).astype(np.float32) / np.float32(channels)
    power = np.float64(theta) ** exponents.astype(np.float64)
    return np.float32(1) / power.astype(np.float32)


def rotary_frequencies(architecture: Architecture) -> np.ndarray:
    """[C/2] f32, radians per position of global layers, with the f32 roundings of transformers.

    At position 100,000 one unit in the last place of a frequency turns a channel pair by 0.006
    radians, so these must be the values that the models were trained with, not the exact ones:
    the power is rounded to f32, then its reciprocal (rounding once differs in a third of the
    channels).
    """
    frequencies = plain_frequencies(architecture.rope_theta, architecture.head_channels)
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    if isinstance(scaling, LinearScaling):
        return frequencies / np.float32(scaling.factor)
    # Llama 3.1 slows long wavelengths by `factor`, leaves short ones and interpolates between.
    factor, low, high, length = map(np.float32, dataclasses.astuple(scaling))
    wavelength = np.float32(2 * math.pi) / frequencies
    smooth = (length / wavelength - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    return np.where(
        wavelength > length / low,
        frequencies / factor,
        np.where(wavelength < length / high, frequencies, between),
    )


def rotate(x: jax.Array, angles: jax.Array, rotates: jax.Array | bool = True) -> jax.Array:
    """Rotary positions of x [B, T, heads, C] in Hugging Face's layout: channel c pairs with
    c + C/2.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    cosine, sine = (f(angles.astype(wide))[:, :, None, :] for f in (jnp.cos, jnp.sin))  # B T 1 C/2
    first, second = jnp.split(x.astype(wide), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    if rotates is True:
        return turned.astype(x.dtype)
    return jnp.where(rotates, turned.astype(x.dtype), x)


# Autodiff would store the cosines and sines of every layer, C f32 numbers a token; the backward
# pass recomputes them from the angles, which all layers share.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=3)
def rotate_in_layer(
    x: jax.Array, angles: jax.Array, sliding: jax.Array | bool, factor: float
) -> jax.Array:
    """`rotate` by the angles [B, T, C] of a global or a sliding layer, times `factor`, rounded
    once.
    """
    global_angles, local_angles = jnp.split(angles, 2, axis=-1)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    turned = rotate(wide, jnp.where(sliding, local_angles, global_angles))
    return (turned if factor == 1.0 else turned * factor).astype(x.dtype)


def query_factor(architecture: Architecture) -> float:
    """Factor on queries for `score_scale`, as attention itself multiplies scores by C^-1/2."""
    if architecture.score_scale is None:
        return 1.0
    return architecture.score_scale / architecture.head_channels**-0.5
