"""The stored form of an NF4 weight.

A matrix is flattened row by row and cut into blocks of 64. A block stores its largest magnitude
(absmax), and for each value one of 16 levels between minus and plus that, the quantiles of a normal
distribution (QLoRA, section 3). The absmax of all blocks, minus their mean, are quantised again:
blocks of 256, 8 bits each with a dynamic exponent (Dettmers et al. 2021, arXiv:2110.02861). 4.127
bits a parameter in all.

    value = NF4[code] * (DYNAMIC[absmax code] * nested absmax + offset)

Letters: O outputs, I inputs, N = O x I, M = N / 64 blocks (rounded up).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

BLOCK, NESTED_BLOCK = 64, 256

# QLoRA, appendix E; each is an f32.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def _dynamic() -> np.ndarray:
    """The 256 levels of the dynamic 8-bit type, ascending, f32.

    Seven exponents; each exponent below the highest, 10^0, has half as many levels as the one above
    it, the centres of equal parts of [0.1, 1]. With both signs that is 254; 0 and 1 make it 256
    (there is no -1).
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        parts = 2**exponent
        # As torch.linspace does: an f32 step, counted from the nearer end, each edge rounded once.
        index, step = np.arange(parts + 1), np.float64(np.float32(0.9) / np.float32(parts))
        edges = np.where(
            index <= parts // 2, np.float32(0.1) + step * index, 1 - step * (parts - index)
        ).astype(np.float32)
        centres = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (exponent - 6))
        levels += [*centres, *-centres]
    return np.sort(np.array(levels, np.float32))


DYNAMIC = _dynamic()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NF4Weight:
    """One quantised matrix [O, I], or a stack of them with one more axis in front of each array.

    codes: [N / 2] uint8, two a byte, the first in the high half; absmax: [M] uint8;
    nested_absmax: [M / 256] f32; offset: [] f32 (lengths rounded up). shape: (O, I), as in Hugging
    Face.
    """

    codes: Any
    absmax: Any
    nested_absmax: Any
    offset: Any
    shape: tuple[int, int] = field(metadata={"static": True})


def forms(
    shape: tuple[int, int], stack: tuple[int, ...] = ()
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Name -> (shape, dtype) of the arrays of a weight [O, I]; `stack` is the leading axis."""
    size = shape[0] * shape[1]
    blocks = -(-size // BLOCK)
    return {
        "codes": ((*stack, -(-size // 2)), np.dtype(np.uint8)),
        "absmax": ((*stack, blocks), np.dtype(np.uint8)),
        "nested_absmax": ((*stack, -(-blocks // NESTED_BLOCK)), np.dtype(np.float32)),
        "offset": (stack, np.dtype(np.float32)),
    }


def empty(shape: tuple[int, int], stack: tuple[int, ...] = ()) -> NF4Weight:
    """A weight of uninitialised numpy arrays."""
    return NF4Weight(
        **{name: np.empty(*form) for name, form in forms(shape, stack).items()}, shape=shape
    )
