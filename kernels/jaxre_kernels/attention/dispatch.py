"""Chooses the attention implementation from names and shapes, never by looking for devices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxre_kernels.attention.blockwise import Blocks, attention_behind, blockwise_attention
from jaxre_kernels.attention.parts import Part
from jaxre_kernels.attention.reference import Window, both_ways_mask, masked_attention
from jaxre_kernels.implementations import Entry, kernels_of, measured, named, tiles_of


def _xla(
    q, k, v, visible_until, visible_from, prefix, span, queries=None, window=None, before=None
):
    if visible_from is not None:
        return masked_attention(q, k, v, both_ways_mask(visible_until, visible_from))
    blocks = blocks_of(q.shape[1], prefix, span, queries)
    if window is not None:
        window = Window(window.positions, jnp.asarray(window.length, jnp.int32))
    if before is not None:
        return attention_behind(q, k, v, visible_until, blocks, before, window)
    return blockwise_attention(q, k, v, visible_until, blocks, window)


def _pallas(name, q, k, v, visible_until, visible_from, prefix, span, **tiles):
    return kernels_of("attention", name).packed_attention(
        q, k, v, visible_until, visible_from, prefix=prefix, span=span, **tiles
    )


IMPLEMENTATIONS = {
    "xla": _xla,
    **{name: partial(_pallas, name) for name in ("pallas_tpu", "pallas_gpu", "pallas_gpu_sm80")},
}
# cuDNN is left out: its public entry, `jax.nn.dot_product_attention`, can isolate packed examples
# only by a dense T x T bias, and a plan's static facts do not guarantee one example per row.

NO_WINDOW = "it knows no sliding window of positions"
NO_PART = "it knows no keys before the rows"

# Queries of a block. On two CPU cores the processor time of 64, 128 and 256 was 1.03, 1.00 and 1.51
# (prefix 32, span 144, two rows of 1,024), and 1.04, 1.00 and 1.08 (prefix 352, span 208, one row
# of 2,048), relative to 128 (9 and 3 heads of 64 channels, f32; 2026-11-21).
QUERIES = 128
TILES = {  # sizes that `tools/tune_kernels.py` tries
    "xla": [{"queries": queries} for queries in (64, 128, 256, 512)],
    "pallas_tpu": [{"block": tokens} for tokens in (128, 256, 512)],
}
NEAR_MULTIPLE = 32  # keys behind a block, rounded up


def blocks_of(
    length: int, prefix: int = 0, span: int | None = None, queries: int | None = None
) -> Blocks:
    """Blocks for rows of `length` under the bounds of `attention`; dense where blocks would look at
    no fewer keys.

    `queries` per block defaults to QUERIES.
    """
    queries = QUERIES if queries is None else queries
    back = -(-((length if span is None else span) - 1) // NEAR_MULTIPLE) * NEAR_MULTIPLE
    if prefix + back + queries >= length:
        return Blocks(length)
    return Blocks(queries, back, prefix)


class Heads(NamedTuple):
    """Shapes and dtype of q, k and v, without the length of their rows."""

    rows: int
    heads: int
    kv_heads: int
    channels: int
    dtype: DTypeLike


def choose(
    length: int | None = None,
    prefix: int = 0,
    span: int | None = None,
    *,
    heads: Heads | None = None,
    implementation: str | None = None,
    device_kind: str | None = None,
    both_ways: bool = False,
    window: bool = False,
    before: bool = False,
) -> tuple[str, str]:
    """Returns the implementation that `attention` runs for such rows (for any rows, without a
    length), and the reason in words.

    The table is consulted if length, `heads` and `device_kind` are given (see
    `jaxre_kernels.implementations`). It holds measurements of causal attention only, so it is not
    used where segments are seen `both_ways`. Only "xla" supports a sliding `window` and keys
    `before` the rows.

    Raises:
      ValueError: an implementation that does not exist, or that does not support these `heads`.
    """
    entry = _measured(length, prefix, span, heads, None if both_ways else device_kind)

    missing = NO_WINDOW if window else NO_PART if before else None

    def unsupported(name: str) -> str | None:
        if name == "xla" or missing:
            return missing if name != "xla" else None
        return kernels_of("attention", name).unsupported(length, prefix, span, *heads)

    name, reason = named("attention", implementation, IMPLEMENTATIONS, entry, unsupported)
    if name != "xla" and missing:
        raise ValueError(_refused(name, missing))
    if length is None or (name != "xla" and heads is None):
        return name, reason
    if name != "xla":
        block = tiles_of(entry, name).get("block")
        return name, f"{reason}; {_described(name, length, prefix, span, heads, block)}"
    if both_ways:
        return name, f"{reason}; dense, both ways"
    blocks = blocks_of(length, prefix, span, **tiles_of(entry, name))
    if blocks.queries == length:
        return name, f"{reason}; dense, a token may see any of {length:,}"
    near = blocks.back + blocks.queries
    return (
        name,
        (
            f"{reason}; {blocks.queries} queries at a time look at up to {near} near and {prefix}"
            f" shared keys of {length:,}"
        ),
    )


def _measured(
    length: int | None, prefix: int, span: int | None, heads: Heads | None, device_kind: str | None
) -> Entry | None:
    if length is None or heads is None:
        return None
    sizes = {
        "length": length,
        "prefix": prefix,
        "span": length if span is None else span,
        **heads._asdict(),
    }
    return measured("attention", device_kind, sizes.pop("dtype"), sizes)


def _described(
    name: str, length: int, prefix: int, span: int | None, heads: Heads, block: int | None = None
) -> str:
    kernels = kernels_of("attention", name)
    refusal = kernels.unsupported(length, prefix, span, *heads)
    if refusal is not None:
        raise ValueError(_refused(name, refusal))
    block = block or kernels.block_of(length, span, heads.heads // heads.kv_heads)
    return f"pairs of blocks of {block} tokens of {length:,} where one sees another"


def _refused(name: str, refusal: str) -> str:
    return (
        f"attention implementation {name!r} does not run here: {refusal}; leave it out, or ask for"
        " 'xla'"
    )


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_until: jax.Array,
    visible_from: jax.Array | None = None,
    window: Window | None = None,
    before: Part | None = None,
    *,
    prefix: int = 0,
    span: int | None = None,
    implementation: str | None = None,
    device_kind: str | None = None,
    tiles: Mapping[str, int] | None = None,
) -> jax.Array:
    """Attention in which each token sees only its own ancestors: i sees j exactly when
    `j <= i < visible_until[j]`.

    `prefix` and `span` only bound where to look: visible pairs outside of them would be missed.

    Args:
      q: [B, T, H, C] float; k, v: [B, T, K, C] of q's dtype; visible_until: [B, T] int32.
      visible_from: [B, T] int32, the first token of j's segment, for isolated segments that are
        seen both ways (encoders). Then i sees j exactly when `visible_from[j] <= i <
        visible_until[j]`.
      window: of a sliding layer, causal rows only: i sees j only if j is also within the window.
      before: keys [K, P, C] before all rows, which every token sees (in a sliding layer: those in
        its window); causal rows only, without gradients.
      prefix, span: every visible pair (i, j) has |i - j| < span or j < prefix; a span of None is
        unbounded.
      device_kind: kind of the target device, for the table; without it or `implementation`, "xla"
        runs.
      tiles: tile sizes of the chosen implementation (`TILES`); by default those of the table, else
        the implementation's own.

    Returns:
      [B, T, H, C] of q's dtype.

    Raises:
      ValueError: an implementation that does not exist, or that does not support such arrays.
    """
    B, T, H, C = q.shape
    heads = Heads(B, H, k.shape[2], C, q.dtype)
    both_ways = visible_from is not None
    name, _ = choose(
        T,
        prefix,
        span,
        heads=heads,
        implementation=implementation,
        device_kind=device_kind,
        both_ways=both_ways,
        window=window is not None,
        before=before is not None,
    )
    if tiles is None:
        tiles = tiles_of(
            None if both_ways else _measured(T, prefix, span, heads, device_kind), name
        )
    given = {"window": window, "before": before}  # "xla" alone takes them
    more = {name: value for name, value in given.items() if value is not None}
    return IMPLEMENTATIONS[name](
        q, k, v, visible_until, visible_from, prefix, span, **tiles, **more
    )
