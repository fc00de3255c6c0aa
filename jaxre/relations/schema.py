"""Examples, the records that every reader yields; label normalisation, negatives, schemas."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxre.errors import InputError

Domain = Literal["general", "literary"]

# Labels that mean "no relation", after normalisation (study's scoring rules).
NEGATIVES = frozenset({"none", "other", "no_relation", "na", "nan", "null", ""})


@dataclass(frozen=True, slots=True)
class Example:
    """One text with a marked head and tail entity, and the relation between them.

    `id` is stable: dataset, split and the source's own id. Spans are half-open character
    ranges in `text`. `relation` is the label as the source spells it. `prompt_hash` is the hash of
    the study's raw prompt column, where the source has one: cached frontier answers are joined by
    it.
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

    @classmethod
    def with_spans(
        cls, text: str, head_span: tuple[int, int], tail_span: tuple[int, int], **fields: Any
    ) -> Example:
        """An example whose head and tail are spelled as in their spans; `fields` are the others."""
        head, tail = text[slice(*head_span)], text[slice(*tail_span)]
        return cls(
            text=text, head=head, tail=tail, head_span=head_span, tail_span=tail_span, **fields
        )


@dataclass(frozen=True)
class Reading:
    """The examples of a split, and an account of what the reader left out or changed.

    `account` maps a reason, as a phrase that follows a count, to the ids or places concerned.
    """

    examples: list[Example]
    account: dict[str, list[str]] = field(default_factory=dict)


def hash_prompt(prompt: str) -> str:
    """First 12 hex digits of the md5 of a prompt, the study's join key (the study hashes the raw
    hub column `prompt_0_shot`).
    """
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
    """True if a label means "no relation"."""
    return normalise_label(label) in NEGATIVES


@dataclass(frozen=True)
class Schema:
    """The labels of a dataset, in sorted order.

    strict: False for labels that were collected from other examples; a label outside of them then
    causes a notice instead of an error.
    """

    labels: tuple[str, ...]
    strict: bool = True

    @classmethod
    def of(cls, examples: Iterable[Example], strict: bool = True) -> Schema:
        """The labels that occur in `examples`."""
        return cls(tuple(sorted({example.relation for example in examples})), strict)

    def check(self, examples: Iterable[Example], place: str) -> None:
        """Raises InputError, naming the first example whose label is outside the schema."""
        known = set(self.labels)
        for example in examples:
            if example.relation not in known:
                raise InputError(
                    f"{place}: example {example.id} has the label {example.relation!r}, which is"
                    f" not in the schema ({', '.join(self.labels)}); correct it or add it to"
                    " data.labels"
                )


# Key of the only schema of a run, which holds for all its files regardless of their names.
ANY = ""


@dataclass(frozen=True)
class Schemas:
    """The schema of each dataset of a run, by the dataset's name; a run on one source has its
    schema under `ANY`.
    """

    by_dataset: Mapping[str, Schema]

    def of(self, dataset: str) -> Schema:
        """The schema of a dataset. Raises InputError where the run has none for it."""
        schema = self.by_dataset.get(dataset) or self.by_dataset.get(ANY)
        if schema is None:
            raise InputError(
                f"{dataset}: not a dataset of data.train, so its labels are not known; give them in"
                f" data.labels.{dataset}"
            )
        return schema

    def check(self, examples: Iterable[Example], place: str, strict: bool = False) -> list[str]:
        """A notice for each dataset with examples whose label is outside of its schema.

        Raises InputError instead where the schema, or the argument, is strict.
        """
        notices = []
        for name, members in by_dataset(examples).items():
            schema = self.of(name)
            known = set(schema.labels)
            outside = [example for example in members if example.relation not in known]
            if outside and (strict or schema.strict):
                schema.check(outside, place)
            if outside:
                labels = sorted({example.relation for example in outside})
                listed = f"{', '.join(labels[:3])}{', ...' if labels[3:] else ''}"
                notices.append(
                    f"{place}: {len(outside):,} of {len(members):,} examples of {name} have labels"
                    f" outside of its schema ({listed})"
                )
        return notices

    def to_json(self) -> dict[str, list]:
        return {
            name: [list(schema.labels), schema.strict] for name, schema in self.by_dataset.items()
        }

    @classmethod
    def from_json(cls, tree: dict[str, list]) -> Schemas:
        return cls({name: Schema(tuple(labels), strict) for name, (labels, strict) in tree.items()})


def by_dataset(examples: Iterable[Example]) -> dict[str, list[Example]]:
    """The examples of each dataset, in their order; the datasets by name."""
    groups = defaultdict(list)
    for example in examples:
        groups[example.dataset].append(example)
    return {name: groups[name] for name in sorted(groups)}


def label_counts(examples: Iterable[Example]) -> Counter[str]:
    """The number of examples of each label."""
    return Counter(example.relation for example in examples)
