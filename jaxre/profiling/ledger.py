"""Counts the work of an update before it runs: FLOPs by part, FLOPs that each saving removes, bytes
by part.

A product of [n, i] and [i, o] is 2 n i o FLOPs. Training computes the forward product, the gradient
of its input, and the gradient of its weight if that is trained: per token 4 x body + 6 x LoRA, 4 x
head at supervised positions only, and attention (q k and weights v: 4 C per head and pair of
tokens) three times on visible pairs only. Norms, activations, rotary positions and the optimiser
are omitted, as usual (Kaplan et al. 2020, section 2.1).

The compiler is not involved. `program_flops` counts the products of the traced program: an
independent count, which also shows the work beyond the necessary (padding, masked blocks,
recomputation). It cannot see into kernels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxre.config import Lora
from jaxre.data.rows import Rows
from jaxre.models.architecture import EncoderArchitecture
from jaxre.models.weights import AnyArchitecture, table

PARTS = ("base", "LoRA", "attention", "head")
PADDED = 4  # examples of a padded batch, as in the study
# Primitives that run a program of their own (Pallas on TPUs and GPUs; foreign code). Its products
# cannot be counted: the grid may depend on the data, products have other names than XLA's, blocks
# are skipped.
KERNELS = ("pallas_call", "core_map", "mpmd_map", "ffi_call")


@dataclass(frozen=True)
class Work:
    """Amounts that determine the FLOPs of an update.

    tokens: in every layer but the last.
    last: positions for which the last layer computes queries, attention output and MLP.
    head: positions of the vocabulary head.
    pairs, last_pairs: visible pairs of tokens in each layer but the last, and in the last.
    hidden, last_hidden: those of the pairs that the window of a sliding layer hides.
    """

    tokens: int
    last: int
    head: int
    pairs: int
    last_pairs: int
    hidden: int = 0
    last_hidden: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Saving:
    """FLOPs before and after a saving, with the savings above it in the list already made."""

    name: str
    before: float
    after: float

    @property
    def removed(self) -> float:
        """Share of the FLOPs before that the saving removes."""
        return 1 - self.after / self.before


def real_tokens(rows: Rows) -> np.ndarray:
    """[..., T] bool, false for padding. Only padding is alone at position 0: no example has a
    single token.
    """
    after = np.arange(1, rows.tokens.shape[-1] + 1)
    return (rows.positions > 0) | (rows.visible_until > after)


def work_of(rows: Rows, both_ways: bool, window: int | None = None) -> Work:
    """The necessary work of rows [..., T]: each token of a shared prefix once, no padding, the last
    layer and the head only at supervised positions.

    Args:
      both_ways: for an encoder, whose tokens see their whole example. Otherwise a token sees itself
        and those before it, as many as its position says, shared or not.
      window: of sliding layers, the maximum number of tokens that a token sees.
    """
    real, supervised = real_tokens(rows), rows.weights > 0
    seen_by = rows.positions + 1
    if both_ways:
        seen_by = rows.visible_until - np.arange(rows.tokens.shape[-1]) + rows.positions
    pairs = seen_by[real]
    last_pairs = np.take_along_axis(seen_by, rows.supervised, axis=-1)[supervised]

    def hidden(pairs: np.ndarray) -> int:
        return 0 if window is None else int(np.maximum(pairs - window, 0).sum(dtype=np.int64))

    return Work(
        tokens=int(real.sum()),
        last=int(supervised.sum()),
        head=int(supervised.sum()),
        pairs=int(pairs.sum(dtype=np.int64)),
        last_pairs=int(last_pairs.sum(dtype=np.int64)),
        hidden=hidden(pairs),
        last_hidden=hidden(last_pairs),
    )


def flops_of(
    work: Work, architecture: AnyArchitecture, lora: Lora | None, frozen_gradients: bool = False
) -> dict[str, float]:
    """FLOPs of forward and backward by part (PARTS); `lora` is None if all weights are trained.

    Args:
      frozen_gradients: the gradients of frozen weights are computed too, and discarded.
    """
    # Forward, gradient of the input, and perhaps gradient of the weight.
    products = 3 if lora is None or frozen_gradients else 2
    stacked, last, low_stacked, low_last = 0, 0, 0, 0
    for weight in table(architecture):
        if not weight.in_layer or len(weight.dims) != 2:
            continue
        inputs, outputs = weight.shape(architecture)
        # Supervised positions read the last layer's keys and values of every token.
        positions = work.tokens if weight.name in ("k", "v") else work.last
        stacked += inputs * outputs
        last += positions * inputs * outputs
        if lora is not None and weight.name in lora.targets:
            low_stacked += lora.rank * (inputs + outputs)
            low_last += positions * lora.rank * (inputs + outputs)
    layers = architecture.layers - 1
    encoder = isinstance(architecture, EncoderArchitecture)
    width = architecture.size("D") if encoder else architecture.size("HC")
    sliding = () if encoder else architecture.sliding
    pairs = layers * work.pairs - sum(sliding[:-1]) * work.hidden
    last_pairs = work.last_pairs - sum(sliding[-1:]) * work.last_hidden
    head = architecture.size("D") * (
        architecture.size("D") + architecture.size("N") if encoder else architecture.size("V")
    )
    return {
        "base": 2 * products * float(layers * work.tokens * stacked + last),
        "LoRA": 2 * 3 * float(layers * work.tokens * low_stacked + low_last),
        "attention": 3 * 4 * float(width * (pairs + last_pairs)),
        "head": 2 * products * float(work.head * head),
    }


def savings_of(
    work: Work,
    lengths: Sequence[int],
    row_length: float,
    architecture: AnyArchitecture,
    lora: Lora | None,
) -> list[Saving]:
    """FLOPs that each of the six savings removes, applied one after another.

    The start is a padded batch whose attention scores every pair of a row. Packed rows do so too
    until the last saving: packing alone makes rows longer, and may add more to attention than it
    removes elsewhere.

    Args:
      work: the remaining work (`work_of`).
      lengths: tokens of each example, in the order in which a padded run would batch them (PADDED
        at a time).
      row_length: T of the packed rows, averaged over their tokens.
    """
    batches = [lengths[start : start + PADDED] for start in range(0, len(lengths), PADDED)]
    padded = [max(batch) for batch in batches for _ in batch]

    def dense(tokens: int, last: int, head: int) -> Work:
        return Work(tokens, last, head, int(tokens * row_length), int(last * row_length))

    total, pairs = sum(padded), sum(length * length for length in padded)
    stages = (
        ("padding to the longest of 4", Work(total, total, total, pairs, pairs), True),
        ("no padding", dense(*[sum(lengths)] * 3), True),
        ("shared prefixes once", dense(*[work.tokens] * 3), True),
        ("head where supervised", dense(work.tokens, work.tokens, work.head), True),
        ("last layer where supervised", dense(work.tokens, work.last, work.head), True),
        ("no gradients of frozen weights", dense(work.tokens, work.last, work.head), False),
        ("attention where visible", work, False),
    )
    totals = [
        sum(flops_of(stage, architecture, lora, frozen_gradients).values())
        for _, stage, frozen_gradients in stages
    ]
    return [
        Saving(name, before, after)
        for (name, *_), before, after in zip(stages[1:], totals[:-1], totals[1:], strict=True)
    ]


def program_flops(jaxpr: Jaxpr | ClosedJaxpr) -> float | None:
    """FLOPs of the matrix products of a traced program (`jax.make_jaxpr`), loops counted as often
    as they run.

    A `while` of unknown length counts once, a `cond` as its most expensive branch, and the program
    of each device in a mesh separately. None if a kernel (KERNELS) hides its products.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name in KERNELS:
            return None
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            total += (
                2.0
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(sizes[axis] for axis in contracted)
            )
            continue
        inner = [program_flops(part) for part in _programs(tuple(params.values()))]
        if None in inner:
            return None
        if name == "cond":
            total += max(inner)
        elif name == "scan":
            total += params["length"] * sum(inner)
        elif name == "shard_map":
            # Along the axes that it does not split, the program covers all devices.
            devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
            total += devices * sum(inner)
        else:
            total += sum(inner)
    return total


def _programs(value: object) -> list[Jaxpr | ClosedJaxpr]:
    if isinstance(value, Jaxpr | ClosedJaxpr):
        return [value]
    if isinstance(value, tuple | list):
        return [program for item in value for program in _programs(item)]
    return []


def bytes_on_device(tree: object) -> int:
    """Bytes of the arrays on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
