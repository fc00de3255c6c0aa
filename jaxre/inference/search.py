"""The best label of each example by best-first search over the tree of its labels.

    best, scores = best_labels(model, prompts, answers)
        # [n] label numbers, [n] their log-probabilities

A log-probability only falls along a path (here too: a logit minus a log-sum-exp that is at least as
large, added up in f64), so the score of a node bounds those of all labels below it. The best open
node of every example is read, in one batched step for all (`slots.py`), until the best that is open
is a label: then no other label can have a higher score. Of labels with equal scores the first of
the schema is the best, as `argmax` says of all scores: of equal bounds the node with the first
label below it is read first.

An example reads a node at most once, and at most COLUMNS of them. If that settles nothing, its
labels lie close together, and all of them are scored (`scoring.py`), which is exact too.

Letters: S slots, R arriving prompts, W columns of nodes, J targets of a node, N nodes, V
vocabulary.
"""

from __future__ import annotations

import functools
import heapq
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxre.errors import InputError
from jaxre.inference.model import Model, adapter_of, on_device
from jaxre.inference.prefix import Prefix, check_prompts, own_tokens, prefixes_of, shared_prefixes
from jaxre.inference.scoring import plan_scoring, run_scoring
from jaxre.inference.slots import (
    Arrivals,
    Sizes,
    Slots,
    arrivals_of,
    empty_slots,
    fill_slots,
    plan_slots,
    step_slots,
)
from jaxre.inference.tree_rows import check_lengths, trees_of
from jaxre.inference.trees import Answers, AnswerTree
from jaxre.models.architecture import Architecture
from jaxre.models.decoder import Tree, head

COLUMNS = 64


@dataclass(frozen=True)
class Branches:
    """A label tree as the search walks it. Row 0 is the prompt's end, row n + 1 is node n, as in
    `AnswerTree.targets`.

    after: per row and target, (the row that it leads to or -1, the label that it ends or -1).
    first: per row, the first label of the schema below it. parents: per row, the row before it.
    """

    tree: AnswerTree
    after: list[list[tuple[int, int]]]
    first: list[int]
    parents: list[int]

    @classmethod
    def of(cls, tree: AnswerTree) -> Branches:
        rows, labels = len(tree.targets), len(tree.valid)
        lengths = tree.valid.sum(axis=1)
        first, parents, followers = (
            np.full(rows, labels),
            np.full(rows, -1),
            np.zeros(rows, np.int64),
        )
        np.maximum.at(followers, tree.place[tree.valid], tree.child[tree.valid] + 1)
        after = [[(-1, -1)] * count for count in followers.tolist()]
        for label in range(labels):
            place, child = (
                array[label, : lengths[label]].tolist() for array in (tree.place, tree.child)
            )
            first[place] = np.minimum(first[place], label)
            for row, target, following in zip(place, child, place[1:], strict=False):
                after[row][target], parents[following] = (following, after[row][target][1]), row
            after[place[-1]][child[-1]] = after[place[-1]][child[-1]][0], label
        return cls(tree, after, first.tolist(), parents.tolist())


@dataclass
class Search:
    """An example at work.

    open: heap of (minus the score, first label below, row or -1 for a label). columns: of the rows
    that were read.
    """

    example: int
    name: str | int
    branches: Branches
    open: list[tuple[float, int, int]] = field(default_factory=list)
    columns: dict[int, int] = field(default_factory=dict)

    def read(self, row: int, score: float, log_probabilities: np.ndarray) -> None:
        """Opens what a row of this score leads to; log_probabilities: [J] of its targets. Raises
        InputError for one that is no number.
        """
        for (lead, end), share in zip(
            self.branches.after[row], log_probabilities.tolist(), strict=False
        ):
            if share != share:
                raise InputError(no_number(self.name))
            if end >= 0:
                heapq.heappush(self.open, (-(score + share), end, -1))
            if lead >= 0:
                heapq.heappush(self.open, (-(score + share), self.branches.first[lead], lead))

    @property
    def found(self) -> bool:
        """Whether the best that is open is a label."""
        return self.open[0][2] < 0

    def path(self, row: int) -> list[int]:
        """The columns of the rows between the prompt and a row."""
        columns = []
        while (row := self.branches.parents[row]) > 0:
            columns.append(self.columns[row])
        return columns


