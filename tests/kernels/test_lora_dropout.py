"""The dropout mask: a pure function of its counters that looks like independent coins."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxre_kernels.lora import hash_words, keep_mask, token_keys

TOKENS, CHANNELS = 512, 896

_keys = jax.jit(token_keys)
_keep = jax.jit(keep_mask, static_argnums=(3, 4))


def mask(
    seed=0, step=3, owner=123, layer=2, group=1, rate=0.3, tokens=TOKENS, channels=CHANNELS, start=0
) -> np.ndarray:
    """[T, channels] bool of one example whose positions are `start`, `start + 1`, ..."""
    positions = start + jnp.arange(tokens)[None]
    keys = _keys(seed, jnp.int32(step), jnp.full((1, tokens), owner, jnp.uint32), positions)
    return np.asarray(_keep(keys, layer, group, channels, rate))[0]


def sigmas(share: float, expected: float, count: int) -> float:
    """Distance of a share from its expectation, in standard deviations of `count` fair draws."""
    return abs(share - expected) / np.sqrt(expected * (1 - expected) / count)


# 5 sigma: one false alarm in 1.7 million draws; everything is seeded, so it is decided once.
SIGMAS = 5


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("step", [0, 1, 1000])
def test_share_kept_is_what_the_rate_says(rate, step):
    kept = mask(rate=rate, step=step)
    assert sigmas(kept.mean(), 1 - rate, kept.size) < SIGMAS
    # and in every channel and every token, not only in the mean: the largest of 1,408 draws
    for axis, count in ((0, TOKENS), (1, CHANNELS)):
        worst = max(sigmas(share, 1 - rate, count) for share in kept.mean(axis))
        assert worst < SIGMAS


def test_rate_zero_keeps_everything():
    assert mask(rate=0.0).all()


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"step": 4}, {"owner": 124}, {"layer": 3}, {"group": 2}, {"start": TOKENS}],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_masks_that_differ_in_one_counter_are_independent(change, rate):
    one, other = mask(rate=rate), mask(rate=rate, **change)
    expected = rate**2 + (1 - rate) ** 2  # share on which two independent masks agree
    assert sigmas((one == other).mean(), expected, one.size) < SIGMAS


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 128, 448])
@pytest.mark.parametrize("axis", [0, 1], ids=["tokens", "channels"])
def test_neighbours_are_uncorrelated(distance, axis):
    """Also at the strides at which a lane or block of a kernel would repeat."""
    rate = 0.5
    centred = mask(rate=rate).astype(float) - (1 - rate)
    pairs = np.take(centred, range(centred.shape[axis] - distance), axis) * np.take(
        centred, range(distance, centred.shape[axis]), axis
    )
    # Each product is +-1/4 with mean 0, so its standard deviation is 1/4.
    assert abs(pairs.mean()) / (0.25 / np.sqrt(pairs.size)) < SIGMAS


def test_channels_form_no_group_that_falls_together():
    """No pair of channels is correlated over tokens: the largest of 400,000 coefficients is what
    chance gives.
    """
    kept = mask(rate=0.5, tokens=2048).astype(float)
    correlation = np.corrcoef(kept, rowvar=False)
    off = np.abs(correlation[~np.eye(CHANNELS, dtype=bool)])
    assert off.max() < 6 / np.sqrt(2048)  # 400,000 normal draws exceed 6 sigma once in 1,250 trials


def test_mask_does_not_depend_on_packing():
    """Three examples in one row, in another order in another row, and each alone: the same
    masks.
    """
    lengths = {11: 40, 4_294_967_295: 25, 7: 31}

    def packed(order):
        owner = np.concatenate([np.full(lengths[o], o, np.uint32) for o in order])[None]
        positions = np.concatenate([np.arange(lengths[o]) for o in order])[None]
        kept = np.asarray(
            _keep(_keys(0, jnp.int32(3), jnp.asarray(owner), jnp.asarray(positions)), 2, 1, 64, 0.3)
        )[0]
        return {o: kept[owner[0] == o] for o in order}

    forwards, backwards = packed([11, 4_294_967_295, 7]), packed([7, 4_294_967_295, 11])
    for owner in lengths:
        assert np.array_equal(forwards[owner], backwards[owner])
        assert np.array_equal(
            forwards[owner], mask(owner=np.uint32(owner), tokens=lengths[owner], channels=64)
        )


def test_mask_does_not_depend_on_the_width_of_a_shard():
    """The first channels of a wide input are those of a narrow one: a mask may be cut along
    channels.
    """
    assert np.array_equal(mask(channels=896)[:, :128], mask(channels=128))


@pytest.mark.parametrize("layer", [0, 5])
def test_a_traced_layer_index_gives_the_mask_of_a_constant(layer):
    """The scan passes the index as an array, the last layer as a number."""
    keys = _keys(0, jnp.int32(3), jnp.full((1, 8), 5, jnp.uint32), jnp.arange(8)[None])
    traced = jax.jit(lambda keys, index: keep_mask(keys, index, 1, 32, 0.5))(keys, jnp.int32(layer))
    assert np.array_equal(traced, keep_mask(keys, layer, 1, 32, 0.5))


def test_words_in_another_order_hash_to_something_else():
    words = np.array([[hash_words(a, b) for b in range(32)] for a in range(32)])
    assert len(np.unique(words)) == words.size


def test_each_input_bit_flips_half_of_the_output_bits():
    draws = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 4000, dtype=np.uint32))
    hashed = jax.jit(lambda words: hash_words(words, 7))
    base = np.asarray(hashed(draws))
    for bit in range(32):
        flipped = np.asarray(hashed(draws ^ jnp.uint32(1 << bit)))
        share = np.unpackbits((base ^ flipped).view(np.uint8).reshape(-1, 4), axis=1).mean(0)
        # largest of 32 x 32 shares of 4,000 draws
        assert np.abs(share - 0.5).max() < SIGMAS * 0.5 / np.sqrt(4000)
