"""Which LoRA projections run, and why: decided from names and shapes, never by looking for devices."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxre_kernels.implementations import kernels_of, named
from jaxre_kernels.lora.group import Factors, Projections, joined_lora_group, projections_of
from jaxre_kernels.nf4 import NF4Tiles, NF4Weight

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")


def choose(projections: Projections | None = None, *, implementation: str | None = None) -> tuple[str, str]:
    """The implementation that `lora_group` runs for such projections (for any, without them), and the reason in words.

    Raises:
      ValueError: an implementation that does not exist, or that does not take these projections.
    """
    name, reason = named("LoRA", implementation, IMPLEMENTATIONS)
    if name == "xla" or projections is None:
        return name, reason
    kernels = kernels_of("lora", name)
    refusal = kernels.unsupported(projections)
    if refusal is not None:
        raise ValueError(f"LoRA implementation {name!r} does not run here: {refusal}; leave it out, or ask for 'xla'")
    return name, f"{reason}; {kernels.told(projections)}"


def lora_group(
    x: jax.Array,
    weights: Sequence[jax.Array | NF4Weight | NF4Tiles],
    factors: Sequence[Factors | None],
    words: jax.Array | None,
    scale: float,
    rate: float,
    *,
    implementation: str | None = None,
) -> list[jax.Array]:
    """x W + scale (dropout(x) A) B of every projection of one input; all see the same dropout mask.

    Differentiable in x and the factors; the weights are frozen.

    Args:
      x: [..., I] compute dtype.
      weights: each [I, O] of x's dtype, an `NF4Weight` (O, I), or an `NF4Tiles`: the kernels bring what is NF4 into the form of the
        latter, with halves as they want them, on every call where it is not.
      factors: one for each weight, None where LoRA does not target it; cast to x's dtype in the products.
      words: [...] uint32 of `group_words`, the counters of the dropout mask; may be None where rate is 0.
      scale: alpha / rank, or alpha / sqrt(rank).
      rate: probability that a channel is dropped, in [0, 1); 0 switches dropout off.

    Returns:
      [..., O] of x's dtype for each weight. The gradients of the factors are summed in f32.

    Raises:
      ValueError: what `choose` says.
    """
    name, _ = choose(projections_of(x, weights, factors), implementation=implementation)
    op = joined_lora_group if name == "xla" else kernels_of("lora", name).pallas_lora_group
    return op(x, weights, factors, words, scale, rate)
