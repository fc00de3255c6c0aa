"""Chooses the LoRA implementation from names and shapes, never by looking for devices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxre_kernels.implementations import Entry, kernels_of, measured, named, read_table
from jaxre_kernels.lora.group import Factors, Projections, joined_lora_group, projections_of
from jaxre_kernels.nf4 import NF4Tiles, NF4Weight, tiled

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")


def choose(
    projections: Projections | None = None,
    *,
    implementation: str | None = None,
    device_kind: str | None = None,
) -> tuple[str, str]:
    """Returns the implementation that `lora_group` runs for such projections (for any, without
    them), and the reason in words.

    The table is consulted if projections and `device_kind` are given (see
    `jaxre_kernels.implementations`).

    Raises:
      ValueError: an implementation that does not exist, or that does not support these projections.
    """

    def unsupported(name: str) -> str | None:
        return None if name == "xla" else kernels_of("lora", name).unsupported(projections)

    name, reason = named(
        "LoRA", implementation, IMPLEMENTATIONS, _measured(projections, device_kind), unsupported
    )
    if name == "xla" or projections is None:
        return name, reason
    refusal = unsupported(name)
    if refusal is not None:
        raise ValueError(
            f"LoRA implementation {name!r} does not run here: {refusal}; leave it out, or ask for"
            " 'xla'"
        )
    return name, f"{reason}; {kernels_of('lora', name).described(projections)}"


def _measured(projections: Projections | None, device_kind: str | None) -> Entry | None:
    """The table's entry; None for projections that mix NF4 and dense weights or ranks, which are
    not measured.
    """
    if projections is None or len(set(projections.ranks)) > 1 or len(set(projections.nf4)) > 1:
        return None
    tokens, inputs, outputs, ranks, nf4, dtype = projections
    sizes = {
        "tokens": tokens,
        "inputs": inputs,
        "outputs": sum(outputs),
        "projections": len(outputs),
        "rank": ranks[0],
    }
    return measured("nf4" if nf4[0] else "lora", device_kind, dtype, sizes)


def nf4_form(device_kind: str | None) -> str:
    """The implementation in whose form NF4 weights are best stored: one that the table names for
    some of them, else "xla".

    Every implementation reads all forms, but converts a form other than its own on every call.
    """
    names = (
        entry.implementation
        for entry in read_table()
        if (entry.op, entry.device_kind) == ("nf4", device_kind)
    )
    return next((name for name in names if name != "xla"), "xla")


def stored(weight: NF4Weight, implementation: str) -> NF4Weight | NF4Tiles:
    """Converts an NF4 weight, or a stack of them, once, to the form that an implementation reads.

    Raises:
      ValueError: a weight that it does not support.
    """
    if implementation == "xla":
        return weight
    pack = partial(tiled, half=kernels_of("lora", implementation).NF4_HALF)
    return jax.vmap(pack)(weight) if jnp.ndim(weight.offset) else pack(weight)


def lora_group(
    x: jax.Array,
    weights: Sequence[jax.Array | NF4Weight | NF4Tiles],
    factors: Sequence[Factors | None],
    words: jax.Array | None,
    scale: float,
    rate: float,
    *,
    implementation: str | None = None,
    device_kind: str | None = None,
) -> list[jax.Array]:
    """x W + scale (dropout(x) A) B of every projection of one input, all with the same dropout
    mask.

    Differentiable in x and the factors; the weights are frozen.

    Args:
      x: [..., I] compute dtype.
      weights: each [I, O] of x's dtype, an `NF4Weight` (O, I), or an `NF4Tiles`. The kernels read
        `NF4Tiles` with halves of their own size and convert other NF4 forms on every call.
      factors: one per weight, None where LoRA does not target it; cast to x's dtype in the
      products.
      words: [...] uint32 of `group_words`, the counters of the dropout mask; may be None if rate is
        0.
      scale: alpha / rank, or alpha / sqrt(rank).
      rate: probability of dropping a channel, in [0, 1); 0 disables dropout.
      device_kind: kind of the target device, for the table; without it or `implementation`, "xla"
        runs.

    Returns:
      [..., O] of x's dtype for each weight. The gradients of the factors are summed in f32.

    Raises:
      ValueError: what `choose` says.
    """
    name, _ = choose(
        projections_of(x, weights, factors), implementation=implementation, device_kind=device_kind
    )
    op = joined_lora_group if name == "xla" else kernels_of("lora", name).pallas_lora_group
    return op(x, weights, factors, words, scale, rate)
