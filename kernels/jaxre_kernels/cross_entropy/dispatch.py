"""Which linear cross-entropy runs, and why: decided from names and shapes, never by looking for devices."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxre_kernels.cross_entropy import tpu
from jaxre_kernels.cross_entropy.chunked import chunked_cross_entropy
from jaxre_kernels.cross_entropy.reference import dense_cross_entropy
from jaxre_kernels.implementations import named

IMPLEMENTATIONS = ("xla", "pallas_tpu")

# At a time on a device: enough for a chunk's products to outweigh its reading of the head. On two CPU cores 256, 512 and 1,024 of
# 4,096 tokens at a time took 0.75, 0.71 and 0.78 of the dense op's processor time (256 channels, 4,096 entries, frozen head, f32, with
# one exponential more than now; 2026-11-21). Not measured on an accelerator.
TOKENS = 1024


def positions_at_once(tokens: tuple[int, ...], shards: int = 1) -> int:
    """At how many of each row's positions at a time the head runs, so that a device has at most TOKENS; all where they are as few.

    Args:
      tokens: shape [..., S] of the targets; shards: over how many devices the rows are split, along the first axis.
    """
    *rows, positions = tokens
    most = max(1, min(positions, TOKENS * shards // math.prod(rows)))
    return -(-positions // -(-positions // most))  # in parts of equal size


class Channels(NamedTuple):
    """What an implementation has to know of x besides the shape of its tokens."""

    channels: int
    dtype: DTypeLike


def choose(
    tokens: tuple[int, ...] | None = None,
    vocabulary: int = 0,
    shards: int = 1,
    *,
    channels: Channels | None = None,
    implementation: str | None = None,
) -> tuple[str, str]:
    """The implementation that `linear_cross_entropy` runs for such targets (for any, without a shape), and the reason in words.

    Raises:
      ValueError: an implementation that does not exist, or that does not take these `channels` or `shards`.
    """
    name, reason = named("cross-entropy", implementation, IMPLEMENTATIONS)
    if name == "pallas_tpu":
        return name, f"{reason}; {_told_tpu(shards, channels)}"
    if tokens is None:
        return name, reason
    at_once, size = positions_at_once(tokens, shards), 4 * vocabulary * math.prod(tokens) / shards / 2**20
    if at_once == tokens[-1]:
        return name, f"{reason}; all logits at once, {size:,.1f} MiB a device"
    part = size * at_once / tokens[-1]
    return name, f"{reason}; {at_once} of a row's {tokens[-1]:,} positions at a time, logits of {part:,.1f} of {size:,.1f} MiB a device"


def _told_tpu(shards: int, channels: Channels | None) -> str:
    """What `pallas_tpu` does. Raises ValueError where it does not run."""
    if shards > 1:
        raise ValueError(f"pallas_tpu takes the tokens of one device, these are on {shards}: call it inside of shard_map")
    if channels is None:
        return "no logits leave the chip"
    if refusal := tpu.unsupported(*channels):
        raise ValueError(f"linear cross-entropy for TPUs does not run here: {refusal}")
    tokens, entries = tpu.blocks_of(*channels)
    return f"{tokens} tokens and {entries} entries at a time, no logits leave the chip"


def linear_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    shards: int = 1,
    implementation: str | None = None,
) -> jax.Array:
    """sum_n weights_n (logsumexp_v(x_n . head_v) - x_n . head_target_n), products and sums in f32 (at least).

    Differentiable in x, head and weights; the gradient of a head that is not differentiated is never formed.

    Args:
      x: [..., S, D] float; head: [V, D] of x's dtype.
      targets: [..., S] int32 in [0, V); one of weight 0 may be anything. weights: [..., S] f32.
      shards: over how many devices the rows are split, along the first axis.

    Returns:
      [] f32 (f64 for f64).

    Raises:
      ValueError: what `choose` says.
    """
    name, _ = choose(targets.shape, head.shape[0], shards, channels=Channels(x.shape[-1], x.dtype), implementation=implementation)
    if name == "pallas_tpu":
        return tpu.pallas_cross_entropy(x, head, targets, weights)
    positions = positions_at_once(targets.shape, shards)
    if positions == targets.shape[-1]:
        return dense_cross_entropy(x, head, jnp.clip(targets, 0, head.shape[0] - 1), weights)
    return chunked_cross_entropy(x, head, targets, weights, positions, shards)