class Reading(NamedTuple):
    """What a step reads: tokens, depths [S] int32 and the columns that each sees [S, W] bool, as
    `step_slots` takes them.

    targets: [S, J] int32.
    """

    tokens: np.ndarray
    depths: np.ndarray
    seen: np.ndarray
    targets: np.ndarray


def best_labels(
    model: Model,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answers],
    *,
    batch_tokens: int = 8192,
    names: Sequence[str] | None = None,
    settled: Callable[[dict[int, tuple[int, float]]], None] = lambda found: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The label with the highest score of each example, and that score.

    Args:
      prompts, answers: as those of `score_labels`.
      batch_tokens: about the tokens that all slots hold.
      names: of the examples, for messages; their numbers if not given.
      settled: called with example -> (label, log-probability) of those that have just ended.

    Returns:
      [n] int64 numbers of labels, [n] f64 log-probabilities.

    Raises:
      InputError: as `score_labels`, or a score that is no number.
    """
    check_prompts(prompts, names)
    trees = trees_of(answers)
    groups = shared_prefixes(prompts, batch_tokens)
    check_lengths(prompts, trees, groups, model.architecture, batch_tokens, names)
    branches = {
        number: Branches.of(tree) for number, tree in {id(tree): tree for tree in trees}.items()
    }
    params, factors = on_device(model)
    best, scores = np.zeros(len(prompts), np.int64), np.zeros(len(prompts))
    unsettled: list[int] = []
    kinds = [branch.tree for branch in branches.values()]
    J, W = (
        max(tree.targets.shape[1] for tree in kinds),
        min(COLUMNS, max(1, *(len(tree.tokens) for tree in kinds))),
    )
    every = own_tokens(prompts, groups)
    plans = plan_slots(every, W, batch_tokens)
    computed = prefixes_of(params, factors, groups, model.architecture, model.scale)
    ready = Model(params, model.architecture, factors, model.scale)

    def search_of(example: int) -> Search:
        return Search(example, names[example] if names else example, branches[id(trees[example])])

    for group, owns, plan, prefix in zip(groups, every, plans, computed, strict=True):
        for done in _ended(ready, prefix, len(group.tokens), owns, plan, J, search_of):
            for search in done:
                if search.found:
                    best[search.example], scores[search.example] = (
                        search.open[0][1],
                        -search.open[0][0],
                    )
                else:
                    unsettled.append(search.example)
            ended = [search.example for search in done if search.found]
            settled({one: (int(best[one]), float(scores[one])) for one in ended})
    if unsettled:
        some = sorted(unsettled)
        plan = plan_scoring(
            [prompts[example] for example in some],
            [answers[example] for example in some],
            model.architecture,
            batch_tokens=batch_tokens,
            names=names and [names[example] for example in some],
        )
        found = run_scoring(model, plan)
        best[some], scores[some] = found.argmax(axis=1), found.max(axis=1)
        settled({one: (int(best[one]), float(scores[one])) for one in some})
    return best, scores


def _ended(
    model: Model,
    prefix: Prefix | None,
    depth: int,
    owns: Mapping[int, Sequence[int]],
    plan: Sequence[Sizes],
    J: int,
    search_of: Callable[[int], Search],
) -> Iterator[list[Search]]:
    """Searches for prompts behind one prefix; yields those that have found their label, or read as
    many nodes as they may.

    A search is begun when its prompt takes a slot, and kept no longer than that: its heap can be
    large.
    """
    weights, run = (
        (model.params, model.factors, prefix),
        {"architecture": model.architecture, "scale": model.scale},
    )
    for sizes in plan:
        W = sizes.columns
        slots = empty_slots(sizes, model.architecture, model.params["embed"].dtype)
        waiting = deque(sizes.chunks(owns))
        at_work: dict[int, Search] = {}  # of each slot
        step = 0
        while waiting or at_work:
            free = [slot for slot in range(sizes.slots) if slot not in at_work]
            if waiting and len(waiting[0]) <= len(free):
                chunk = waiting.popleft()
                begun = [search_of(example) for example in chunk]
                at_work |= dict(zip(free, begun, strict=False))
                roots = [search.branches.tree.targets[0] for search in begun]
                arrivals = arrivals_of(chunk, free, owns, depth, sizes)
                slots, found = fill(
                    *weights,
                    slots,
                    arrivals,
                    targets_of(dict(enumerate(roots)), sizes.arrivals, J),
                    **run,
                )
                for search, shares in zip(begun, np.asarray(found), strict=False):
                    search.read(0, 0.0, shares)
            else:
                rows = {slot: heapq.heappop(search.open) for slot, search in at_work.items()}
                column = step % W
                slots, found = read_nodes(
                    *weights,
                    slots,
                    reading_of(at_work, rows, sizes.slots, W, J),
                    np.int32(column),
                    **run,
                )
                found = np.asarray(found)
                for slot, (minus, _, row) in rows.items():
                    at_work[slot].columns[row] = column
                    at_work[slot].read(row, -minus, found[slot])
                step += 1
            ended = [
                slot for slot, search in at_work.items() if search.found or len(search.columns) == W
            ]
            if ended:
                yield [at_work.pop(slot) for slot in ended]


def no_number(name: str | int) -> str:
    return (
        f"example {name}: the model gives scores that are no numbers (NaN); its weights need"
        " mending"
    )


def targets_of(targets: Mapping[int, np.ndarray], places: int, J: int) -> np.ndarray:
    """Targets of some of the places -> [places, J] int32, filled up with 0."""
    filled = np.zeros((places, J), np.int32)
    for place, one in targets.items():
        filled[place, : len(one)] = one
    return filled


def reading_of(
    at_work: dict[int, Search], rows: dict[int, tuple[float, int, int]], S: int, W: int, J: int
) -> Reading:
    """The rows that were taken from the heaps, as arrays."""
    tokens, depths, seen = np.zeros(S, np.int32), np.zeros(S, np.int32), np.zeros((S, W), bool)
    for slot, (_, _, row) in rows.items():
        search, tree = at_work[slot], at_work[slot].branches.tree
        tokens[slot], depths[slot] = tree.tokens[row - 1], tree.depths[row - 1]
        seen[slot, search.path(row)] = True
    targets = {slot: at_work[slot].branches.tree.targets[row] for slot, (_, _, row) in rows.items()}
    return Reading(tokens, depths, seen, targets_of(targets, S, J))


@functools.partial(jax.jit, static_argnames=("architecture", "scale"), donate_argnames="slots")
def fill(
    params: Tree,
    factors: Tree | None,
    prefix: Prefix | None,
    slots: Slots,
    arrivals: Arrivals,
    targets: jax.Array,
    *,
    architecture: Architecture,
    scale: float,
) -> tuple[Slots, jax.Array]:
    """Arriving prompts take their slots; targets: [R, J] int32. Returns the slots, and [R, J] f32
    log-probabilities.
    """
    slots, x = fill_slots(params, adapter_of(factors, scale), prefix, slots, arrivals, architecture)
    return slots, _log_probabilities(params, x, targets, architecture)


@functools.partial(jax.jit, static_argnames=("architecture", "scale"), donate_argnames="slots")
def read_nodes(
    params: Tree,
    factors: Tree | None,
    prefix: Prefix | None,
    slots: Slots,
    reading: Reading,
    column: jax.Array,
    *,
    architecture: Architecture,
    scale: float,
) -> tuple[Slots, jax.Array]:
    """Reads a node in every slot. Returns the slots, and [S, J] f32 log-probabilities of its
    targets.
    """
    nodes = reading.tokens, reading.depths, reading.seen, column
    slots, x = step_slots(params, adapter_of(factors, scale), prefix, slots, *nodes, architecture)
    return slots, _log_probabilities(params, x, reading.targets, architecture)


def _log_probabilities(
    params: Tree, x: jax.Array, targets: jax.Array, architecture: Architecture
) -> jax.Array:
    """[S, D], [S, J] -> [S, J]. The log-sum-exp is at least the largest logit, so none is above
    0.
    """
    logits = head(params, x, architecture)
    return jnp.take_along_axis(logits, targets, axis=-1) - jax.nn.logsumexp(
        logits, axis=-1, keepdims=True
    )
