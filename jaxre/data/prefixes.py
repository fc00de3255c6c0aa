"""Common prefixes of examples: computed once for a token set, then grouped for a plan.

Examples are sorted by their prompts, so the common prefix of any two is the shortest among the
neighbours between them. One number per pair of neighbours is therefore enough (longest common
prefixes of a suffix array: Manber & Myers 1990).

Only prompt tokens are shared; every example has its own answer tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxre.data.tokens import TokenSet

# Rows of tokens that a group needs at least, because the last row of each group is not full.
GROUP_ROWS = 8
# Common tokens that are worth placing examples in one row for. With fewer, a row stays a random
# sample: on SemEval (25 common tokens of 92), also grouping sentences with the same first words
# would save 4% of the tokens.
WORTH = 8
COMPARED = 32  # tokens of a pair of prompts compared at a time
AT_ONCE = 4_000_000  # tokens compared or digested at a time, of 8 bytes in a few arrays
# Attention to this many keys costs as much as the rest of a token's layers: 3,072 in SmolLM2-135M,
# 8,300 in Qwen2.5-0.5B.
KEYS_A_TOKEN = 4096


@dataclass(frozen=True)
class Prefixes:
    """Common prefixes of the n examples of a token set, and the dropout mask of each token.

    order: [n] int64, the examples sorted by their prompt's tokens; rank: its inverse.
    least: [levels, n] int32, `least[k, r]` is the smallest number of tokens that neighbours in that
      order share, over the 2^k pairs of neighbours from (r - 1, r) on.
    owners: [total tokens] uint32, key of a token's dropout mask: the digest of the tokens up to it
      if another example begins with the same tokens, else the digest of the example's id. It does
      not depend on what a plan shares.
    """

    order: np.ndarray
    rank: np.ndarray
    least: np.ndarray
    owners: np.ndarray | None

    @classmethod
    def of(cls, order: np.ndarray, neighbours: np.ndarray, owners: np.ndarray | None) -> Prefixes:
        """neighbours: [n] int32, tokens that the example of rank r shares with that of rank r - 1;
        0 for the first.
        """
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        least = [neighbours]
        while 1 << len(least) < len(order):
            half = 1 << (len(least) - 1)
            least.append(
                np.minimum(least[-1], np.concatenate([least[-1][half:], np.zeros(half, np.int32)]))
            )
        return cls(order, rank, np.stack(least), owners)

    @classmethod
    def nothing(cls, examples: int, owners: np.ndarray | None = None) -> Prefixes:
        """Nothing shared."""
        return cls.of(np.arange(examples), np.zeros(examples, np.int32), owners)

    def unshared(self) -> Prefixes:
        """The same owners, and nothing shared."""
        return Prefixes.nothing(len(self.order), self.owners)

    @property
    def neighbours(self) -> np.ndarray:
        return self.least[0]

    def common(self, some: np.ndarray, others: np.ndarray) -> np.ndarray:
        """[m] int64 leading tokens that examples `some` [m] share with `others` [m]; the two
        examples of each pair must differ.
        """
        ranks = self.rank[some], self.rank[others]
        first, last = np.minimum(*ranks) + 1, np.maximum(*ranks)
        level = np.frexp(last - first + 1)[1] - 1  # 2^level <= pairs of neighbours < 2^(level + 1)
        return np.minimum(
            self.least[level, first], self.least[level, last - (1 << level) + 1]
        ).astype(np.int64)

    def along(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The members of all rows, the row of each, and the number of leading tokens it shares with
        the member before it in its row (0 for the first).
        """
        sizes = np.fromiter(map(len, rows), np.int64, len(rows))
        members = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(sizes.sum()))
        row = np.repeat(np.arange(len(rows)), sizes)
        shared = np.zeros(len(members), np.int64)
        later = np.flatnonzero(row[1:] == row[:-1]) + 1
        shared[later] = self.common(members[later - 1], members[later])
        return members, row, shared


