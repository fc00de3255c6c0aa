"""Scores of parts of the data, so that an average cannot hide a hole.

    table = slices(study, "qwen-gentune-2shot")
    [part for part in table if part.status == "hole"]

Levels: domain, dataset, relation; and within each dataset entity types, sentence length and entity
distance (attributes.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxre.evaluation.metrics.attributes import DISTANCE, ENTITY_TYPES, LENGTH
from jaxre.evaluation.metrics.rows import Row
from jaxre.evaluation.metrics.significance import (
    Interval,
    clustered,
    f1_interval,
    resample_ratios,
)
from jaxre.evaluation.report.study_scores import OVERALL, Cell, StudyScores, at_home
from jaxre.relations.schema import is_negative, normalise_label

# A system has hundreds of these intervals; they need less precision than those of the headline.
RESAMPLES = 2_000

# A slice with fewer examples is too small to judge; with fewer positive gold labels, accuracy
# replaces F1.
EXAMPLES, POSITIVES = 30, 10

Level = Literal[
    "domain", "dataset", "relation", "entity types", "sentence length", "entity distance"
]
Measure = Literal["F1", "accuracy"]
Status = Literal["fine", "hole", "too small", "broken"]


@dataclass(frozen=True)
class Slice(Row):
    """One part of the data.

    level, name: such as "relation", "Kill"; domain, dataset: its place in the data (dataset is ""
    for a domain). n: examples in it; positive: examples with a positive gold label.
    measure: kind of value, low, high and whole: "F1" (positive-class micro; for a relation its own
    F1; for a domain the unweighted average over its datasets), or "accuracy" if the slice has too
    few positive gold labels for an F1.
    low, high: 95% bootstrap interval. whole, whole_low, whole_high: the same measure of the next
    larger whole. This is the dataset for relations, types, lengths and distances; for domains and
    datasets, everything that the system was trained on (the slice itself if its F1 is not
    comparable: study_scores). difference: value - whole.
    status: "too small" to judge (fewer than EXAMPLES), "hole" (the interval lies entirely below
    that of the whole), "broken" (a domain or dataset whose answers are faulty as a whole:
    study_scores), else "fine".
    """

    level: Level
    name: str
    domain: str
    dataset: str
    n: int
    positive: int
    measure: Measure
    value: float
    low: float
    high: float
    whole: float
    whole_low: float
    whole_high: float
    difference: float
    status: Status


def slices(study: StudyScores, system: str) -> tuple[Slice, ...]:
    """Every slice of every dataset of a system: domains first, then each dataset followed by its
    parts.

    Relations are all labels of the schema, also those without gold examples, and gold labels
    outside of it. A positive label is judged by its own F1 (wrong predictions of it count), a
    negative label by the share of its examples that stay negative.
    """
    cells = study.asked(system, study.groups[OVERALL])
    if not cells:
        return ()

    def mean(members: Sequence[Cell]) -> Interval:
        return f1_interval(clustered([cell.resampled for cell in members], study.seed))

    overall = mean(at_home(cells) or cells)
    table = []
    for domain in dict.fromkeys(cell.domain for cell in cells):
        inside = [cell for cell in cells if cell.domain == domain]
        members = at_home(inside) or inside
        interval = mean(members)
        table.append(
            _slice(
                "domain",
                domain,
                domain=domain,
                dataset="",
                positive=np.concatenate([cell.positive for cell in members]),
                interval=interval,
                whole=overall if members[0].comparable else interval,
                broken=any(cell.broken for cell in members),
            )
        )
    for cell in cells:
        table.append(
            _slice(
                "dataset",
                cell.dataset,
                domain=cell.domain,
                dataset=cell.dataset,
                positive=cell.positive,
                interval=cell.interval,
                whole=overall if cell.comparable else cell.interval,
                broken=cell.broken,
            )
        )
        table += _parts(study, cell)
    return tuple(table)


def _parts(study: StudyScores, cell: Cell) -> list[Slice]:
    """Relations, entity types, lengths and distances of a dataset."""
    seed = study.seed_of(cell.dataset)
    positive, ones = cell.positive, np.ones((len(cell.ids), 1), np.int64)
    right = cell.right[:, None]
    wholes: dict[Measure, Interval] = {
        "F1": cell.interval,
        "accuracy": f1_interval(resample_ratios(right, ones, RESAMPLES, seed)),
    }
    table = []

    def add(
        level: Level,
        name: str,
        members: np.ndarray,
        measure: Measure,
        above: np.ndarray,
        below: np.ndarray,
    ) -> None:
        table.append(
            _slice(
                level,
                name,
                domain=cell.domain,
                dataset=cell.dataset,
                positive=positive[members],
                measure=measure,
                interval=f1_interval(resample_ratios(above, below, RESAMPLES, seed)),
                whole=wholes[measure],
            )
        )

    code = {name: index for index, name in enumerate(cell.labels.names)}
    for label in cell.classes:
        label_code = code.get(normalise_label(label), -1)
        is_gold = cell.labels.gold == label_code
        is_predicted = cell.labels.predicted == label_code
        members = np.flatnonzero(is_gold)
        if not is_negative(label):
            above, below = 2 * (is_gold & is_predicted), is_gold.astype(np.int64) + is_predicted
            add("relation", label, members, "F1", above[:, None], below[:, None])
        elif len(members):
            add("relation", label, members, "accuracy", right[members], ones[members])

    for level in (ENTITY_TYPES, LENGTH, DISTANCE):
        members_of: dict[str, list[int]] = defaultdict(list)
        for index, place in enumerate(cell.places.tolist()):
            members_of[study.attributes[cell.dataset][place][level]].append(index)
        for name in sorted(members_of, key=_bin_order):
            members = np.array(members_of[name])
            if positive[members].sum() >= POSITIVES:
                add(level, name, members, "F1", cell.parts[members, :1], cell.parts[members, 1:])
            else:
                add(level, name, members, "accuracy", right[members], ones[members])
    return table


def _bin_order(name: str) -> tuple[int, str]:
    """Sort key: bins by their first number, other names before them."""
    number = name.split("-")[0].split(" ")[0]
    return (int(number) if number.isdigit() else -1), name


def _slice(
    level: Level,
    name: str,
    *,
    domain: str,
    dataset: str,
    positive: np.ndarray,
    interval: Interval,
    whole: Interval,
    measure: Measure = "F1",
    broken: bool = False,
) -> Slice:
    """positive: [n] bool, the gold label is positive."""
    if broken:
        status = "broken"
    elif len(positive) < EXAMPLES:
        status = "too small"
    else:
        status = "hole" if interval.high < whole.low else "fine"
    return Slice(
        level=level,
        name=name,
        domain=domain,
        dataset=dataset,
        n=len(positive),
        positive=int(positive.sum()),
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
