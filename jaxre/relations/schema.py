"""What an example and a label are: the record every reader yields, label normalisation, negatives."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from jaxre.errors import InputError

Domain = Literal["general", "literary"]

# Labels that mean "no relation", after normalisation (study's scoring rules).
NEGATIVES = frozenset({"none", "other", "no_relation", "na", "nan", "null", ""})


@dataclass(frozen=True, slots=True)
class Example:
    """One text with a marked head and tail entity, and the relation between them.

    `id` is stable: dataset, split and the source's own id. Spans are half-open character
    ranges in `text`. `relation` is the label as the source spells it. `prompt_hash` is that of the
    study's raw prompt column, where the source has one: cached frontier answers are joined by it.
    """

    id: str
    dataset: str
    split: str
    text: str
    head: str
    tail: str
    relation: str
    head_type: str | None = None
    tail_type: str | None = None
    head_span: tuple[int, int] | None = None
    tail_span: tuple[int, int] | None = None
    domain: str = "general"
    prompt_hash: str | None = None


@dataclass(frozen=True)
class Reading:
    """The examples of a split, and an account of what the reader left out or changed.

    `account` maps what happened, as a phrase that follows a count, to the ids or places it happened to.
    """

    examples: list[Example]
    account: dict[str, list[str]] = field(default_factory=dict)


def hash_prompt(prompt: str) -> str:
    """First 12 hex digits of the md5 of a prompt (the study's join key; its own is over the raw hub column `prompt_0_shot`)."""
    return hashlib.md5(prompt.encode("utf-8"), usedforsecurity=False).hexdigest()[:12]


def normalise_label(label: str | None) -> str:
    """The study's normal form of a gold or predicted label.

    First line, stripped, lower case, spaces collapsed, one pair of quotes removed;
    empty, nan and null become "none".
    """
    lines = (label or "").strip().splitlines()
    text = re.sub(r"\s+", " ", lines[0]).strip().lower() if lines else ""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    return "none" if text in {"", "nan", "null"} else text


def is_negative(label: str | None) -> bool:
    """Whether a label says that there is no relation."""
    return normalise_label(label) in NEGATIVES


@dataclass(frozen=True)
class Schema:
    """The labels of a dataset, in sorted order."""

    labels: tuple[str, ...]

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Schema:
        """The labels that occur in `examples`."""
        return cls(tuple(sorted({example.relation for example in examples})))

    def check(self, examples: Iterable[Example], place: str) -> None:
        """Raises InputError, naming the first example whose label is outside the schema."""
        known = set(self.labels)
        for example in examples:
            if example.relation not in known:
                raise InputError(
                    f"{place}: example {example.id} has the label {example.relation!r}, which is not in the schema "
                    f"({', '.join(self.labels)}); correct it or add it to data.labels"
                )


def label_counts(examples: Iterable[Example]) -> Counter[str]:
    """How often each label occurs."""
    return Counter(example.relation for example in examples)