@dataclass(frozen=True)
class Group:
    """Examples that may be in one row: they share `prefix` tokens, and those of a bundle more.

    bundles: the examples of each, by rank.
    lengths, supervised: [bundles] int64 tokens beyond the prefix, and supervised tokens.
    """

    prefix: int
    bundles: list[list[int]]
    lengths: np.ndarray
    supervised: np.ndarray


def find_prefixes(tokens: TokenSet) -> Prefixes:
    """Sorts the examples and compares neighbours.

    Examples for classification share nothing: an encoder's token sees its whole example.
    """
    n = len(tokens)
    owners = np.repeat(tokens.owners, tokens.lengths)
    if tokens.labels is not None:
        return Prefixes.nothing(n, owners)
    # Big-endian words sort like their bytes.
    words = memoryview(tokens.tokens.astype(">u4").tobytes())
    starts = (4 * tokens.starts[:-1]).tolist()
    ends = (4 * (tokens.starts[:-1] + tokens.prompt_lengths)).tolist()
    keys = [bytes(words[start:end]) for start, end in zip(starts, ends, strict=True)]
    order = np.array(sorted(range(n), key=keys.__getitem__), np.int64)
    neighbours = np.zeros(n, np.int32)
    for pairs in np.array_split(np.arange(1, n), max(1, n * COMPARED // AT_ONCE)):
        neighbours[pairs] = _common_prefix(tokens, order[pairs - 1], order[pairs])
    prefixes = Prefixes.of(order, neighbours, owners)
    shareable = np.maximum(neighbours, np.append(neighbours, np.int32(0))[1:])[prefixes.rank]
    for some in np.array_split(np.arange(n), max(1, int(shareable.sum()) // AT_ONCE)):
        counts = shareable[some].astype(np.int64)
        positions = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        index = np.repeat(tokens.starts[some], counts) + positions
        owners[index] = digests(tokens.tokens[index], positions)
    return prefixes


def _common_prefix(tokens: TokenSet, some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[m] int64 leading tokens that the prompts of examples `some` [m] and `others` [m] share."""
    most = np.minimum(tokens.prompt_lengths[some], tokens.prompt_lengths[others]).astype(np.int64)
    common = np.zeros(len(some), np.int64)
    open_pairs, depth = np.arange(len(some)), 0
    while len(open_pairs):
        positions = depth + np.arange(COMPARED)
        # An index past the last token may be clipped: it is beyond `most`.
        a, b = (
            tokens.tokens[
                np.minimum(
                    tokens.starts[examples[open_pairs], None] + positions, len(tokens.tokens) - 1
                )
            ]
            for examples in (some, others)
        )
        same = (a == b) & (positions < most[open_pairs, None])
        all_same = same.all(axis=1)
        common[open_pairs] = depth + np.where(all_same, COMPARED, same.argmin(axis=1))
        open_pairs, depth = open_pairs[all_same], depth + COMPARED
    return common


def digests(tokens: np.ndarray, place: np.ndarray) -> np.ndarray:
    """[m] int32 tokens -> [m] uint32, the digest of each token's sequence up to it: the sum of the
    hashes of token and position.

    The hash is SplitMix64's finaliser (Steele, Lea & Flood 2014).

    Args:
      place: [m] int64 position of each token in its sequence, from 0; sequences are concatenated.
    """
    word = tokens.astype(np.uint64) << np.uint64(32) | (place + 1).astype(np.uint64)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    sums = np.cumsum(word, dtype=np.uint64)
    first = np.flatnonzero(place == 0)
    # Sums may overflow; their differences are still right.
    before = np.repeat((sums - word)[first], np.diff(first, append=len(place)))
    return ((sums - before) >> np.uint64(32)).astype(np.uint32)


def group_examples(
    prefixes: Prefixes, lengths: np.ndarray, supervised: np.ndarray, row_length: int, bundled: bool
) -> tuple[list[Group], Prefixes]:
    """Groups examples that share rows, and reduces the prefixes to what is to be shared.

    A group is a subtree of the examples' prefix tree that fills rows of its own. A bundle is a run
    of its examples that share much more than the group, such as pairs of one sentence. On CoNLL04
    with the plain sentence first, groups alone leave 77% of the tokens, bundles 36%. Every member
    of a bundle sees its shared tokens, so a bundle longer than the longest example widens the span
    of attention for all tokens; such bundles are made only if they save enough tokens.

    Args:
      lengths, supervised: [n] tokens and supervised tokens of each example.
      bundled: makes bundles; otherwise each example is alone.
    """
    subtrees = _subtrees(prefixes, lengths, row_length)
    longest = max(int(lengths[members].max()) - depth for depth, members in subtrees)

    def grouped(limit: int) -> list[Group]:
        return [
            _bundle(prefixes, lengths, supervised, depth, members, min(limit, row_length - depth))
            for depth, members in subtrees
        ]

    def cost(groups: list[Group]) -> float:
        tokens = sum(
            int(group.lengths.sum()) * row_length / (row_length - group.prefix) for group in groups
        )
        span = max(int(group.lengths.max()) for group in groups)
        deepest = max(group.prefix for group in groups)
        return tokens * (1 + (deepest + span) / KEYS_A_TOKEN)

    groups = min(map(grouped, (longest, row_length) if bundled else (0,)), key=cost)
    neighbours = prefixes.neighbours.copy()
    for group in groups:
        first = prefixes.rank[[bundle[0] for bundle in group.bundles[1:]]]
        neighbours[first] = np.minimum(neighbours[first], group.prefix)
    return groups, Prefixes.of(prefixes.order, neighbours, prefixes.owners)


def _subtrees(
    prefixes: Prefixes, lengths: np.ndarray, row_length: int
) -> list[tuple[int, np.ndarray]]:
    """For each group, the number of tokens that all of its examples share, and the examples by
    rank.
    """
    neighbours, n = prefixes.neighbours, len(lengths)
    before = np.concatenate([[0], np.cumsum(lengths[prefixes.order])])
    depths = [int(neighbours[1:].min()) if n > 1 else 0]
    group = np.zeros(n, np.int64)
    sizes, open_nodes = [n], [(0, n, 0)]
    while open_nodes:
        first, last, number = open_nodes.pop()
        group[first:last] = number
        inner = neighbours[first + 1 : last]
        depth = int(inner.min()) if len(inner) else 0
        bounds = np.concatenate([[first], first + 1 + np.flatnonzero(inner == depth), [last]])
        beyond = before[bounds[1:]] - before[bounds[:-1]] - depth * np.diff(bounds)
        for child in np.flatnonzero(beyond >= GROUP_ROWS * (row_length - depth)).tolist():
            low, high = int(bounds[child]), int(bounds[child + 1])
            deeper = int(neighbours[low + 1 : high].min()) if high - low > 1 else 0
            if deeper <= depth:
                continue
            if deeper - depths[number] >= WORTH or 2 * (high - low) > sizes[number]:
                open_nodes.append((low, high, len(depths)))
                depths.append(deeper)
                sizes.append(high - low)
            else:
                open_nodes.append((low, high, number))
    members = [prefixes.order[group == number] for number in range(len(depths))]
    return [pair for pair in zip(depths, members, strict=True) if len(pair[1])]


def _bundle(
    prefixes: Prefixes,
    lengths: np.ndarray,
    supervised: np.ndarray,
    depth: int,
    members: np.ndarray,
    limit: int,
) -> Group:
    """A group whose bundles have at most `limit` tokens, or one example."""
    shared = np.concatenate([[depth], prefixes.common(members[:-1], members[1:])])
    joins, alone = shared - depth >= WORTH, lengths[members].astype(np.int64) - depth
    own = np.where(joins, alone + depth - shared, alone)
    starts, load = [], limit
    tokens = zip(joins.tolist(), own.tolist(), alone.tolist(), strict=True)
    for number, (join, own_tokens, all_tokens) in enumerate(tokens):
        load += own_tokens
        if not join or load > limit:
            starts.append(number)
            load = all_tokens
    own[starts] = alone[starts]
    examples = members.tolist()
    bundles = [examples[start:end] for start, end in itertools.pairwise([*starts, len(examples)])]
    targets = np.minimum(supervised[members], own)
    return Group(depth, bundles, np.add.reduceat(own, starts), np.add.reduceat(targets, starts))
