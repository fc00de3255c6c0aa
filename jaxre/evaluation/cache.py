"""Cached answers of a frontier model in one form, and the exact ways to say which example an answer
belongs to.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from jaxre.evaluation.predictions import Prediction
from jaxre.relations.benchmarks import COPIES
from jaxre.relations.label_map import LabelMap
from jaxre.relations.schema import is_negative, normalise_label

# Below this share of examples with an answer, figures of a cache are not those of its dataset.
ENOUGH = 0.95
DISAGREE = "the cache holds different answers for it"

POSITION = "position"
SAME_ANSWER = "same answer"


@dataclass(frozen=True, slots=True)
class Answer:
    """One cached answer; it belongs to `example_id`, or to every example whose prompt has
    `prompt_hash`.

    `gold` is the gold label as the cache spells it; status, tokens and cost are those of
    `Prediction`. What a cache does not state is empty.
    """

    label: str
    gold: str
    example_id: str = ""
    prompt_hash: str = ""
    dataset: str = ""
    model: str = ""
    gen_type: str = ""
    prompt_shot: str = ""
    prompt_style: str = ""
    prompt: str = ""
    status: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None

    @property
    def key(self) -> str:
        """What joins it."""
        return self.example_id or self.prompt_hash


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
    """Letters and digits of `text` in lower case: what stays when spacing and punctuation
    differ.
    """
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
    aligned = (
        len(ours) == len(cached)
        and all(agree(i, i) for i in range(len(ours)))
        and all(i == j for i, (j, _) in found.items())
    )
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


# How the study's hub copies are called, letters and digits only -> the benchmark.
_COPIES = {squash(copy.split("/")[1]): squash(one.name) for copy, one in COPIES.items()}


def same_dataset(one: str, other: str) -> bool:
    """Whether two names are those of one benchmark: `Despina/re-docred`, `re_docred`."""
    return _benchmark(one) == _benchmark(other)


def _benchmark(name: str) -> str:
    parts = name.removeprefix("hub:").split("/")
    # OWNER/NAME or OWNER/NAME/SUBSET of the hub, else a name.
    squashed = squash(parts[1] if len(parts) > 1 else parts[0])
    return _COPIES.get(squashed, squashed)


@dataclass(frozen=True)
class Join:
    """Rows with their answers, ids of rows without one by reason, and answers that belong to no
    row.
    """

    found: list[tuple[Prediction, Answer]]
    missing: dict[str, tuple[str, ...]]
    strangers: tuple[Answer, ...]


def join(rows: Sequence[Prediction], answers: Sequence[Answer], uncovered: dict[str, str]) -> Join:
    """Joins by example id, else by prompt hash; answers of one model in one setting. Repeated
    answers count if they agree.
    """
    by_id, by_hash = defaultdict(list), defaultdict(list)
    for answer in answers:
        (by_id[answer.example_id] if answer.example_id else by_hash[answer.prompt_hash]).append(
            answer
        )
    found, missing, used = [], defaultdict(list), set()
    for row in rows:
        candidates = by_id.get(row.example_id) or (
            by_hash.get(row.prompt_hash, []) if row.prompt_hash else []
        )
        used.update(answer.key for answer in candidates)
        labels = {normalise_label(answer.label) for answer in candidates}
        if len(labels) == 1:
            found.append((row, candidates[0]))
        else:
            missing[
                DISAGREE if labels else uncovered.get(row.example_id, "not in the cache")
            ].append(row.example_id)
    strangers = tuple(answer for answer in answers if answer.key not in used)
    return Join(found, {reason: tuple(ids) for reason, ids in missing.items()}, strangers)


def gold_differs(
    found: Sequence[tuple[Prediction, Answer]], label_map: LabelMap | None
) -> list[tuple[Prediction, Answer]]:
    """Joined rows whose gold label the cache states otherwise.

    One prompt may be that of several examples with several gold labels, of which a cache keeps one:
    it is enough to be among them. Raises InputError for a gold label that the map does not list.
    """
    ours = defaultdict(set)
    for row, answer in found:
        ours[answer.key].add(normalise_label(common_gold(row, label_map)))
    return [
        (row, answer)
        for row, answer in found
        if answer.gold
        and normalise_label(common_label(answer.gold, label_map)) not in ours[answer.key]
    ]


def common_gold(row: Prediction, label_map: LabelMap | None) -> str:
    """The gold label of a row in the spelling that both sides are compared in."""
    return one_negative(label_map.gold(row.relation, row.example_id) if label_map else row.relation)


def common_label(label: str, label_map: LabelMap | None) -> str:
    """A cached label in that spelling."""
    return one_negative(label_map.cached(label) if label_map else label)


def one_negative(label: str) -> str:
    """The label, or "none" for all that mean "no relation"."""
    return "none" if is_negative(label) else label
