"""Best-first search over the tree of labels: the best label of each example, or every label more
probable than a threshold.

    best, scores = best_labels(model, prompts, answers)
        # [n] label numbers, [n] their log-probabilities
    scores, exact = labels_above(model, prompts, answers, 0.01)
        # [n, labels] log-probabilities, exact or upper bounds

A log-probability only falls along a path (here too: a logit minus a log-sum-exp that is at least as
large, added up in f64), so the score of a node bounds those of all labels below it. Each batched
step (`slots.py`) reads the open node with the highest score of every example, until a label beats
all open nodes: no other label can then have a higher score. With a threshold, nodes whose score
exceeds it are read too; every label is then exact, or bounded by the open node above it. Of labels
with equal scores the first of the schema is the best, as in `argmax`: of nodes with equal scores
the one with the first label below it is read first.

An example reads a node at most once, and at most COLUMNS of them. If that is not enough, its labels
lie close together, and all of them are scored (`scoring.py`), which is exact too.

Letters: S slots, R arriving prompts, W columns of nodes, J targets of a node, N nodes, V
vocabulary.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxre.errors import InputError
from jaxre.inference.model import Model, adapter_of, on_device
from jaxre.inference.prefix import check_prompts, own_tokens, prefixes_of, shared_prefixes
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
from jaxre.models.decoder import Prefix, Tree, head

COLUMNS = 64

Result = TypeVar("Result")


class Best(NamedTuple):
    """The label with the highest score, and that score."""

    label: int
    score: float


class Bounded(NamedTuple):
    """scores: [labels] f64 log-probabilities, upper bounds of them where `exact` [labels] is
    false.
    """

    scores: np.ndarray
    exact: np.ndarray


@dataclass(frozen=True)
class Branches:
    """A label tree as the search walks it. Row 0 is the end of the prompt, row n + 1 is node n, as
    in `AnswerTree.targets`.

    after: for each row and target, (the next row or -1, the label that ends there or -1).
    first: for each row, the first label of the schema below it. parents: the row before each.
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
    """The search of one example.

    above: log-probability; nodes with a higher score are read even after the best label is known.
    open: heap of (minus the score, first label below, row). labels: log-probabilities of the labels
    reached. columns: where each row that was read is stored.
    """

    example: int
    name: str | int
    branches: Branches
    above: float = math.inf
    open: list[tuple[float, int, int]] = field(default_factory=list)
    labels: dict[int, float] = field(default_factory=dict)
    best: tuple[float, int] = (math.inf, -1)  # minus the score, the label
    columns: dict[int, int] = field(default_factory=dict)

    def read(self, row: int, score: float, log_probabilities: np.ndarray) -> None:
        """Opens the nodes after a row with this score; log_probabilities: [J] of its targets.
        Raises InputError for NaN.
        """
        for (lead, label), log_probability in zip(
            self.branches.after[row], log_probabilities.tolist(), strict=False
        ):
            if log_probability != log_probability:
                raise InputError(no_number(self.name))
            reached = score + log_probability
            if label >= 0:
                self.labels[label] = reached
                self.best = min(self.best, (-reached, label))
            if lead >= 0:
                heapq.heappush(self.open, (-reached, self.branches.first[lead], lead))

    @property
    def done(self) -> bool:
        """Whether the best label is known, and every label above the threshold."""
        if not self.open:
            return True
        minus, first, _ = self.open[0]
        return self.best <= (minus, first) and -minus <= self.above

    def path(self, row: int) -> list[int]:
        """The columns of the rows between the prompt and a row."""
        columns = []
        while (row := self.branches.parents[row]) > 0:
            columns.append(self.columns[row])
        return columns

    def bounded(self) -> Bounded:
        """The score of every label, or that of the open node above it."""
        count = len(self.branches.tree.valid)
        scores, exact = np.zeros(count), np.zeros(count, bool)
        for minus, _, row in self.open:
            below = [row]
            while below:
                for lead, label in self.branches.after[below.pop()]:
                    if label >= 0:
                        scores[label] = -minus
                    if lead >= 0:
                        below.append(lead)
        reached = list(self.labels)
        scores[reached], exact[reached] = list(self.labels.values()), True
        return Bounded(scores, exact)


class Reading(NamedTuple):
    """The nodes that a step reads: tokens, depths [S] int32 and the columns that each sees [S, W]
    bool, as `step_slots` takes them.

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
    on_results: Callable[[dict[int, Best]], None] = lambda results: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The label with the highest score of each example, and that score.

    Args:
      prompts, answers: as those of `score_labels`.
      batch_tokens: about the tokens that all slots hold.
      names: of the examples, for messages; their numbers if not given.
      on_results: called with example -> result for those that have just ended.

    Returns:
      [n] int64 numbers of labels, [n] f64 log-probabilities.

    Raises:
      InputError: as `score_labels`, or a score that is NaN.
    """
    results = _search(
        model,
        prompts,
        answers,
        math.inf,
        lambda search: Best(search.best[1], -search.best[0]),
        lambda scores: Best(int(scores.argmax()), float(scores.max())),
        batch_tokens=batch_tokens,
        names=names,
        on_results=on_results,
    )
    labels, scores = zip(*results, strict=True)
    return np.array(labels, np.int64), np.array(scores)


