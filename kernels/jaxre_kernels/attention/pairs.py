"""Lists the block pairs of a row that contain a visible token pair.

A row is cut into N blocks of tokens, the same for queries and keys. Key j is seen by the queries
of one stretch, [visible_from[j], visible_until[j]), with visible_from[j] = j where attention is
causal. Queries of block m and keys of block n have a visible pair exactly when

    least visible_from of n < end of m    and    largest visible_until of n > start of m.

It does no harm that two different keys could meet the two conditions, in causal rows and in
isolated segments:

- m behind n: causal, every key of n starts before m, so the second condition alone decides.
  Segments: both bounds grow with the key, so the key with the largest bound is the last one of n,
  and its stretch starts no later than itself, before m.
- m ahead of n: causal, no key of n starts before the end of m. Segments: the key with the least
  start is the first of n, and its stretch ends behind itself, behind m.
- m = n: every token sees itself.

Blocks are numbered through all rows, so one number names a row and a place in it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Reach(NamedTuple):
    """Static bounds on the visible blocks of a row; they bound the length of a list.

    Queries of block m see keys only in blocks [m - back, m + ahead] and [0, prefix).
    """

    back: int
    ahead: int = 0
    prefix: int = 0

    def allowed(self, blocks: int) -> jax.Array:
        """[N, N] bool, queries by keys."""
        query, key = jnp.arange(blocks)[:, None], jnp.arange(blocks)[None, :]
        near = (query - key <= self.back) & (key - query <= self.ahead)
        return near | ((key < self.prefix) & (key <= query))

    def bound(self, blocks: int) -> int:
        """Number of allowed block pairs in a row."""
        near = sum(min(m, self.back) + 1 + min(blocks - 1 - m, self.ahead) for m in range(blocks))
        return near + sum(min(max(m - self.back, 0), self.prefix) for m in range(blocks))


def reach_of(
    length: int, block: int, prefix: int = 0, span: int | None = None, *, causal: bool = True
) -> Reach:
    """Reach of rows of `length` whose visible pairs (i, j) have i - j < span or j < prefix, and, if
    not causal, j - i < span.
    """
    blocks = -(-length // block)
    # The first query of a block sees span - 1 tokens back.
    back = blocks - 1 if span is None else min(blocks - 1, -(-(span - 1) // block))
    return Reach(back, 0 if causal else back, -(-prefix // block))


class Pairs(NamedTuple):
    """Block pairs, one per kernel step; the pairs of one result block are consecutive.

    own [S] int32: block of the result; other [S] int32: block that it meets; total [1] int32:
    number of pairs. Entries from `total` on repeat a valid pair and are ignored.
    """

    own: jax.Array
    other: jax.Array
    total: jax.Array


def meeting(
    visible_from: jax.Array, visible_until: jax.Array, block: int, reach: Reach
) -> jax.Array:
    """[B, N, N] bool: whether queries of a block (second axis) see keys of a block (third).

    Args:
      visible_from, visible_until: [B, N x block] int32.
    """
    blocks = visible_from.shape[1] // block
    start = jnp.arange(blocks) * block
    least = visible_from.reshape(-1, 1, blocks, block).min(-1)  # B 1 N
    largest = visible_until.reshape(-1, 1, blocks, block).max(-1)
    seen = (least < start[:, None] + block) & (largest > start[:, None])
    # Every block meets itself, whatever the bounds say, so every result block is written.
    return (seen | jnp.eye(blocks, dtype=bool)) & reach.allowed(blocks)


def listed(meets: jax.Array, reach: Reach) -> Pairs:
    """[B, N, N] bool, the blocks of the result on the second axis -> the pairs, in order.

    Sorts numbers, which is fast on a TPU; the scatter behind `jnp.nonzero` would run one by one.
    """
    B, N, _ = meets.shape
    number = jnp.arange(B * N * N, dtype=jnp.int32)
    first = jnp.sort(jnp.where(meets.reshape(-1), number, B * N * N))[: B * reach.bound(N)]
    first = jnp.where(first < B * N * N, first, 0)
    own = first // N
    return Pairs(own, own // N * N + first % N, meets.sum(dtype=jnp.int32)[None])
