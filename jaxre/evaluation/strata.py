"""Errors by what kind they are.

    errors = error_strata(gold, predicted, schema=labels)
    [(one.name, one.count, one.share) for one in errors.strata]
        # the counts add up to errors.errors

Each error belongs to the first stratum that it fits, in this order:
1. out of schema: the prediction is neither a label of the schema nor a spelling of "no relation"
(run-on text, `<think>`); 2. over-prediction: a positive label where gold has no relation;
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

from jaxre.evaluation.metrics import Labels, undirected
from jaxre.evaluation.rows import Row
from jaxre.relations.schema import NEGATIVES, normalise_label

RIGHT = "right"
STRATA = OUT_OF_SCHEMA, OVER, UNDER, NEAR, CONFUSION = (
    "out of schema",
    "over-prediction",
    "under-prediction",
    "near neighbour",
    "confusion",
)

# Words that tell of no relation by themselves.
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
    """All errors of one system on one dataset; `strata` are in the order of STRATA, empty ones
    too.
    """

    examples: int
    errors: int
    strata: tuple[Stratum, ...]


def error_strata(
    gold: Sequence[str], predicted: Sequence[str], schema: Sequence[str]
) -> ErrorStrata:
    """The errors of N predictions by stratum. Raises InputError: no examples, or lists of different
    length.
    """
    of = strata_of(gold, predicted, schema)
    members = {name: np.flatnonzero(of == name) for name in STRATA}
    errors = sum(len(one) for one in members.values())
    return ErrorStrata(
        examples=len(of),
        errors=errors,
        strata=tuple(
            Stratum(name, len(one), len(one) / max(errors, 1), tuple(one[:SHOWN].tolist()))
            for name, one in members.items()
        ),
    )


def strata_of(gold: Sequence[str], predicted: Sequence[str], schema: Sequence[str]) -> np.ndarray:
    """The stratum of each of N predictions, RIGHT or one of STRATA: [N] str.

    Args:
      gold, predicted: N labels each, normalised here. A negative answer to a negative gold of
        another spelling (none, no_relation) is right, as the F1 does not punish it.
      schema: the labels of the dataset.

    Raises:
      InputError: no examples, or lists of different length.
    """
    labels = Labels.of(gold, predicted)
    known = {normalise_label(label) for label in schema}
    close = near(known)
    # Pairs of labels, not examples, are judged: there are few of them.
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
    """Whether two labels of a schema are near neighbours by their names; a system's own confusions
    play no part.

    They are when one of these holds (labels normalised):
    - they are one relation in two directions: `cause-effect(e1,e2)` and `cause-effect(e2,e1)`;
    - they are paths with one parent: `/people/person/place_lived` and `/people/person/religion`;
    - they share a word of their names: `place of birth` and `place of death`. Names are split at
      everything that is no letter or digit, without what stands before a last slash or a colon;
      function words do not count, nor words in half of the positive labels or more of a schema of
      at least four, which tell nothing apart.
    """
    positive = sorted(
        {undirected(label) for label in map(normalise_label, schema) if label not in NEGATIVES}
    )
    counts = Counter(word for label in positive for word in _words(label))
    common = {
        word for word, count in counts.items() if len(positive) >= 4 and 2 * count >= len(positive)
    }

    def close(first: str, second: str) -> bool:
        one, other = undirected(normalise_label(first)), undirected(normalise_label(second))
        if one == other:
            return True
        parents = [label.rpartition("/")[0] for label in (one, other)]
        return bool(parents[0] and parents[0] == parents[1]) or bool(
            (_words(one) & _words(other)) - common
        )

    return close


def _words(label: str) -> frozenset[str]:
    name = label.rpartition("/")[2].rpartition(":")[2]
    return frozenset(re.findall(r"[^\W_]+", name)) - FUNCTION_WORDS
