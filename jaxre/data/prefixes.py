"""Which examples begin alike: found by comparing their tokens, once for a token set, then decided
for a plan.

Sorted by their prompts, examples that begin alike stand side by side, and what two of them have in
common is the least that neighbours between them have in common. So one number per pair of
neighbours tells what any two share (longest common prefixes of a suffix array: Manber & Myers
1990).

Only tokens of prompts are shared: an answer stands once for each example, whatever others answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxre.data.tokens import TokenSet

# A group needs as many rows of tokens: each group ends with a row that is not full.
GROUP_ROWS = 8
# Fewer tokens in common than these do not bring examples together in a row, so that it stays a
# random sample. On SemEval (25 tokens in common of 92) rows of sentences with the same first words
# too would hold 4% fewer tokens.
WORTH = 8
COMPARED = 32  # tokens of a pair of prompts at a time
AT_ONCE = 4_000_000  # tokens that are compared or digested at a time, of 8 bytes in a few arrays
# Attention to so many keys costs as much as the rest of a token's layers: 3,072 in SmolLM2-135M,
# 8,300 in Qwen2.5-0.5B.
KEYS_A_TOKEN = 4096


@dataclass(frozen=True)
class Prefixes:
    """What the n examples of a token set share in a row, and whose dropout their tokens follow.

    order: [n] int64, the examples sorted by their prompt's tokens; rank: its inverse.
    least: [levels, n] int32, `least[k, r]` is the least number of tokens that neighbours in that
    order have in common, over the 2^k pairs of neighbours from (r - 1, r) on.
    owners: [total tokens] uint32, whose dropout mask a token follows: the digest of the tokens up
    to it where another example begins with the same, else the digest of the example's id. It does
    not hang on what a plan shares.
    """

    order: np.ndarray
    rank: np.ndarray
    least: np.ndarray
    owners: np.ndarray | None

    @classmethod
    def of(cls, order: np.ndarray, neighbours: np.ndarray, owners: np.ndarray | None) -> Prefixes:
        """neighbours: [n] int32, what the example of rank r has in common with that of rank r - 1;
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
        """[m] int64 leading tokens that examples `some` [m] share with `others` [m], all of them
        different from those.
        """
        ranks = self.rank[some], self.rank[others]
        first, last = np.minimum(*ranks) + 1, np.maximum(*ranks)
        level = np.frexp(last - first + 1)[1] - 1  # 2^level <= pairs of neighbours < 2^(level + 1)
        return np.minimum(
            self.least[level, first], self.least[level, last - (1 << level) + 1]
        ).astype(np.int64)

    def along(self, rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The members of all rows, the row of each, and how many leading tokens it shares with the
        one before it (the first: 0).
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
    """Examples that a row may hold together: they share `prefix` tokens, and those of a bundle
    more.

    bundles: the examples of each, by rank. lengths, supervised: [bundles] int64 tokens beyond the
    prefix, and supervised ones.
    """

    prefix: int
    bundles: list[list[int]]
    lengths: np.ndarray
    supervised: np.ndarray


def find_prefixes(tokens: TokenSet) -> Prefixes:
    """Sorts the examples and compares neighbours.

    Examples to classify share nothing: an encoder's token sees all of its example.
    """
    n = len(tokens)
    owners = np.repeat(tokens.owners, tokens.lengths)
    if tokens.labels is not None:
        return Prefixes.nothing(n, owners)
    # Words with the high byte first sort as bytes do.
    words = memoryview(tokens.tokens.astype(">u4").tobytes())
    bounds = zip(
        (4 * tokens.starts).tolist(),
        (4 * (tokens.starts[:-1] + tokens.prompt_lengths)).tolist(),
        strict=False,
    )
    keys = [bytes(words[start:end]) for start, end in bounds]
    order = np.array(sorted(range(n), key=keys.__getitem__), np.int64)
    neighbours = np.zeros(n, np.int32)
    for pairs in np.array_split(np.arange(1, n), max(1, n * COMPARED // AT_ONCE)):
        neighbours[pairs] = _in_common(tokens, order[pairs - 1], order[pairs])
    found = Prefixes.of(order, neighbours, owners)
    shareable = (
        np.maximum(neighbours, np.append(neighbours[1:], 0).astype(np.int32))[found.rank]
        if n
        else neighbours
    )
    for some in np.array_split(np.arange(n), max(1, int(shareable.sum()) // AT_ONCE)):
        counts = shareable[some].astype(np.int64)
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        index = np.repeat(tokens.starts[some], counts) + place
        owners[index] = digests(tokens.tokens[index], place)
    return found


def _in_common(tokens: TokenSet, some: np.ndarray, others: np.ndarray) -> np.ndarray:
    """[m] int64 leading tokens that the prompts of examples `some` [m] and `others` [m] have in
    common.
    """
    most = np.minimum(tokens.prompt_lengths[some], tokens.prompt_lengths[others]).astype(np.int64)
    common = np.zeros(len(some), np.int64)
    alike, depth = np.arange(len(some)), 0
    while len(alike):
        place = depth + np.arange(COMPARED)
        # Behind the last token of all anything will do: it is beyond `most`.
        one, other = (
            tokens.tokens[
                np.minimum(tokens.starts[chosen[alike], None] + place, len(tokens.tokens) - 1)
            ]
            for chosen in (some, others)
        )
        same = (one == other) & (place < most[alike, None])
        whole = same.all(axis=1)
        common[alike] = depth + np.where(whole, COMPARED, same.argmin(axis=1))
        alike, depth = alike[whole], depth + COMPARED
    return common


def digests(tokens: np.ndarray, place: np.ndarray) -> np.ndarray:
    """[m] int32 tokens -> [m] uint32, each the digest of its stretch up to it: sums of their hashes
    by place.

    The hash is SplitMix64's finaliser (Steele, Lea & Flood 2014) of token and place.

    Args:
      place: [m] int64 of each token in its stretch, from 0; stretches stand side by side.
    """
    word = tokens.astype(np.uint64) << np.uint64(32) | (place + 1).astype(np.uint64)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    sums = np.cumsum(word, dtype=np.uint64)
    first = np.flatnonzero(place == 0)
    # whatever overflowed, the difference is right
    before = np.repeat((sums - word)[first], np.diff(first, append=len(place)))
    return ((sums - before) >> np.uint64(32)).astype(np.uint32)


def group_examples(
    prefixes: Prefixes, lengths: np.ndarray, supervised: np.ndarray, row_length: int, bundled: bool
) -> tuple[list[Group], Prefixes]:
    """The groups whose examples share rows, and the prefixes with nothing in common but what is to
    be shared.

    A group is a subtree of the examples' prefix tree that fills rows of its own. A bundle is a run
    of its examples with much more in common than the group, such as pairs of one sentence; on
    CoNLL04 with the plain sentence first the groups alone leave 77% of the tokens, bundles 36%. A
    bundle's shared tokens are seen from all of it, so a bundle longer than the longest example
    widens what every token must look at; those are made where the saved tokens are worth it.

    Args:
      lengths, supervised: [n] tokens and supervised tokens of each example.
      bundled: whether to make bundles at all.
    """
    depths, members = _subtrees(prefixes, lengths, row_length)
    longest = max(
        int(lengths[chosen].max()) - depth for depth, chosen in zip(depths, members, strict=True)
    )
    plans = []
    for limit in (longest, row_length) if bundled else (0,):
        groups = [
            _bundle(prefixes, lengths, supervised, depth, chosen, min(limit, row_length - depth))
            for depth, chosen in zip(depths, members, strict=True)
        ]
        room = sum(
            int(group.lengths.sum()) * row_length / (row_length - group.prefix) for group in groups
        )
        span = max(int(group.lengths.max()) for group in groups)
        plans.append((room * (1 + (max(depths) + span) / KEYS_A_TOKEN), groups))
    groups = min(plans, key=lambda plan: plan[0])[1]
    neighbours = prefixes.neighbours.copy()
    for group in groups:
        apart = prefixes.rank[[bundle[0] for bundle in group.bundles[1:]]]
        neighbours[apart] = np.minimum(neighbours[apart], group.prefix)
    return groups, Prefixes.of(prefixes.order, neighbours, prefixes.owners)


def _subtrees(
    prefixes: Prefixes, lengths: np.ndarray, row_length: int
) -> tuple[list[int], list[np.ndarray]]:
    """Of each group the tokens that all of it have in common, and its examples by rank."""
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
    kept = [number for number, chosen in enumerate(members) if len(chosen)]
    return [depths[number] for number in kept], [members[number] for number in kept]


def _bundle(
    prefixes: Prefixes,
    lengths: np.ndarray,
    supervised: np.ndarray,
    depth: int,
    members: np.ndarray,
    limit: int,
) -> Group:
    """A group whose bundles hold at most `limit` tokens, or one example."""
    shared = (
        np.concatenate([[depth], prefixes.common(members[:-1], members[1:])])
        if len(members)
        else members
    )
    joins, whole = shared - depth >= WORTH, lengths[members].astype(np.int64) - depth
    own = np.where(joins, whole + depth - shared, whole)
    starts, load = [], limit
    for number, (joined, more, alone) in enumerate(
        zip(joins.tolist(), own.tolist(), whole.tolist(), strict=True)
    ):
        load += more
        if not joined or load > limit:
            starts.append(number)
            load = alone
    own[starts] = whole[starts]
    listed = members.tolist()
    bundles = [listed[start:end] for start, end in itertools.pairwise([*starts, len(listed)])]
    loads, targets = (
        np.add.reduceat(one, starts) for one in (own, np.minimum(supervised[members], own))
    )
    return Group(depth, bundles, loads, targets)
