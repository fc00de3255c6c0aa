"""Random choices that depend on names alone: the same on every machine, in any order, in any
process.

Each is a SHA-256 of a seed and an id. With a generator, a choice would depend on the choices before
it, hence on the order of a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal, Protocol, TypeVar

SPLITS = ("train", "validation", "test")
TRAIN, VALIDATION = 0.8, 0.1  # shares of a benchmark that comes as one file; test gets the rest


class Named(Protocol):
    """An object with an id: an example, or the ingredients of one."""

    @property
    def id(self) -> str: ...


Item = TypeVar("Item", bound=Named)


def digest(key: str) -> int:
    """256 uniform bits for a name."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest(), "big")


def fraction(key: str) -> float:
    """A uniform number in [0, 1) for a name: the first 53 bits, so that rounding never yields 1."""
    return (digest(key) >> 203) / 2**53


def split_of(key: str) -> Literal["train", "validation", "test"]:
    """The split of a document or book, by its name: 80, 10 and 10 of a hundred."""
    place = fraction(f"split:{key}")
    return "train" if place < TRAIN else "validation" if place < TRAIN + VALIDATION else "test"


def draw(examples: Iterable[Item], count: int, seed: int | str) -> list[Item]:
    """`count` examples (all, if there are fewer), chosen by seed and id, in the order given.

    A larger count only adds: the draw of 100 contains the draw of 50.
    """
    examples = list(examples)
    ranks = sorted(range(len(examples)), key=lambda i: digest(f"{seed}:{examples[i].id}"))
    return [examples[i] for i in sorted(ranks[:count])]
