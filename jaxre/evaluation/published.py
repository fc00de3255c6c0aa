"""The figures that the study published, to stand beside measured ones, marked as such.

    for system in published().systems:
        system.name, system.f1["gids"], system.note

`jaxre/assets/published.json` holds them and names their source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jaxre.evaluation.rows import Row

PATH = Path(__file__).parents[1] / "assets" / "published.json"


@dataclass(frozen=True)
class PublishedSystem(Row):
    """One published row: positive-class micro-F1 per dataset. `note`: what went wrong in it, if
    anything; then it goes into no average.

    kind: tuned, adapted, encoder, frontier (as in study_record). regime: gentune, littune, mixtune.
    shots: of training and prompt.
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
    """gigabytes: approximate, of the model as deployed; gpu_ms (RTX 4090), cpu_ms: milliseconds per
    extraction.
    """

    name: str
    parameters: int
    gigabytes: float
    gpu_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Published(Row):
    """source: of the figures; domains: domain -> datasets; labels: dataset -> number of labels."""

    source: str
    metric: str
    domains: dict[str, tuple[str, ...]]
    labels: dict[str, int]
    systems: tuple[PublishedSystem, ...]
    footprint: tuple[PublishedFootprint, ...]


@cache
def published() -> Published:
    """The figures that the package ships."""
    tree = json.loads(PATH.read_text(encoding="utf-8"))
    return Published(
        source=tree["source"],
        metric=tree["metric"],
        domains={domain: tuple(names) for domain, names in tree["domains"].items()},
        labels=tree["labels"],
        systems=tuple(PublishedSystem(**one) for one in tree["systems"]),
        footprint=tuple(PublishedFootprint(**one) for one in tree["footprint"]),
    )
