"""Quantises weights to NF4 once, on the host, in numpy, with every rounding of bitsandbytes on CPU.

Codes and absmax follow from IEEE arithmetic alone. The mean of the absmax is torch's, whose sum has
its own order (`torch_sum`). That is the order of one thread: with more threads torch splits sums of
32,768 absmax (weights of 2,097,152 parameters) and longer, and the last bit may differ.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jaxre_kernels.nf4.weight import BLOCK, DYNAMIC, NESTED_BLOCK, NF4, NF4Weight, empty

CHUNK = BLOCK << 12  # parameters quantised at a time: 3 MB of scratch memory
TINY = np.float32(1e-38)  # the least magnitude a block is divided by

_BETWEEN = (NF4[:-1] + NF4[1:]) / np.float32(2)


def _nearest_dynamic() -> np.ndarray:
    """[65536] uint8: the nearest level of DYNAMIC to each of 65,536 even steps of [-1, 1]."""
    steps = (np.arange(65536) / 65535 * 2 - 1).astype(np.float32)
    above = np.clip(np.searchsorted(DYNAMIC, steps), 1, 255)
    return (above - (np.abs(steps - DYNAMIC[above - 1]) <= np.abs(steps - DYNAMIC[above]))).astype(
        np.uint8
    )


_NEAREST = _nearest_dynamic()


def quantise(matrix: np.ndarray) -> NF4Weight:
    """NF4 with double quantisation of one matrix.

    Args:
      matrix: [O, I], any floating-point dtype (rounded to f32 first).

    Raises:
      ValueError: a value that is not finite, or no matrix.
    """
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"a matrix is quantised, not an array of shape {list(matrix.shape)}")
    weight = empty(matrix.shape)
    flat = np.ascontiguousarray(matrix).reshape(-1)
    scales = np.empty(weight.absmax.shape, np.float32)
    for start in range(0, flat.size, CHUNK):
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below
            codes, largest = quantise_blocks(flat[start : start + CHUNK].astype(np.float32))
        scales[start // BLOCK : start // BLOCK + largest.size] = largest
        weight.codes[start // 2 : start // 2 + codes.size] = codes
    if not np.isfinite(scales).all():
        raise ValueError("it has a value that is not finite")
    weight.offset[...] = torch_sum(scales) / np.float32(scales.size)
    weight.absmax[:], weight.nested_absmax[:] = quantise_absmax(scales - weight.offset)
    return weight


def quantise_blocks(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[n] f32 -> packed codes [n / 2] uint8, absmax [n / 64] f32; only the last block may be
    short.
    """
    whole = flat.size // BLOCK * BLOCK
    blocks, rest = flat[:whole].reshape(-1, BLOCK), flat[whole:]
    absmax = np.abs(blocks).max(axis=1)
    scaled = (blocks * (np.float32(1) / np.maximum(absmax, TINY))[:, None]).reshape(-1)
    # The short block is divided, not multiplied by a reciprocal, and its absmax is never 0.
    if rest.size:
        last = np.maximum(np.abs(rest).max(), TINY)
        absmax, scaled = np.append(absmax, last), np.append(scaled, rest / last)
    # The number of midpoints below; a value on a midpoint takes the lower level. Ten times as fast
    # as a binary search.
    codes = np.zeros(scaled.size, np.uint8)
    for midpoint in _BETWEEN:
        codes += scaled > midpoint
    if codes.size % 2:
        codes = np.append(codes, np.uint8(7))  # the level 0
    return codes[0::2] << 4 | codes[1::2], absmax


def quantise_absmax(centred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[M] f32, absmax minus their mean -> codes [M] uint8, nested absmax [M / 256] f32."""
    short = -centred.size % NESTED_BLOCK
    blocks = np.append(centred, np.zeros(short, np.float32)).reshape(-1, NESTED_BLOCK)
    largest = np.abs(blocks).max(axis=1)
    with np.errstate(
        divide="ignore", over="ignore", invalid="ignore"
    ):  # a block of zeros, 0 x inf, has code 0
        scaled = np.nan_to_num(blocks * (np.float32(1) / largest)[:, None], nan=-1.0).clip(-1, 1)
    step = (scaled + np.float32(1)) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)
    codes = _NEAREST[step.astype(np.int64)]
    return codes.reshape(-1)[: centred.size], largest


def torch_sum(values: np.ndarray) -> np.float32:
    """The f32 sum of a vector [n] in the order that torch uses on one thread of an x86 processor.

    Four vectors of 8 lanes (of one lane if there are fewer values) are summed side by side, each in
    a cascade (`_cascade`); then the remaining vectors, the four, the remaining values, the lanes.
    """
    width = 8 if values.size >= 8 else 1
    rows = values[: values.size // width * width].reshape(-1, width)
    fours = rows[: len(rows) // 4 * 4].reshape(-1, 4, width)
    first, *others = _cascade(fours)
    lanes = _in_order(first, [*rows[4 * len(fours) :], *others])
    return _in_order(np.float32(0), [*values[rows.size :], *lanes])


def _cascade(rows: np.ndarray) -> np.ndarray:
    """Sums [n, ...] over its first axis: in groups of 2^p, the groups in groups of 2^p, and once
    more.
    """
    group = 1 << max(4, (len(rows) - 1).bit_length() // 4)
    zero, levels = np.zeros(rows.shape[1:], np.float32), []
    for _ in range(3):
        whole = len(rows) // group * group
        levels.append(_in_order(zero, rows[whole:]))
        rows = _in_order(
            np.float32(0), rows[:whole].reshape(-1, group, *rows.shape[1:]).swapaxes(0, 1)
        )
    return _in_order(zero, [*levels, _in_order(zero, rows)])


def _in_order(total: np.ndarray, terms: Iterable[np.ndarray]) -> np.ndarray:
    for term in terms:
        total = total + term
    return total