def labels_above(
    model: Model,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answers],
    probability: float,
    *,
    batch_tokens: int = 8192,
    names: Sequence[str] | None = None,
    on_results: Callable[[dict[int, Bounded]], None] = lambda results: None,
) -> Bounded:
    """The exact score of the best label of each example and of all labels that the model writes
    with a higher probability than given, and proven upper bounds, none above it, for the rest.

    Args:
      probability: between 0 and 1. It is that of writing the label and its end-of-turn token, not
        divided by the sum over the labels: a share of that sum needs the scores of all.
      The others: as those of `best_labels`.

    Returns:
      [n, labels] scores and which of them are exact.

    Raises:
      InputError: as `best_labels`.
    """
    results = _search(
        model,
        prompts,
        answers,
        math.log(probability),
        Search.bounded,
        lambda scores: Bounded(scores, np.ones(len(scores), bool)),
        batch_tokens=batch_tokens,
        names=names,
        on_results=on_results,
    )
    return Bounded(*map(np.stack, zip(*results, strict=True)))


def _search(
    model: Model,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answers],
    above: float,
    of_search: Callable[[Search], Result],
    of_scores: Callable[[np.ndarray], Result],
    *,
    batch_tokens: int,
    names: Sequence[str] | None,
    on_results: Callable[[dict[int, Result]], None],
) -> list[Result]:
    """The result of each example: of its search or, if that read all nodes it may, of the scores
    of all its labels.
    """
    check_prompts(prompts, names)
    trees = trees_of(answers)
    groups = shared_prefixes(prompts, batch_tokens)
    check_lengths(prompts, trees, groups, model.architecture, batch_tokens, names)
    branches = {
        number: Branches.of(tree) for number, tree in {id(tree): tree for tree in trees}.items()
    }
    params, factors = on_device(model)
    results: dict[int, Result] = {}
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

    def begin(example: int) -> Search:
        name = names[example] if names else example
        return Search(example, name, branches[id(trees[example])], above)

    for group, owns, plan, prefix in zip(groups, every, plans, computed, strict=True):
        for ended in _ended(ready, prefix, len(group.tokens), owns, plan, J, begin):
            unsettled += [search.example for search in ended if not search.done]
            fresh = {search.example: of_search(search) for search in ended if search.done}
            results |= fresh
            on_results(fresh)
    if unsettled:
        unsettled.sort()
        plan = plan_scoring(
            [prompts[example] for example in unsettled],
            [answers[example] for example in unsettled],
            model.architecture,
            batch_tokens=batch_tokens,
            names=names and [names[example] for example in unsettled],
        )
        scores = run_scoring(model, plan)
        fresh = dict(zip(unsettled, map(of_scores, scores), strict=True))
        results |= fresh
        on_results(fresh)
    return [results[example] for example in range(len(prompts))]


def _ended(
    model: Model,
    prefix: Prefix | None,
    depth: int,
    owns: Mapping[int, Sequence[int]],
    plan: Sequence[Sizes],
    J: int,
    begin: Callable[[int], Search],
) -> Iterator[list[Search]]:
    """Searches for prompts after one prefix; yields those that are done, or have read as many
    nodes as they may.

    A search begins when its prompt takes a slot and is dropped when it is yielded: its heap can be
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
        active: dict[int, Search] = {}  # of each slot
        step = 0
        while waiting or active:
            free = [slot for slot in range(sizes.slots) if slot not in active]
            if waiting and len(waiting[0]) <= len(free):
                chunk = waiting.popleft()
                begun = [begin(example) for example in chunk]
                active |= dict(zip(free, begun, strict=False))
                roots = [search.branches.tree.targets[0] for search in begun]
                arrivals = arrivals_of(chunk, free, owns, depth, sizes)
                slots, log_probabilities = fill(
                    *weights,
                    slots,
                    arrivals,
                    targets_of(dict(enumerate(roots)), sizes.arrivals, J),
                    **run,
                )
                for search, shares in zip(begun, np.asarray(log_probabilities), strict=False):
                    search.read(0, 0.0, shares)
            else:
                rows = {slot: heapq.heappop(search.open) for slot, search in active.items()}
                column = step % W
                slots, log_probabilities = read_nodes(
                    *weights,
                    slots,
                    reading_of(active, rows, sizes.slots, W, J),
                    np.int32(column),
                    **run,
                )
                log_probabilities = np.asarray(log_probabilities)
                for slot, (minus, _, row) in rows.items():
                    active[slot].columns[row] = column
                    active[slot].read(row, -minus, log_probabilities[slot])
                step += 1
            ended = [
                slot for slot, search in active.items() if search.done or len(search.columns) == W
            ]
            if ended:
                yield [active.pop(slot) for slot in ended]


def no_number(name: str | int) -> str:
    return f"example {name}: the model gives scores that are no numbers (NaN); check its weights"


def targets_of(targets: Mapping[int, np.ndarray], places: int, J: int) -> np.ndarray:
    """Targets of some of the places -> [places, J] int32, filled up with 0."""
    filled = np.zeros((places, J), np.int32)
    for place, one in targets.items():
        filled[place, : len(one)] = one
    return filled


def reading_of(
    active: dict[int, Search], rows: dict[int, tuple[float, int, int]], S: int, W: int, J: int
) -> Reading:
    """The rows taken from the heaps, as arrays."""
    tokens, depths, seen = np.zeros(S, np.int32), np.zeros(S, np.int32), np.zeros((S, W), bool)
    for slot, (_, _, row) in rows.items():
        search, tree = active[slot], active[slot].branches.tree
        tokens[slot], depths[slot] = tree.tokens[row - 1], tree.depths[row - 1]
        seen[slot, search.path(row)] = True
    targets = {slot: active[slot].branches.tree.targets[row] for slot, (_, _, row) in rows.items()}
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
