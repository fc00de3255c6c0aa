"""Cached answers of a frontier model in a common form, and exact joins of answers and examples."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from jaxre.evaluation.predictions import Prediction
from jaxre.relations.benchmarks import COPIES
from jaxre.relations.label_map import LabelMap
from jaxre.relations.schema import is_negative, normalise_label

# If fewer examples have an answer, figures of a cache do not represent its dataset.
ENOUGH = 0.95
DISAGREE = "the cache holds different answers for it"

POSITION = "position"
SAME_ANSWER = "same answer"


@dataclass(frozen=True, slots=True)
class Answer:
    """One cached answer to `example_id`, or to every example whose prompt has `prompt_hash`.

    `gold` is the gold label in the spelling of the cache; status, tokens and cost are as in
    `Prediction`. Fields that a cache does not state are empty.
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
        """The key that joins the answer to examples."""
        return self.example_id or self.prompt_hash


@dataclass(frozen=True)
class Cache:
    """Answers that can be compared, and an account of the others.

    leftover: reason -> cached items that cannot be used; uncovered: example id -> reason why the
    example has no answer; notes: sentences for the reader of a comparison.
    """

    place: str
    answers: tuple[Answer, ...]
    leftover: dict[str, tuple[str, ...]] = field(default_factory=dict)
    uncovered: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def squash(text: str) -> str:
    """Letters and digits of `text` in lower case, to ignore spacing and punctuation."""
    return re.sub(r"[\W_]+", "", text.lower()) or text.strip()


def join_cached(
    ours: Sequence[Sequence[Hashable]],
    cached: Sequence[Sequence[Hashable]],
    answers: Sequence[Hashable],
    agree: Callable[[int, int], bool],
) -> dict[int, tuple[int, str]]:
    """Matches our items with cached items, by proof only.

    1. `key k`: the k-th key of the item occurs once among ours and once in the cache. Later keys
       are looser (normalised) and apply to the items that earlier keys did not join.
    2. `position`: both sides have the same number of items, `agree` holds for item i of ours and
       item i of the cache for *every* i, and every join of step 1 is of i to i. Then the two lists
       are the same list, and the remaining items (with equal keys) are joined i to i.
    3. `same answer`: if step 2 has no proof. At least as many cached items as ours have the key,
       and all of them have the same answer: whichever is the right one, the answer is known.

    Args:
      ours, cached: keys of each item, from exact to loose.
      answers: the answer of each cached item.
      agree: agree(i, j) is True if item i of ours can be item j of the cache.

    Returns our index -> (cached index, kind of join), for the items with a proof.
    """
    joins: dict[int, tuple[int, str]] = {}
    levels = len(ours[0]) if ours else 0
    for level in range(levels):
        for mine, theirs in _groups(ours, cached, level, joins):
            if len(mine) == len(theirs) == 1:
                joins[mine[0]] = theirs[0], f"key {level + 1}"
    aligned = (
        len(ours) == len(cached)
        and all(agree(i, i) for i in range(len(ours)))
        and all(i == j for i, (j, _) in joins.items())
    )
    if aligned:
        return {i: joins.get(i, (i, POSITION)) for i in range(len(ours))}
    for level in range(levels):
        for mine, theirs in _groups(ours, cached, level, joins):
            if mine and len(theirs) >= len(mine) and len({answers[j] for j in theirs}) == 1:
                joins.update({i: (j, SAME_ANSWER) for i, j in zip(mine, theirs, strict=False)})
    return joins


def how_joined(joins: dict[int, tuple[int, str]]) -> Counter[str]:
    """Number of items by kind of join."""
    return Counter(how for _, how in joins.values())


def _groups(
    ours: Sequence[Sequence[Hashable]],
    cached: Sequence[Sequence[Hashable]],
    level: int,
    joins: dict[int, tuple[int, str]],
) -> list[tuple[list[int], list[int]]]:
    """Indices of our items and of cached items without a join that have the same key."""
    groups: dict[Hashable, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    taken = {item for item, _ in joins.values()}
    for side, rows, done in ((0, ours, joins), (1, cached, taken)):
        for index, keys in enumerate(rows):
            if index not in done:
                groups[keys[level]][side].append(index)
    return list(groups.values())


# Squashed names of the study's hub copies -> squashed names of the benchmarks.
_COPIES = {squash(copy.split("/")[1]): squash(benchmark.name) for copy, benchmark in COPIES.items()}


def same_dataset(first: str, second: str) -> bool:
    """True for two names of the same benchmark, such as `Despina/re-docred` and `re_docred`."""
    return _benchmark(first) == _benchmark(second)


def _benchmark(name: str) -> str:
    parts = name.removeprefix("hub:").split("/")
    # OWNER/NAME or OWNER/NAME/SUBSET of the hub, otherwise a name.
    squashed = squash(parts[1] if len(parts) > 1 else parts[0])
    return _COPIES.get(squashed, squashed)


@dataclass(frozen=True)
class Join:
    """found: rows with their answers; missing: reason -> ids of rows without an answer; strangers:
    answers that belong to no row.
    """

    found: list[tuple[Prediction, Answer]]
    missing: dict[str, tuple[str, ...]]
    strangers: tuple[Answer, ...]


def join(rows: Sequence[Prediction], answers: Sequence[Answer], uncovered: dict[str, str]) -> Join:
    """Joins rows with the answers of one model in one setting, by example id, otherwise by prompt
    hash. Repeated answers count if they agree.
    """
    by_id, by_hash = defaultdict(list), defaultdict(list)
    for answer in answers:
        (by_id if answer.example_id else by_hash)[answer.key].append(answer)
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
            reason = DISAGREE if labels else uncovered.get(row.example_id, "not in the cache")
            missing[reason].append(row.example_id)
    strangers = tuple(answer for answer in answers if answer.key not in used)
    return Join(found, {reason: tuple(ids) for reason, ids in missing.items()}, strangers)


def gold_differs(
    pairs: Sequence[tuple[Prediction, Answer]], label_map: LabelMap | None
) -> list[tuple[Prediction, Answer]]:
    """Joined rows with another gold label in the cache.

    Several examples with several gold labels may have the same prompt, and the cache states one of
    the labels: any of them is right. Raises InputError for a gold label that the map does not list.
    """
    ours = defaultdict(set)
    for row, answer in pairs:
        ours[answer.key].add(normalise_label(common_gold(row, label_map)))
    return [
        (row, answer)
        for row, answer in pairs
        if answer.gold
        and normalise_label(common_label(answer.gold, label_map)) not in ours[answer.key]
    ]


def common_gold(row: Prediction, label_map: LabelMap | None) -> str:
    """Gold label of a row in the common spelling of a comparison."""
    return one_negative(label_map.gold(row.relation, row.example_id) if label_map else row.relation)


def common_label(label: str, label_map: LabelMap | None) -> str:
    """A cached label in the common spelling of a comparison."""
    return one_negative(label_map.cached(label) if label_map else label)


def one_negative(label: str) -> str:
    """The label, or "none" for every label that means "no relation"."""
    return "none" if is_negative(label) else label
