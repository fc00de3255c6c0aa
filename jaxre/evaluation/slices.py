"""Scores of parts of the data, so that an average cannot hide a hole.

    table = slices(study, "qwen-gentune-2shot")
    [one for one in table if one.status == "hole"]

Levels: domain, dataset, relation; and within each dataset entity types, sentence length and entity
distance (attributes.py).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxre.evaluation.attributes import DISTANCE, ENTITY_TYPES, LENGTH
from jaxre.evaluation.rows import Row
from jaxre.evaluation.significance import (
    Interval,
    Resamples,
    clustered,
    f1_interval,
    resample_ratios,
)
from jaxre.evaluation.study_scores import OVERALL, Cell, StudyScores, at_home
from jaxre.relations.schema import is_negative, normalise_label

# Hundreds of intervals per system: their ends need less precision than a headline's.
RESAMPLES = 2_000

# A slice of fewer examples is too small to be judged; with fewer positive gold labels it is judged
# by its accuracy.
EXAMPLES, POSITIVES = 30, 10

Level = Literal[
    "domain", "dataset", "relation", "entity types", "sentence length", "entity distance"
]
Status = Literal["fine", "hole", "too small", "broken"]


@dataclass(frozen=True)
class Slice(Row):
    """One part of the data.

    level, name: such as "relation", "Kill"; domain, dataset: where it lies (dataset "" for a
    domain). n: examples in it; positive: those with a positive gold label.
    measure: what value, low, high and whole are: "F1" (positive-class micro; of a relation its own
    F1; of a domain the unweighted
      average over its datasets), or "accuracy" where the slice has too few positive gold labels for
      an F1.
    low, high: 95% bootstrap interval. whole, whole_low, whole_high: the same measure of the next
    larger whole: the dataset for
      relations, types, lengths and distances; for domains and datasets all that the system was
      trained on (itself, where its F1 is not comparable: study_scores). difference: value - whole.
    status: "too small" to judge (fewer than EXAMPLES), "hole" (the interval lies wholly below that
    of the whole), "broken" (a domain or
      dataset whose answers are faulty as a whole: study_scores), else "fine".
    """

    level: Level
    name: str
    domain: str
    dataset: str
    n: int
    positive: int
    measure: Literal["F1", "accuracy"]
    value: float
    low: float
    high: float
    whole: float
    whole_low: float
    whole_high: float
    difference: float
    status: Status


def slices(study: StudyScores, system: str, resamples: int = RESAMPLES) -> tuple[Slice, ...]:
    """Every slice of every dataset that a system was asked: domains first, then each dataset
    followed by its parts.

    Relations are all labels of the schema, those without gold examples too, and gold labels beyond
    it. That of a positive label is judged by its own F1 (wrong predictions of it count), a negative
    one by the share of its examples that stay negative.
    """
    cells = study.asked(system, study.groups[OVERALL])
    if not cells:
        return ()
    whole = f1_interval(clustered([cell.resampled for cell in at_home(cells) or cells], study.seed))
    found = []
    for domain in dict.fromkeys(cell.domain for cell in cells):
        inside = [cell for cell in cells if cell.domain == domain]
        members = at_home(inside) or inside
        interval = f1_interval(clustered([cell.resampled for cell in members], study.seed))
        against = whole if members[0].comparable else interval
        count, positive = (
            sum(len(cell.ids) for cell in members),
            sum(cell.positive.sum() for cell in members),
        )
        found.append(
            _slice(
                "domain",
                domain,
                domain,
                "",
                count,
                positive,
                "F1",
                interval,
                against,
                any(cell.broken for cell in members),
            )
        )
    for cell in cells:
        count, positive = len(cell.ids), cell.positive.sum()
        against = whole if cell.comparable else cell.interval
        found.append(
            _slice(
                "dataset",
                cell.dataset,
                cell.domain,
                cell.dataset,
                count,
                positive,
                "F1",
                cell.interval,
                against,
                cell.broken,
            )
        )
        found += _parts(study, cell, resamples)
    return tuple(found)


def _parts(study: StudyScores, cell: Cell, resamples: int) -> list[Slice]:
    """The relations, entity types, lengths and distances of a dataset."""
    seed = study.seed_of(cell.dataset)
    positive, ones = cell.positive, np.ones((len(cell.ids), 1), np.int64)
    right = cell.right[:, None]
    wholes = {
        "F1": cell.interval,
        "accuracy": f1_interval(resample_ratios(right, ones, resamples, seed)),
    }
    found = []

    def add(
        level: Level, name: str, members: np.ndarray, measure: str, resampled: Resamples
    ) -> None:
        interval = f1_interval(resampled)
        count, positives = len(members), positive[members].sum()
        found.append(
            _slice(
                level,
                name,
                cell.domain,
                cell.dataset,
                count,
                positives,
                measure,
                interval,
                wholes[measure],
            )
        )

    code = {name: index for index, name in enumerate(cell.labels.names)}
    for label in cell.classes:
        this = code.get(normalise_label(label), -1)
        is_gold, is_predicted = cell.labels.gold == this, cell.labels.predicted == this
        members = np.flatnonzero(is_gold)
        if is_negative(label):
            if len(members):
                add(
                    "relation",
                    label,
                    members,
                    "accuracy",
                    resample_ratios(right[members], ones[members], resamples, seed),
                )
            continue
        above, below = 2 * (is_gold & is_predicted), is_gold.astype(np.int64) + is_predicted
        add(
            "relation",
            label,
            members,
            "F1",
            resample_ratios(above[:, None], below[:, None], resamples, seed),
        )

    for level in (ENTITY_TYPES, LENGTH, DISTANCE):
        members_of: dict[str, list[int]] = defaultdict(list)
        for index, place in enumerate(cell.places.tolist()):
            members_of[study.attributes[cell.dataset][place][level]].append(index)
        for name in sorted(members_of, key=_natural):
            members = np.array(members_of[name])
            measure = "F1" if positive[members].sum() >= POSITIVES else "accuracy"
            above, below = (
                (cell.parts[:, :1], cell.parts[:, 1:]) if measure == "F1" else (right, ones)
            )
            add(
                level,
                name,
                members,
                measure,
                resample_ratios(above[members], below[members], resamples, seed),
            )
    return found


def _natural(name: str) -> tuple[int, str]:
    """Bins in the order of their numbers."""
    number = name.split("-")[0].split(" ")[0]
    return (int(number) if number.isdigit() else -1), name


def _slice(
    level,
    name,
    domain,
    dataset,
    count,
    positive,
    measure,
    interval: Interval,
    whole: Interval,
    broken: bool = False,
) -> Slice:
    if broken:
        status = "broken"
    elif count < EXAMPLES:
        status = "too small"
    else:
        status = "hole" if interval.high < whole.low else "fine"
    return Slice(
        level=level,
        name=name,
        domain=domain,
        dataset=dataset,
        n=int(count),
        positive=int(positive),
        measure=measure,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        whole=whole.value,
        whole_low=whole.low,
        whole_high=whole.high,
        difference=interval.value - whole.value,
        status=status,
    )
