"""Cached answers of a frontier model in one form, and the exact ways to say which example an answer belongs to."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

POSITION = "position"
SAME_ANSWER = "same answer"


@dataclass(frozen=True, slots=True)
class Answer:
    """One cached answer; it belongs to `example_id`, or to every example whose prompt has `prompt_hash`.

    `gold` is the gold label as the cache spells it. What a cache does not state is empty.
    """

    label: str
    gold: str
    example_id: str = ""
    prompt_hash: str = ""
    dataset: str = ""
    model: str = ""
    gen_type: str = ""
    prompt_shot: str = ""


@dataclass(frozen=True)
class Cache:
    """The answers that can be compared, and an account of those that cannot.

    `leftover` maps a reason to the cached items it applies to, `uncovered` the id of an example
    to the reason why it has no answer; `notes` are sentences for the reader of a comparison.
    """

    place: str
    answers: tuple[Answer, ...]
    leftover: dict[str, tuple[str, ...]] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def squash(text: str) -> str:
    """Letters and digits of `text` in lower case: what stays when spacing and punctuation differ."""
    return re.sub(r"[\W_]+", "", text.lower()) or text.strip()


def join_cached(
    ours: Sequence[Sequence[Hashable]],
    cached: Sequence[Sequence[Hashable]],
    answers: Sequence[Hashable],
    agree: Callable[[int, int], bool],
) -> dict[int, tuple[int, str]]:
    """Which cached item each of ours is, by evidence only.

    1. `key k`: the k-th key of the item occurs once among ours and once in the cache. Later keys
       are looser (normalised) and tried on what the earlier ones left.
    2. `position`: both sides have the same number of items, `agree` holds for item i of ours and
       item i of the cache for *every* i, and every join of step 1 was one of i to i. Then the two
       lists are one list, and what is left (items with the same key) is joined i to i.
    3. `same answer`: where step 2 has no proof. At least as many cached items as ours have the
       key, and all of them carry the same answer: whichever is the right one, the answer is known.

    Args:
      ours, cached: keys of each item, from exact to loose.
      answers: the answer of each cached item.
      agree: whether item i of ours can be item j of the cache.

    Returns index of ours -> (index of the cached item, how it was joined). The rest has no proof.
    """
    found: dict[int, tuple[int, str]] = {}
    taken: set[int] = set()
    levels = len(ours[0]) if ours else 0
    for level in range(levels):
        for mine, theirs in _groups(ours, cached, level, found, taken):
            if len(mine) == len(theirs) == 1:
                found[mine[0]] = theirs[0], f"key {level + 1}"
        taken = {item for item, _ in found.values()}
    aligned = len(ours) == len(cached) and all(agree(i, i) for i in range(len(ours))) and all(i == j for i, (j, _) in found.items())
    if aligned:
        return {i: found.get(i, (i, POSITION)) for i in range(len(ours))}
    for level in range(levels):
        for mine, theirs in _groups(ours, cached, level, found, taken):
            if mine and len(theirs) >= len(mine) and len({answers[j] for j in theirs}) == 1:
                found.update({i: (j, SAME_ANSWER) for i, j in zip(mine, theirs, strict=False)})
        taken = {item for item, _ in found.values()}
    return found


def how_joined(found: dict[int, tuple[int, str]]) -> Counter[str]:
    """How many items were joined in each way."""
    return Counter(how for _, how in found.values())


def _groups(ours, cached, level, found, taken) -> list[tuple[list[int], list[int]]]:
    groups: dict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, rows, done in ((0, ours, found), (1, cached, taken)):
        for index, keys in enumerate(rows):
            if index not in done:
                groups[keys[level]][side].append(index)
    return list(groups.values())
