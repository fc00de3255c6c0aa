"""What an update has to compute, counted before it runs: FLOPs by part, what each saving removed,
bytes by part.

A product of [n, i] and [i, o] is 2 n i o FLOPs. Training takes the forward product once, again for
the gradient of its input, and a third time where its weight is trained: per token 4 x body + 6 x
LoRA, 4 x head at supervised positions only, and attention (q k and weights v: 4 C per head and pair
of tokens) three times on visible pairs only. Norms, activations, rotary positions and the optimiser
are left out, as is usual (Kaplan et al. 2020, section 2.1).

Nothing here asks the compiler. `program_flops` counts the products of the traced program, which is
another way to the same figure and shows what the program computes beyond it: pads, masked blocks,
recomputation. Of kernels it knows nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxre.config import Lora
from jaxre.data.rows import Rows
from jaxre.models.architecture import EncoderArchitecture
from jaxre.models.weights import AnyArchitecture, table

PARTS = ("base", "LoRA", "attention", "head")
PADDED = 4  # examples of a padded batch: the study's
# Primitives that run a program of their own (Pallas on TPUs, on GPUs; foreign code). What stands in
# it is not what runs: its grid may hang on the data, its products have other names than XLA's,
# blocks are skipped.
KERNELS = ("pallas_call", "core_map", "mpmd_map", "ffi_call")


@dataclass(frozen=True)
class Work:
    """On what an update computes: `tokens` in every layer but the last, `last` positions whose
    queries, attention output and MLP the last layer runs, `head` positions of the vocabulary head;
    visible pairs of tokens in each layer but the last (`pairs`) and in the last (`last_pairs`), of
    which the window of a sliding layer hides `hidden` and `last_hidden`.
    """

    tokens: int
    last: int
    head: int
    pairs: int
    last_pairs: int
    hidden: int = 0
    last_hidden: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            *(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True))
        )


@dataclass(frozen=True)
class Saving:
    """FLOPs before and after a saving, those above it in the list made already."""

    name: str
    before: float
    after: float

    @property
    def removed(self) -> float:
        """Share of the FLOPs before."""
        return 1 - self.after / self.before


def real_tokens(rows: Rows) -> np.ndarray:
    """[..., T] bool, true but for pads. A pad is alone at position 0; no example is of one
    token.
    """
    after = np.arange(1, rows.tokens.shape[-1] + 1)
    return (rows.positions > 0) | (rows.visible_until > after)


def work_of(rows: Rows, both_ways: bool, window: int | None = None) -> Work:
    """What the rows [..., T] need: each token of a shared prefix once, no pads, the last layer and
    the head where supervised.

    Args:
      both_ways: an encoder's, where a token sees all of its example; else those before it and
        itself, of which there are as many as its position says, shared or not.
      window: of sliding layers, where a token sees no more than so many of them.
    """
    real, supervised = real_tokens(rows), rows.weights > 0
    seen = rows.positions + 1
    if both_ways:
        seen = rows.visible_until - np.arange(rows.tokens.shape[-1]) + rows.positions
    asked = np.take_along_axis(seen, rows.supervised, axis=-1)
    positions = int(supervised.sum())
    hidden = [
        0 if window is None else int(np.maximum(some - window, 0).sum(dtype=np.int64))
        for some in (seen[real], asked[supervised])
    ]
    return Work(
        int(real.sum()),
        positions,
        positions,
        int(seen[real].sum(dtype=np.int64)),
        int(asked[supervised].sum(dtype=np.int64)),
        *hidden,
    )


def flops_of(
    work: Work, architecture: AnyArchitecture, lora: Lora | None, frozen_gradients: bool = False
) -> dict[str, float]:
    """FLOPs of forward and backward by part (PARTS); `lora` is None where all weights are trained.

    Args:
      frozen_gradients: the gradients of all weights are formed, those of frozen ones to be thrown
        away.
    """
    # whether the gradient of the weight is formed
    once_more = 3 if lora is None or frozen_gradients else 2
    stacked, last, low_stacked, low_last = 0, 0, 0, 0
    for weight in table(architecture):
        if not weight.in_layer or len(weight.dims) != 2:
            continue
        inputs, outputs = weight.shape(architecture)
        # Keys and values of the last layer are read by the supervised positions, so every token
        # needs them.
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
        "base": 2 * once_more * float(layers * work.tokens * stacked + last),
        "LoRA": 2 * 3 * float(layers * work.tokens * low_stacked + low_last),
        "attention": 3 * 4 * float(width * (pairs + last_pairs)),
        "head": 2 * once_more * float(work.head * head),
    }


def savings_of(
    work: Work,
    lengths: Sequence[int],
    row_length: float,
    architecture: AnyArchitecture,
    lora: Lora | None,
) -> list[Saving]:
    """What each of the six savings removed, one after the other.

    It starts from a padded batch whose attention scores every pair of a row. So do packed rows
    until the last saving: packing alone makes rows longer, and may add more to attention than it
    removes elsewhere.

    Args:
      work: what is left to do (`work_of`).
      lengths: tokens of each example, in the order in which a padded run would batch them (PADDED
        at a time).
      row_length: T of the packed rows, the mean over their tokens.
    """
    batches = [lengths[start : start + PADDED] for start in range(0, len(lengths), PADDED)]
    padded = [max(batch) for batch in batches for _ in batch]

    def dense(tokens: int, last: int, head: int) -> Work:
        return Work(tokens, last, head, int(tokens * row_length), int(last * row_length))

    whole, pairs = sum(padded), sum(length * length for length in padded)
    stages = (
        ("padding to the longest of 4", Work(whole, whole, whole, pairs, pairs), True),
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

    A `while` of unknown length counts once, the dearest branch of a `cond` counts, what each device
    of a mesh runs once for each. None, not counted, where a kernel (KERNELS) hides its products.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, given = equation.primitive.name, equation.params
        if name in KERNELS:
            return None
        if name == "dot_general":
            (contracted, _), _ = given["dimension_numbers"]
            sizes = equation.invars[0].aval.shape
            total += (
                2.0
                * math.prod(equation.outvars[0].aval.shape)
                * math.prod(sizes[axis] for axis in contracted)
            )
            continue
        inner = [program_flops(part) for value in given.values() for part in _programs(value)]
        if None in inner:
            return None
        if name == "cond":
            total += max(inner)
        elif name == "scan":
            total += given["length"] * sum(inner)
        elif name == "shard_map":
            # Of the axes that it does not split, the program is that of all devices.
            total += math.prod(
                given["mesh"].shape[axis] for axis in given["newly_manual_axes"]
            ) * sum(inner)
        else:
            total += sum(inner)
    return total


def _programs(value: object) -> list[Jaxpr | ClosedJaxpr]:
    if isinstance(value, Jaxpr | ClosedJaxpr):
        return [value]
    return (
        [part for one in value for part in _programs(one)]
        if isinstance(value, tuple | list)
        else []
    )


def bytes_on_device(tree: object) -> int:
    """Bytes of the arrays on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
