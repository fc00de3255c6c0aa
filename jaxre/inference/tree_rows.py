"""The packing plan of scoring (the row and batch of each example's tree) and the arrays of a step.

Letters: B rows, T tokens in a row, S predicting positions in a row, W targets of a position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import NamedSharding
from jaxre_kernels.attention import blocks_of

from jaxre.data.packing import pack_rows
from jaxre.errors import InputError
from jaxre.inference.prefix import Group, check_prompts, shared_prefixes
from jaxre.inference.trees import Answers, AnswerTree, answer_tree
from jaxre.models.architecture import Architecture
from jaxre.models.sharding import row_shards
from jaxre.models.weights import parameter_count

ROW_MULTIPLE = 128
# Rows up to this length are tried when they pack better than the shortest that fits.
PREFERRED_ROW = 512


class TreeRows(NamedTuple):
    """One batch of packed trees.

    tokens, positions, visible_until: [B, T] int32, as in `jaxre.data.rows.Rows`.
    supervised: [B, S] int32 row positions; targets: [B, S, W] int32, the tokens scored at
    each.
    """

    tokens: np.ndarray
    positions: np.ndarray
    visible_until: np.ndarray
    supervised: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class ScoringPlan:
    """The assignment of examples to rows and batches, all of one shape [B, T], [B, S, W].

    batches[n][b] lists the examples of row b of batch n; missing rows are all pad. All of them
    belong to group owners[n], whose prefix takes no place in the row. span: the longest example in
    a row.
    """

    prompts: Sequence[Sequence[int]]
    trees: tuple[AnswerTree, ...]
    groups: tuple[Group, ...]
    batches: tuple[tuple[tuple[int, ...], ...], ...]
    owners: tuple[int, ...]
    span: int
    rows: int
    length: int
    supervised: int
    targets: int
    sharding: NamedSharding | None = None

    @property
    def pad_share(self) -> float:
        """Share of the places in all rows that hold no token."""
        return 1 - int(_sizes(self.prompts, self.trees, self.groups).sum()) / (
            len(self.batches) * self.rows * self.length
        )

    def __str__(self) -> str:
        shared = ", ".join(str(len(group.tokens)) for group in self.groups if group.tokens) or "no"
        return (
            f"{len(self.prompts)} examples in {len(self.batches)} batches of {self.rows} rows x"
            f" {self.length} tokens, {self.supervised} predicting positions a row,"
            f" {self.pad_share:.1%} pad, {shared} shared tokens, one compiled shape"
        )


def plan_scoring(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answers],
    architecture: Architecture,
    *,
    batch_tokens: int = 8192,
    sharding: NamedSharding | None = None,
    names: Sequence[str] | None = None,
) -> ScoringPlan:
    """Packs the trees of all examples, best fit, into batches of one shape. A plan can be run again
    and again.

    Args:
      sharding: of [B, ...] arrays over a mesh, if the weights are on one; B is a multiple of the
        devices that share the rows.
      names: of the examples, for messages; their numbers if not given.

    Raises:
      InputError: as `score_labels`.
    """
    check_prompts(prompts, names)
    trees = trees_of(answers)
    groups = shared_prefixes(prompts, batch_tokens)
    check_lengths(prompts, trees, groups, architecture, batch_tokens, names)
    sizes = _sizes(prompts, trees, groups)
    places = np.array([len(tree.targets) for tree in trees])
    length, packed = _choose_rows(sizes, places, groups, architecture, batch_tokens)
    most = max(map(len, packed))
    count = -(-most // max(1, batch_tokens // length))  # batches of the group with most rows
    shards = 1 if sharding is None else row_shards(sharding.mesh)
    rows = _round_up(-(-most // count), shards)
    batches = [
        (number, tuple(part[start : start + rows]))
        for number, part in enumerate(packed)
        for start in range(0, len(part), rows)
    ]
    return ScoringPlan(
        prompts=prompts,
        trees=tuple(trees),
        groups=groups,
        batches=tuple(batch for _, batch in batches),
        owners=tuple(number for number, _ in batches),
        span=int(sizes.max()),
        rows=rows,
        length=length,
        supervised=_round_up(
            max(int(places[list(row)].sum()) for part in packed for row in part), 8
        ),
        targets=max(tree.targets.shape[1] for tree in trees),
        sharding=sharding,
    )


def trees_of(answers: Sequence[Answers]) -> list[AnswerTree]:
    """The tree of each example; examples with equal answers have one tree."""
    known: dict[tuple, AnswerTree] = {}
    trees = []
    for labels in answers:
        key = tuple(map(tuple, labels))
        if key not in known:
            known[key] = answer_tree(key)
        trees.append(known[key])
    return trees


def fill_trees(plan: ScoringPlan, number: int) -> TreeRows:
    """The rows of batch `number`."""
    depth = len(plan.groups[plan.owners[number]].tokens)
    B, T, S, W = plan.rows, plan.length, plan.supervised, plan.targets
    tokens, positions, supervised = (
        np.zeros((B, T), np.int32),
        np.zeros((B, T), np.int32),
        np.zeros((B, S), np.int32),
    )
    visible_until = np.broadcast_to(np.arange(1, T + 1, dtype=np.int32), (B, T)).copy()
    targets = np.zeros((B, S, W), np.int32)
    for b, row in enumerate(plan.batches[number]):
        start = first = 0
        for example in row:
            prompt, tree = plan.prompts[example], plan.trees[example]
            branch = start + len(prompt) - depth
            end = branch + len(tree.tokens)
            tokens[b, start:branch] = prompt[depth:]
            tokens[b, branch:end] = tree.tokens
            positions[b, start:branch] = np.arange(depth, len(prompt))
            positions[b, branch:end] = len(prompt) + tree.depths
            visible_until[b, start:branch] = end
            visible_until[b, branch:end] = branch + tree.until
            places, width = tree.targets.shape
            # The prompt's last token and every node predict: one stretch.
            supervised[b, first : first + places] = np.arange(branch - 1, end)
            targets[b, first : first + places, :width] = tree.targets
            start, first = end, first + places
    return TreeRows(tokens, positions, visible_until, supervised, targets)


def _choose_rows(
    sizes: np.ndarray,
    places: np.ndarray,
    groups: Sequence[Group],
    architecture: Architecture,
    batch_tokens: int,
) -> tuple[int, list[list[tuple[int, ...]]]]:
    """The row length with the least work, and the examples of each row of each group.

    Work of a row of T: 2 x T x body parameters + 4 x T x near x H x C x L (scores and context of
    the keys that a block looks at).
    """
    shortest = min(_round_up(int(sizes.max()), ROW_MULTIPLE), batch_tokens)
    body = (
        parameter_count(architecture)
        - (2 - architecture.tied_head) * architecture.vocabulary * architecture.embedding
    )
    attention = architecture.size("HC") * architecture.layers
    members = [np.array(group.members) for group in groups]
    best = None
    for length in range(
        shortest, max(shortest, min(PREFERRED_ROW, batch_tokens)) + 1, ROW_MULTIPLE
    ):
        packed = [
            [
                tuple(some[list(row)].tolist())
                for row in pack_rows(sizes[some], places[some], np.arange(len(some)), length)
            ]
            for some in members
        ]
        blocks = blocks_of(length, span=int(sizes.max()))
        near = blocks.back + blocks.queries
        work = sum(map(len, packed)) * length * (2 * body + 4 * near * attention)
        if best is None or work < best[0]:
            best = work, length, packed
    return best[1], best[2]


def check_lengths(
    prompts: Sequence[Sequence[int]],
    trees: Sequence[AnswerTree],
    groups: Sequence[Group],
    architecture: Architecture,
    batch_tokens: int,
    names: Sequence[str] | None,
) -> None:
    """Raises InputError for an example that is longer than the model reads, or whose own tokens and
    labels are more than a batch.
    """
    sizes = _sizes(prompts, trees, groups).tolist()
    for number, (prompt, tree, size) in enumerate(zip(prompts, trees, sizes, strict=True)):
        name = names[number] if names else number
        longest = len(prompt) + tree.valid.shape[1]
        if longest > architecture.max_length:
            raise InputError(
                f"example {name}: prompt and longest label take {longest} tokens, the model reads"
                f" {architecture.max_length}; shorten it"
            )
        if size > batch_tokens:
            raise InputError(
                f"example {name}: prompt and labels take {size} tokens, a batch has {batch_tokens};"
                " raise predict.batch_tokens"
            )
        if len(tree.valid) != len(trees[0].valid):
            raise ValueError(
                f"example {name} has {len(tree.valid)} labels, the first one {len(trees[0].valid)}"
            )


def _sizes(
    prompts: Sequence[Sequence[int]], trees: Sequence[AnswerTree], groups: Sequence[Group]
) -> np.ndarray:
    """[n] places of each example in a row: its own tokens and its labels'."""
    sizes = np.array(
        [len(prompt) + len(tree.tokens) for prompt, tree in zip(prompts, trees, strict=True)]
    )
    for group in groups:
        sizes[list(group.members)] -= len(group.tokens)
    return sizes


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
