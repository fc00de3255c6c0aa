"""Which attention runs, and why: decided from names and shapes, never by looking for devices."""

from __future__ import annotations

import jax

from jaxre_kernels.attention.reference import attention as xla_attention

IMPLEMENTATIONS = {"xla": xla_attention}


def choose(implementation: str | None = None) -> tuple[str, str]:
    """The implementation that `attention` runs, and the reason in words.

    Raises:
      ValueError: an implementation that does not exist.
    """
    if implementation is None:
        return "xla", "the only implementation there is"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} does not exist; there is {', '.join(IMPLEMENTATIONS)}")
    return implementation, "asked for"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_until: jax.Array,
    *,
    prefix: int = 0,
    span: int | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention over packed rows; see `reference.attention` for shapes. `prefix` and `span` bound where to look; this looks everywhere."""
    name, _ = choose(implementation)
    return IMPLEMENTATIONS[name](q, k, v, visible_until)
