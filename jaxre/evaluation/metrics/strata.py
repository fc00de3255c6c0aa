"""Errors by kind.

    errors = error_strata(gold, predicted, schema=labels)
    # the counts add up to errors.errors
    [(stratum.name, stratum.count, stratum.share) for stratum in errors.strata]

Each error belongs to the first stratum that fits, in this order:
1. out of schema: the prediction is neither a label of the schema nor a spelling of "no relation"
   (run-on text, `<think>`);
2. over-prediction: a positive label where gold has no relation;
3. under-prediction: no relation where gold is positive;
4. near neighbour: a wrong positive label whose name is close to that of the gold label (`near`);
5. confusion: any other wrong positive label.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxre.evaluation.metrics.rows import Row
from jaxre.evaluation.metrics.scores import Labels, undirected
from jaxre.relations.schema import NEGATIVES, normalise_label

RIGHT = "right"
STRATA = OUT_OF_SCHEMA, OVER, UNDER, NEAR, CONFUSION = (
    "out of schema",
    "over-prediction",
    "under-prediction",
    "near neighbour",
    "confusion",
)

# Words that do not indicate a relation by themselves.
FUNCTION_WORDS = frozenset(
    {
        "a",
        "an",
        "and",
        "at",
        "by",
        "for",
        "from",
        "has",
        "have",
        "in",
        "is",
        "of",
        "on",
        "or",
        "s",
        "the",
        "to",
        "was",
        "with",
    }
)
SHOWN = 5


@dataclass(frozen=True)
class Stratum(Row):
    """share: of all errors, in [0, 1]; examples: indices of the first few."""

    name: str
    count: int
    share: float
    examples: tuple[int, ...]


@dataclass(frozen=True)
class ErrorStrata(Row):
    """Errors of one system on one dataset. strata: in the order of STRATA, empty ones included."""

    examples: int
    errors: int
    strata: tuple[Stratum, ...]


def error_strata(
    gold: Sequence[str], predicted: Sequence[str], schema: Sequence[str]
) -> ErrorStrata:
    """Counts the errors of N predictions by stratum. Raises InputError: no examples, or lists of
    different length.
    """
    strata = strata_of(gold, predicted, schema)
    members = {name: np.flatnonzero(strata == name) for name in STRATA}
    errors = sum(map(len, members.values()))
    return ErrorStrata(
        examples=len(strata),
        errors=errors,
        strata=tuple(
            Stratum(name, len(index), len(index) / max(errors, 1), tuple(index[:SHOWN].tolist()))
            for name, index in members.items()
        ),
    )


def strata_of(gold: Sequence[str], predicted: Sequence[str], schema: Sequence[str]) -> np.ndarray:
    """Stratum of each of N predictions, RIGHT or one of STRATA: [N] str.

    Args:
      gold, predicted: N labels each, normalised here. A negative answer to a negative gold label
        in another spelling (none, no_relation) is right, as it is in the F1.
      schema: the labels of the dataset.

    Raises:
      InputError: no examples, or lists of different length.
    """
    labels = Labels.of(gold, predicted)
    known = {normalise_label(label) for label in schema}
    close = near(known)
    # Classifies pairs of labels, not examples: there are few distinct pairs.
    pairs, pair_of = np.unique(
        labels.gold * len(labels.names) + labels.predicted, return_inverse=True
    )
    names = [
        _stratum(
            labels.names[pair // len(labels.names)],
            labels.names[pair % len(labels.names)],
            known,
            close,
        )
        for pair in pairs
    ]
    return np.array(names)[pair_of]


def _stratum(gold: str, predicted: str, known: set[str], close: Callable[[str, str], bool]) -> str:
    if gold == predicted or (gold in NEGATIVES and predicted in NEGATIVES):
        return RIGHT
    if predicted not in known and predicted not in NEGATIVES:
        return OUT_OF_SCHEMA
    if gold in NEGATIVES:
        return OVER
    if predicted in NEGATIVES:
        return UNDER
    return NEAR if close(gold, predicted) else CONFUSION


def near(schema: Iterable[str]) -> Callable[[str, str], bool]:
    """Predicate for two labels of a schema: their names are close. It does not depend on the
    confusions of a system.

    Two normalised labels are near neighbours if one of these holds:
    - they are one relation in two directions: `cause-effect(e1,e2)` and `cause-effect(e2,e1)`;
    - they are paths with the same parent: `/people/person/place_lived`, `/people/person/religion`;
    - their names share a word: `place of birth` and `place of death`. Names are split at all
      characters other than letters and digits, after the last slash or colon. Function words do not
      count; neither do words in at least half of the positive labels of a schema with four or more,
      because they do not distinguish labels.
    """
    positive = sorted(
        {undirected(label) for label in map(normalise_label, schema) if label not in NEGATIVES}
    )
    counts = Counter(word for label in positive for word in _words(label))
    common = {
        word for word, count in counts.items() if len(positive) >= 4 and 2 * count >= len(positive)
    }

    def close(first: str, second: str) -> bool:
        first, second = undirected(normalise_label(first)), undirected(normalise_label(second))
        if first == second:
            return True
        parent, second_parent = (label.rpartition("/")[0] for label in (first, second))
        if parent and parent == second_parent:
            return True
        return bool((_words(first) & _words(second)) - common)

    return close


def _words(label: str) -> frozenset[str]:
    name = label.rpartition("/")[2].rpartition(":")[2]
    return frozenset(re.findall(r"[^\W_]+", name)) - FUNCTION_WORDS
