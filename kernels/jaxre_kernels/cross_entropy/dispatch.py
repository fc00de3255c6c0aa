"""Chooses the linear cross-entropy from names and shapes, never by looking for devices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxre_kernels.cross_entropy.chunked import chunked_cross_entropy
from jaxre_kernels.cross_entropy.reference import dense_cross_entropy
from jaxre_kernels.implementations import Entry, kernels_of, measured, named, tiles_of

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")

# Tokens at a time on a device: enough for a chunk's products to outweigh reading the head. On two
# CPU cores 256, 512 and 1,024 of 4,096 tokens at a time took 0.75, 0.71 and 0.78 of the dense op's
# processor time (256 channels, 4,096 entries, frozen head, f32, with one exponential more than now;
# 2026-11-21). Not measured on an accelerator.
TOKENS = 1024
TILES = {  # sizes that `tools/tune_kernels.py` tries
    "xla": [{"at_most": tokens} for tokens in (512, 1024, 2048, 4096, 8192)],
    "pallas_gpu": [{"at_most": tokens} for tokens in (1024, 2048, 4096, 8192)],
    "pallas_tpu": [
        {"tokens": tokens, "entries": entries}
        for tokens, entries in ((512, 512), (256, 512), (256, 256), (128, 128))
    ],
}


def positions_at_once(tokens: tuple[int, ...], shards: int = 1, at_most: int | None = None) -> int:
    """Positions of each row that the head processes at a time, so that a device has `at_most`
    tokens; all if there are no more.

    Args:
      tokens: shape [..., S] of the targets; shards: number of devices that the rows are split over,
        along the first axis.
      at_most: TOKENS by default.
    """
    *rows, positions = tokens
    most = max(
        1, min(positions, (TOKENS if at_most is None else at_most) * shards // math.prod(rows))
    )
    return -(-positions // -(-positions // most))  # in parts of equal size


class Channels(NamedTuple):
    """Width and dtype of x, without the shape of its tokens."""

    channels: int
    dtype: DTypeLike


def choose(
    tokens: tuple[int, ...] | None = None,
    vocabulary: int = 0,
    shards: int = 1,
    *,
    channels: Channels | None = None,
    implementation: str | None = None,
    device_kind: str | None = None,
) -> tuple[str, str]:
    """Returns the implementation that `linear_cross_entropy` runs for such targets (for any,
    without a shape), and the reason in words.

    The table is consulted if a shape, `channels` and `device_kind` are given (see
    `jaxre_kernels.implementations`).

    Raises:
      ValueError: an implementation that does not exist, or that does not support these `channels`
        or `shards`.
    """
    entry = _measured(tokens, vocabulary, shards, channels, device_kind)

    def unsupported(name: str) -> str | None:
        return None if name == "xla" else _unsupported(name, shards, channels)

    name, reason = named("cross-entropy", implementation, IMPLEMENTATIONS, entry, unsupported)
    if name != "xla":
        if refusal := _unsupported(name, shards, channels):
            raise ValueError(f"linear cross-entropy {name!r} does not run here: {refusal}")
        return (
            name,
            f"{reason}; {_described(name, tokens, vocabulary, channels, tiles_of(entry, name))}",
        )
    if tokens is None:
        return name, reason
    at_once = positions_at_once(tokens, shards, **tiles_of(entry, name))
    size = 4 * vocabulary * math.prod(tokens) / shards / 2**20
    if at_once == tokens[-1]:
        return name, f"{reason}; all logits at once, {size:,.1f} MiB a device"
    part = size * at_once / tokens[-1]
    return (
        name,
        (
            f"{reason}; {at_once} of a row's {tokens[-1]:,} positions at a time, logits of"
            f" {part:,.1f} of {size:,.1f} MiB a device"
        ),
    )


def _measured(
    tokens: tuple[int, ...] | None,
    vocabulary: int,
    shards: int,
    channels: Channels | None,
    device_kind: str | None,
) -> Entry | None:
    if tokens is None or channels is None:
        return None
    sizes = {
        "tokens": math.prod(tokens) // shards,
        "vocabulary": vocabulary,
        "channels": channels.channels,
    }
    return measured("cross_entropy", device_kind, channels.dtype, sizes)


def _unsupported(name: str, shards: int, channels: Channels | None) -> str | None:
    if shards > 1:
        return (
            f"{name} takes the tokens of one device, these are on {shards}: call it inside of"
            " shard_map"
        )
    return None if channels is None else kernels_of("cross_entropy", name).unsupported(*channels)


def _described(
    name: str,
    tokens: tuple[int, ...] | None,
    vocabulary: int,
    channels: Channels | None,
    tiles: dict[str, int],
) -> str:
    """The part of the logits that a kernel writes to memory, in words."""
    kernels = kernels_of("cross_entropy", name)
    if name == "pallas_tpu":
        sizes = (
            (tiles["tokens"], tiles["entries"])
            if tiles
            else channels and kernels.blocks_of(*channels)
        )
        blocks = "{} tokens and {} entries at a time, ".format(*sizes) if sizes else ""
        return f"{blocks}no logits leave the chip"
    at_once = tiles.get("at_most", kernels.TOKENS)
    if tokens is not None:
        at_once = min(at_once, math.prod(tokens))
    size = f", {2 * at_once * vocabulary / 2**20:,.1f} MiB" if vocabulary else ""
    return (
        f"no logits leave the chip, their exponentials do in bf16, of {at_once:,} tokens at a"
        f" time{size}"
    )


def linear_cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    shards: int = 1,
    implementation: str | None = None,
    device_kind: str | None = None,
    tiles: Mapping[str, int] | None = None,
) -> jax.Array:
    """sum_n weights_n (logsumexp_v(x_n . head_v) - x_n . head_target_n), products and sums in f32
    (at least).

    Differentiable in x, head and weights; the gradient of a head that is not differentiated is
    never formed.

    Args:
      x: [..., S, D] float; head: [V, D] of x's dtype, or bf16 beside f32 in plain XLA.
      targets: [..., S] int32 in [0, V), arbitrary where the weight is 0. weights: [..., S] f32.
      shards: number of devices that the rows are split over, along the first axis.
      device_kind: kind of the target device, for the table; without it or `implementation`, "xla"
        runs.
      tiles: tile sizes of the chosen implementation (`TILES`); by default those of the table, else
        the implementation's own.

    Returns:
      [] f32 (f64 for f64).

    Raises:
      ValueError: what `choose` says.
    """
    channels = Channels(x.shape[-1], x.dtype)
    name, _ = choose(
        targets.shape,
        head.shape[0],
        shards,
        channels=channels,
        implementation=implementation,
        device_kind=device_kind,
    )
    if tiles is None:
        tiles = tiles_of(
            _measured(targets.shape, head.shape[0], shards, channels, device_kind), name
        )
    if name == "pallas_tpu" and tiles:
        tiles = {"blocks": (tiles["tokens"], tiles["entries"])}
    if name != "xla":
        return kernels_of("cross_entropy", name).pallas_cross_entropy(
            x, head, targets, weights, **tiles
        )
    positions = positions_at_once(targets.shape, shards, **tiles)
    # The chunked op multiplies in the head's dtype in the backward pass too; autodiff of the dense
    # op would multiply in the wider dtype.
    if positions == targets.shape[-1] and x.dtype == head.dtype:
        return dense_cross_entropy(x, head, jnp.clip(targets, 0, head.shape[0] - 1), weights)
    return chunked_cross_entropy(x, head, targets, weights, positions, shards)
