"""Figures that the study published, for comparison with measured figures.

    for system in published().systems:
        system.name, system.f1["gids"], system.note

They and their source are in `jaxre/assets/published.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache

from jaxre.config import shipped
from jaxre.evaluation.metrics.rows import Row


@dataclass(frozen=True)
class PublishedSystem(Row):
    """One published row: positive-class micro-F1 per dataset.

    kind: tuned, adapted, encoder, frontier (as in record.py). regime: gentune, littune, mixtune.
    shots: of training and prompt. note: a failure of the run, if any; the row is then in no
    average.
    """

    name: str
    kind: str
    model: str
    f1: dict[str, float]
    parameters: int | None = None
    regime: str = ""
    shots: int | None = None
    note: str = ""


@dataclass(frozen=True)
class PublishedFootprint(Row):
    """gigabytes: approximate size of the deployed model; gpu_ms (RTX 4090), cpu_ms: milliseconds
    per extraction.
    """

    name: str
    parameters: int
    gigabytes: float
    gpu_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Published(Row):
    """source: citation; domains: domain -> datasets; labels: dataset -> number of labels."""

    source: str
    metric: str
    domains: dict[str, tuple[str, ...]]
    labels: dict[str, int]
    systems: tuple[PublishedSystem, ...]
    footprint: tuple[PublishedFootprint, ...]


@cache
def published() -> Published:
    """Reads the figures that the package ships."""
    tree = json.loads(shipped("published.json").read_text(encoding="utf-8"))
    return Published(
        source=tree["source"],
        metric=tree["metric"],
        domains={domain: tuple(names) for domain, names in tree["domains"].items()},
        labels=tree["labels"],
        systems=tuple(PublishedSystem(**system) for system in tree["systems"]),
        footprint=tuple(PublishedFootprint(**model) for model in tree["footprint"]),
    )
