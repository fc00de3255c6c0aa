"""Device-dependent operations of the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxre_kernels.attention import attention
from jaxre_kernels.cross_entropy import linear_cross_entropy
from jaxre_kernels.lora import lora_group


class Ops(NamedTuple):
    """Operations over the rows of all devices; by default one device, and the implementations that
    `jaxre_kernels` chooses.

    constrain: applied to [B, T, D] activations to keep them sharded over rows.
    attention, lora_group, cross_entropy: signatures as in `jaxre_kernels`.
    """

    constrain: Callable[[jax.Array], jax.Array] = lambda x: x
    attention: Callable[..., jax.Array] = attention
    lora_group: Callable[..., list[jax.Array]] = lora_group
    cross_entropy: Callable[..., jax.Array] = linear_cross_entropy


ONE_DEVICE = Ops()
