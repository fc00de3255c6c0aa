"""Which LoRA projections run, and why: decided from names and shapes, never by looking for
devices.
"""

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
    """The implementation that `lora_group` runs for such projections (for any, without them), and
    the reason in words.

    The table is asked where projections and `device_kind` are given (see
    `jaxre_kernels.implementations`).

    Raises:
      ValueError: an implementation that does not exist, or that does not take these projections.
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
    return name, f"{reason}; {kernels_of('lora', name).told(projections)}"


def _measured(projections: Projections | None, device_kind: str | None) -> Entry | None:
    """The table's entry; none for projections of which some are NF4, or that have not all the same
    rank: those are not measured.
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
    """The implementation whose form NF4 weights are best stored in: one that the table names for
    some of them, else "xla".

    All implementations read all forms; what is in another than theirs they bring there on every
    call.
    """
    names = (
        entry.implementation
        for entry in read_table()
        if (entry.op, entry.device_kind) == ("nf4", device_kind)
    )
    return next((name for name in names if name != "xla"), "xla")


def stored(weight: NF4Weight, implementation: str) -> NF4Weight | NF4Tiles:
    """An NF4 weight, or a stack of them, in the form that an implementation reads: brought there
    once, not on every call.

    Raises:
      ValueError: a weight that it does not take.
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
    """x W + scale (dropout(x) A) B of every projection of one input; all see the same dropout mask.

    Differentiable in x and the factors; the weights are frozen.

    Args:
      x: [..., I] compute dtype.
      weights: each [I, O] of x's dtype, an `NF4Weight` (O, I), or an `NF4Tiles`: the kernels bring
        what is NF4 into the form of the latter, with halves as they want them, on every call where
        it is not.
      factors: one for each weight, None where LoRA does not target it; cast to x's dtype in the
        products.
      words: [...] uint32 of `group_words`, the counters of the dropout mask; may be None where rate
        is 0.
      scale: alpha / rank, or alpha / sqrt(rank).
      rate: probability that a channel is dropped, in [0, 1); 0 switches dropout off.
      device_kind: of the device that the program is for, to ask the table; "xla" runs where neither
        is given.

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
