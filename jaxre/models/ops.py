"""What of a forward pass depends on the devices that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxre_kernels.attention import attention
from jaxre_kernels.cross_entropy import linear_cross_entropy
from jaxre_kernels.lora import lora_group


class Ops(NamedTuple):
    """As it stands: one device, and what `jaxre_kernels` chooses where nothing is asked for.

    constrain: applied to [B, T, D] activations, to keep them sharded over rows.
    attention, lora_group, cross_entropy: take and give what those of `jaxre_kernels` do, over the
    rows of all devices.
    """

    constrain: Callable[[jax.Array], jax.Array] = lambda x: x
    attention: Callable[..., jax.Array] = attention
    lora_group: Callable[..., list[jax.Array]] = lora_group
    cross_entropy: Callable[..., jax.Array] = linear_cross_entropy


ONE_DEVICE = Ops()
