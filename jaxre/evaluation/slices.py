"""Scores of parts of the data, so that an average cannot hide a hole.

    table = slices(study, "qwen-gentune-2shot")
    [one for one in table if one.status == "hole"]

Levels: domain, dataset, relation; and within each dataset entity types, sentence length and entity distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxre.evaluation.rows import Row

Level = Literal["domain", "dataset", "relation", "entity types", "sentence length", "entity distance"]
Status = Literal["fine", "hole", "too small"]


@dataclass(frozen=True)
class Slice(Row):
    """One part of the data.

    level, name: such as "relation", "Kill"; domain, dataset: where it lies (dataset "" for a domain).
    n: examples in it; positive: those with a positive gold label.
    measure: what value, low, high and whole are: "F1" (positive-class micro; of a relation its own F1; of a domain the unweighted
      average over its datasets), or "accuracy" where the slice has too few positive gold labels for an F1.
    low, high: 95% bootstrap interval. whole, whole_low, whole_high: the same measure of the next larger whole: the dataset for
      relations, types, lengths and distances, all datasets for domains and datasets. difference: value - whole.
    status: "too small" to judge, "hole" (the interval lies wholly below that of the whole), else "fine".
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
