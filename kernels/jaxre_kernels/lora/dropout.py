"""Dropout as a pure function of counters, so that packing, sharding and recomputation cannot change
it.

The mask of one channel of one token depends on (seed, step, layer, input group, owner, position,
channel) and nothing else. Words are mixed with the 32-bit finaliser of MurmurHash3 (Appleby, public
domain), whose output bits each flip with probability 0.5 when one input bit flips; a channel is
dropped when its word is below rate x 2^32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: consecutive counters land far apart


def _mix(word: jax.Array) -> jax.Array:
    word = word ^ (word >> 16)
    word = word * np.uint32(0x85EBCA6B)
    word = word ^ (word >> 13)
    word = word * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def hash_words(*words: jax.Array | int) -> jax.Array:
    """One uint32 from several integers or broadcastable integer arrays; the order matters."""
    state = jnp.uint32(_GOLDEN)
    for word in words:
        state = _mix((state ^ jnp.asarray(word).astype(jnp.uint32)) + jnp.uint32(_GOLDEN))
    return state


def token_keys(seed: int, step: jax.Array, owner: jax.Array, position: jax.Array) -> jax.Array:
    """[B, T] uint32 keys of the tokens of a batch.

    Args:
      seed: of the run.
      step: [] int32, the update.
      owner: [B, T] uint32, digest of the example (or shareable prefix) a token belongs to.
      position: [B, T] int32, the token's position in its example.
    """
    return hash_words(seed, step, owner, position)


def group_words(keys: jax.Array, layer: jax.Array | int, group: int) -> jax.Array:
    """[B, T] uint32, the counters of the tokens in one input group of one layer.

    Args:
      keys: [B, T] uint32 of `token_keys`.
      layer: [] int32; group: index of the input group (qkv, o, gate_up, down).
    """
    return hash_words(keys, layer, group)


def keep_channels(words: jax.Array, channels: int, rate: float) -> jax.Array:
    """[B, T, channels] bool, true where a channel is kept.

    Args:
      words: [B, T] uint32 of `group_words`.
      channels: width of the projection's input.
      rate: probability of a drop, in [0, 1).
    """
    return is_kept(words[..., None], jnp.arange(channels, dtype=jnp.uint32), rate)


def is_kept(words: jax.Array, channel: jax.Array, rate: float) -> jax.Array:
    """True where a channel of a token is kept; `words` and `channel` are uint32 and broadcast.
    Pallas kernels call it too.
    """
    return _mix(words + channel * np.uint32(_GOLDEN)) >= np.uint32(int(rate * 2**32))


def keep_mask(
    keys: jax.Array, layer: jax.Array | int, group: int, channels: int, rate: float
) -> jax.Array:
    """`keep_channels` of `group_words`."""
    return keep_channels(group_words(keys, layer, group), channels, rate)
