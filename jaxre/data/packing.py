"""The packing plan: which example goes to which row of which update.

A plan is a pure function of lengths, seed and epoch, so that a run resumes from its step number
alone. Rows of one update are packed from examples in random order; updates are never sorted by
length. Letters: B rows, T tokens in a row, S supervised positions in a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxre.errors import InputError

MAX_SHAPES = 3


@dataclass(frozen=True)
class RowShape:
    """The fixed shape [rows, T] with S supervised positions of one micro-batch."""

    rows: int
    length: int
    supervised: int


@dataclass(frozen=True)
class Update:
    """One update: `micro[a][b]` lists the examples of row b of micro-batch a; missing rows are all pad."""

    shape: RowShape
    micro: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Plan:
    """The updates of a whole run, in order; `epoch_ends[e]` is the number of updates up to the end of epoch e."""

    updates: tuple[Update, ...]
    epoch_ends: tuple[int, ...]

    @property
    def shapes(self) -> tuple[RowShape, ...]:
        return tuple(sorted({update.shape for update in self.updates}, key=lambda shape: (shape.length, shape.rows)))

    def fill(self, lengths: np.ndarray, supervised: np.ndarray) -> tuple[float, float]:
        """(pad share, supervised share) of the plan's tokens, over the first epoch."""
        room = real = targets = 0
        for update in self.updates[: self.epoch_ends[0]]:
            room += len(update.micro) * update.shape.rows * update.shape.length
            chosen = np.fromiter((i for rows in update.micro for row in rows for i in row), np.int64)
            real += int(lengths[chosen].sum())
            targets += int(supervised[chosen].sum())
        return 1 - real / room, targets / real


def plan_by_tokens(
    lengths: np.ndarray, supervised: np.ndarray, *, seed: int, epochs: int, row_length: int, rows: int, accumulation: int
) -> Plan:
    """Whole epochs packed into rows of `row_length`, best fit decreasing, then the rows shuffled into updates.

    Args:
      lengths, supervised: [n] tokens and supervised tokens of each example; all lengths fit a row.
      rows: B of a micro-batch.
      accumulation: micro-batches of an update.

    Raises:
      InputError: no example at all.
    """
    _check(lengths, row_length)
    packed = [pack_rows(lengths, supervised, shuffled(len(lengths), seed, epoch), row_length) for epoch in range(epochs)]
    budget = max(int(supervised[list(row)].sum()) for epoch in packed for row in epoch)
    shape = RowShape(rows, row_length, _round_up(budget, 8))
    updates, ends = [], []
    for epoch, epoch_rows in enumerate(packed):
        order = shuffled(len(epoch_rows), seed, epoch, salt=1)
        mixed = [epoch_rows[i] for i in order]
        for batch in _chunks(mixed, rows * accumulation):
            updates.append(Update(shape, tuple(tuple(micro) for micro in _chunks(batch, rows, pad_to=accumulation))))
        ends.append(len(updates))
    return Plan(tuple(updates), tuple(ends))


def plan_by_examples(
    lengths: np.ndarray,
    supervised: np.ndarray,
    *,
    seed: int,
    epochs: int,
    row_length: int,
    examples: int,
    accumulation: int,
    shards: int = 1,
    multiple: int = 128,
) -> Plan:
    """The next `examples` of the shuffled epoch for each update, packed alone into one of at most three shapes.

    Args:
      examples: per update, over all its micro-batches.
      shards: the number of rows is a multiple of this (devices that share the rows).
      multiple: row lengths are multiples of this (cuDNN's and the kernels' block).

    Raises:
      InputError: no example at all.
    """
    _check(lengths, row_length)
    multiple = min(multiple, row_length)
    groups, ends = [], []
    for epoch in range(epochs):
        order = shuffled(len(lengths), seed, epoch)
        for batch in _chunks(order.tolist(), examples):
            groups.append(_chunks(batch, max(1, examples // accumulation), pad_to=accumulation))
        ends.append(len(groups))
    rows = shards
    while True:
        balanced = [[balance(micro, lengths, rows) for micro in group] for group in groups]
        need = np.array([max(int(lengths[row].sum()) for micro in group for row in micro) for group in balanced])
        if need.max() <= row_length:
            break
        rows += shards
    need = np.minimum(-(-need // multiple) * multiple, row_length)
    chosen = choose_lengths(need)
    fitted = np.array([min(length for length in chosen if length >= wanted) for wanted in need])
    targets = np.array([max(int(supervised[row].sum()) for micro in group for row in micro) for group in balanced])
    shapes = {length: RowShape(rows, length, _round_up(int(targets[fitted == length].max()), 8)) for length in set(fitted.tolist())}
    updates = tuple(
        Update(shapes[length], tuple(tuple(tuple(row) for row in micro) for micro in group))
        for length, group in zip(fitted.tolist(), balanced, strict=True)
    )
    return Plan(updates, tuple(ends))


def pack_rows(lengths: np.ndarray, supervised: np.ndarray, order: np.ndarray, row_length: int) -> list[tuple[int, ...]]:
    """Best fit decreasing: each example goes to the fullest row that has room; ties fall by `order`.

    Open rows are kept by remaining room in one bit set, so a row is found in one step.
    """
    by_length = order[np.argsort(-lengths[order], kind="stable")]
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # room -> rows with that room
    rooms = 0  # bit r is set when open_rows[r] is not empty
    for example, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms &= ~(1 << room)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(example)
        left = room - length
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    # Inside a row the order is random again, not by length.
    rank = np.argsort(order)
    return [tuple(sorted(row, key=lambda example: rank[example])) for row in rows]


def balance(examples: Sequence[int], lengths: np.ndarray, rows: int) -> list[list[int]]:
    """Examples spread over `rows` rows, the longest first, each to the emptiest row."""
    loads = [0] * rows
    packed: list[list[int]] = [[] for _ in range(rows)]
    for example in sorted(examples, key=lambda i: -lengths[i]):
        row = loads.index(min(loads))
        packed[row].append(example)
        loads[row] += int(lengths[example])
    return packed


def choose_lengths(need: np.ndarray) -> list[int]:
    """At most MAX_SHAPES row lengths that cover every need with the fewest tokens in all."""
    values, counts = np.unique(need, return_counts=True)
    if len(values) <= MAX_SHAPES:
        return values.tolist()
    longest = int(values[-1])
    best = None
    for shorter in itertools.combinations(values[:-1].tolist(), MAX_SHAPES - 1):
        chosen = np.array([*shorter, longest])
        cost = int((chosen[np.searchsorted(chosen, values)] * counts).sum())
        if best is None or cost < best[0]:
            best = (cost, chosen.tolist())
    return best[1]


def shuffled(count: int, seed: int, epoch: int, salt: int = 0) -> np.ndarray:
    """A permutation of range(count) that depends on its arguments only (Philox, the same on every platform)."""
    key = np.random.SeedSequence([seed, epoch, salt]).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


def _chunks(items: Sequence, size: int, pad_to: int = 0) -> list:
    chunks = [items[start : start + size] for start in range(0, len(items), size)]
    return chunks + [[] for _ in range(pad_to - len(chunks))]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check(lengths: np.ndarray, row_length: int) -> None:
    if not len(lengths):
        raise InputError("the training split has no example; check data.train")
    if lengths.max() > row_length:
        raise InputError(f"an example of {int(lengths.max())} tokens does not fit a row of {row_length}; raise train.row_length")
