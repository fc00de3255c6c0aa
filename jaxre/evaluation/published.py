"""The figures that the study published, to stand beside measured ones, marked as such."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from jaxre.evaluation.rows import Row


@dataclass(frozen=True)
class PublishedSystem(Row):
    """One published row: positive-class micro-F1 per dataset. `note`: what went wrong in it, if anything.

    kind: tuned, adapted, encoder, frontier (as in study_record). regime: gentune, littune, mixtune.
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
class Published(Row):
    """source: of the figures; domains: domain -> datasets; labels: dataset -> number of labels."""

    source: str
    metric: str
    domains: dict[str, tuple[str, ...]]
    labels: dict[str, int]
    systems: tuple[PublishedSystem, ...]


@cache
def published() -> Published:
    """The figures that the package ships."""
    raise NotImplementedError
