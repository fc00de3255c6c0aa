"""Rows behind keys that all of them share equal attention over the concatenated keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxre_kernels.attention import Part, Window, attention, masked_attention, visible_mask

B, T, H, K, C, P = 2, 320, 4, 2, 8, 64
COUNT = 50  # of the P places before the rows; the others hold anything


def arrays(dtype=np.float64):
    """Packed rows of examples of 40 tokens whose positions go on from the shared ones."""
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((B, T, heads, C)).astype(dtype) for heads in (H, K, K))
    keys, values = (draw.standard_normal((K, P, C)).astype(dtype) for _ in "kv")
    until = np.broadcast_to(np.arange(T) // 40 * 40 + 40, (B, T)).astype(np.int32)
    positions = np.broadcast_to(COUNT + np.arange(T) % 40, (B, T)).astype(np.int32)
    return q, k, v, keys, values, until, positions


def joined(q, k, v, keys, values, until, positions, window):
    """Dense attention over the shared keys and those of the row."""

    def whole(shared, own):  # B P+T K C
        shared = np.broadcast_to(shared.transpose(1, 0, 2), (B, P, K, C))
        return np.concatenate([shared, own], axis=1)

    seen = np.broadcast_to(np.arange(P) < COUNT, (B, T, P))
    own = visible_mask(until, None if window is None else Window(positions, window))
    if window is not None:
        seen = seen & (positions[:, :, None] - np.arange(P) < window)
    mask = np.concatenate([seen, own], axis=2)
    return masked_attention(q, whole(keys, k), whole(values, v), mask)


@pytest.mark.parametrize("window", [None, 16, 60])
@pytest.mark.parametrize("span", [None, 40], ids=["dense", "blocks"])
def test_rows_see_what_comes_before_them(window: int | None, span: int | None) -> None:
    with jax.enable_x64(True):
        q, k, v, keys, values, until, positions = arrays()
        part = Part(keys, values, jnp.arange(P) < COUNT, jnp.arange(P))
        near = None if window is None else Window(jnp.asarray(positions), window)
        found = jax.jit(attention, static_argnames="span")(
            q, k, v, until, window=near, before=part, span=span
        )
        expected = joined(q, k, v, keys, values, until, positions, window)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_bf16_products_stay_near_f32() -> None:
    q, k, v, keys, values, until, positions = arrays(np.float32)
    expected = joined(q, k, v, keys, values, until, positions, None)
    k, v, keys, values = (jnp.asarray(array, jnp.bfloat16) for array in (k, v, keys, values))
    part = Part(keys, values, jnp.arange(P) < COUNT)
    found = jax.jit(attention, static_argnames="span")(q, k, v, until, before=part, span=40)
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_kernels_that_do_not_know_it_are_refused() -> None:
    q, k, v, keys, values, until, _ = arrays(np.float32)
    part = Part(keys, values, jnp.arange(P) < COUNT)
    with pytest.raises(ValueError, match="no keys before the rows"):
        attention(q, k, v, until, before=part, implementation="pallas_tpu")
