"""Packed attention against a loop over queries that follows the definition, and its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxre_kernels.attention import attention, choose, visible_mask

# Sums of at most 40 products in f32, in another order.
CLOSE = 2e-6

# [T] `visible_until` of a row: one example, three packed, a prefix shared by two examples, with pads behind.
ROWS = {
    "one example": [12] * 12,
    "packed": [4] * 4 + [9] * 5 + [12] * 3,
    "shared prefix": [12] * 5 + [8] * 3 + [12] * 4,
    "tree of two levels": [11] * 2 + [7] * 2 + [5] + [7] * 2 + [11] * 4 + [12],
    "pads": [5] * 5 + [6, 7, 8, 9, 10, 11, 12],
}


def draws(heads: int, kv_heads: int, rows: int = 1, length: int = 12, channels: int = 8):
    draw = np.random.default_rng(0)
    return [draw.standard_normal((rows, length, count, channels)).astype(np.float32) for count in (heads, kv_heads, kv_heads, heads)]


def by_definition(q, k, v, visible_until):
    """Token i of a row sees token j exactly when j <= i < visible_until[j]; query head h uses key head h // (H/K)."""
    out = np.zeros(q.shape, np.float64)
    B, T, H, C = q.shape
    for b, i, h in np.ndindex(B, T, H):
        shared = h // (H // k.shape[2])
        seen = [j for j in range(i + 1) if i < visible_until[b][j]]
        scores = np.array([q[b, i, h] @ k[b, j, shared] for j in seen], np.float64) / np.sqrt(C)
        weights = np.exp(scores - scores.max())
        out[b, i, h] = (weights / weights.sum()) @ v[b, seen, shared].astype(np.float64)
    return out


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_equals_its_definition(row, heads, kv_heads):
    q, k, v, _ = draws(heads, kv_heads)
    visible_until = np.array([ROWS[row]])
    found = np.asarray(attention(q, k, v, jnp.asarray(visible_until)))
    expected = by_definition(q, k, v, visible_until)
    assert np.abs(found - expected).max() / np.abs(expected).max() < CLOSE


def test_rows_of_a_batch_have_their_own_masks():
    q, k, v, _ = draws(4, 2, rows=len(ROWS))
    visible_until = np.array(list(ROWS.values()))
    found = np.asarray(attention(q, k, v, jnp.asarray(visible_until)))
    assert np.abs(found - by_definition(q, k, v, visible_until)).max() < CLOSE * 10


@pytest.mark.parametrize("row", ROWS)
def test_gradients_of_a_packed_row_are_finite_and_stay_within_what_is_seen(row):
    """The gradient of token i's output reaches exactly the keys that i sees."""
    q, k, v, dy = map(jnp.asarray, draws(4, 2))
    visible_until = jnp.asarray([ROWS[row]])
    seen = np.asarray(visible_mask(visible_until))[0]

    @jax.jit
    def reach(i):
        def one(q, k, v):
            return (attention(q, k, v, visible_until)[0, i] * dy[0, i]).sum()

        return jax.grad(one, argnums=(0, 1, 2))(q, k, v)

    for i in range(12):
        dq, dk, dv = map(np.asarray, reach(i))
        assert np.isfinite(dq).all() and np.isfinite(dk).all() and np.isfinite(dv).all()
        assert np.array_equal(np.abs(dv[0]).sum((1, 2)) > 0, seen[i])
        assert not np.abs(dk[0][~seen[i]]).any() and not np.abs(np.delete(dq[0], i, axis=0)).any()


def test_bfloat16_output_is_the_float32_one_rounded():
    q, k, v, _ = (jnp.asarray(value, jnp.bfloat16) for value in draws(4, 2))
    visible_until = jnp.asarray([ROWS["packed"]])
    exact = by_definition(*(np.asarray(value, np.float32) for value in (q, k, v)), np.asarray(visible_until))
    found = attention(q, k, v, visible_until)
    assert found.dtype == jnp.bfloat16
    # weights and output are rounded to 8 bits: 2^-8 each of values up to about 2
    assert np.abs(np.asarray(found, np.float32) - exact).max() < 2e-2


def test_an_implementation_that_does_not_exist_is_refused_by_name():
    assert choose()[0] == "xla"
    with pytest.raises(ValueError, match="'cudnn' does not exist; there is xla"):
        choose("cudnn")
