"""Converts records with named columns to examples, for files and hub datasets.

Our fields are those of `FIELDS`. A field is read from the column that the mapping names, else
from the column of its own name, else from the one that published copies use (`USUAL`). A field
mapped to "" has no column, even if there is one of its name.

The places of the entities come from, in this order: marks in the text
(`<e1>head</e1> ... <e2>tail</e2>`, which are removed), a span column (two-element list, or
`head_start` and `head_end`; half-open characters of `text`), the only occurrence of the entity
in the text. An entity that occurs several times gets no span; prompts then mark the first
occurrence (`marks.locate`). Facts that are stated twice must agree.

`prompt_0_shot` is the study's raw prompt; its hash in the example joins cached answers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jaxre.errors import InputError
from jaxre.relations.files import nearest
from jaxre.relations.marks import (
    Span,
    has_marks,
    has_tag,
    is_text,
    occurrences,
    only_occurrence,
    strip_marks,
)
from jaxre.relations.schema import Domain, Example, hash_prompt

FIELDS = (
    *("id", "text", "head", "tail", "head_type", "tail_type", "relation", "domain"),
    *("head_span", "tail_span", "head_start", "head_end", "tail_start", "tail_end"),
    "prompt_0_shot",
)
# The columns of the study's hub copies (protocol.md), and the text column of the original SemEval
# there.
USUAL = {
    "head": "entity1",
    "tail": "entity2",
    "head_type": "entity1Type",
    "tail_type": "entity2Type",
    "text": "sentence",
}

Columns = Mapping[str, str]  # our field -> column
KEY = "columns"  # default name of the mapping in messages


class NoColumn(InputError):
    """A file or dataset lacks a column that the mapping or the task needs."""


class RecordWithoutColumn(NoColumn):
    """A record whose text has no marks, in a file or dataset without a column for its head or
    tail.
    """


def resolve(
    mapping: Columns, names: Collection[str], place: str, labelled: bool = True, key: str = KEY
) -> dict[str, str]:
    """Returns field -> column, for the fields that have a column.

    Args:
      mapping: our field -> column, from the config (`Source.columns`).
      names: the existing columns.
      place: file or dataset, for errors.
      labelled: requires a column for `relation`.
      key: config key of the mapping, for errors.
    Raises:
      InputError: the mapping names an unknown field; as NoColumn, the mapping names an unknown
        column, or there is no column for the text, or (with `labelled`) the relation.
    """
    for field, name in mapping.items():
        if field not in FIELDS:
            raise InputError(
                f"{place}: {key}.{field}: no such field; the nearest is {nearest(field, FIELDS)}"
            )
        if name and name not in names:
            raise NoColumn(
                f"{place}: {key}.{field}={name}: no such column; {_nearest_column(name, names)}"
            )
    column = {}
    for field in FIELDS:
        candidates = [mapping[field]] if field in mapping else [field, USUAL.get(field, field)]
        present = [name for name in candidates if name in names]
        if present:
            column[field] = present[0]
    for field in ("text", "relation") if labelled else ("text",):
        if field not in column:
            raise NoColumn(_no_column(place, field, names, key))
    return column


def _nearest_column(name: str, names: Collection[str]) -> str:
    if not names:
        return "there are no columns"
    return f"the nearest of {', '.join(names)} is {nearest(name, names)}"


def _no_column(place: str, field: str, names: Collection[str], key: str) -> str:
    marks = " (or mark the entities in the text: <e1>head</e1>, <e2>tail</e2>)"
    return (
        f'{place}: no column for "{field}"; {_nearest_column(field, names)}; map it with'
        f" {key}.{field}=NAME{marks if field in ('head', 'tail') else ''}"
    )


def read_records(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    column: Columns,
    dataset: str,
    split: str,
    labelled: bool = True,
    must_occur: bool = True,
    key: str = KEY,
    prefix: str | None = None,
    domain: Domain = "general",
) -> list[Example]:
    """One example per record, in order.

    Args:
      records: (place for errors, values by column name).
      column: what `resolve` returned.
      dataset, split: of the examples; an id is `dataset/split/own`, own being the id column or
        the number of the record from 1. An empty split is left out.
      labelled: requires a relation in every record; otherwise a missing one is "".
      must_occur: makes an entity that does not occur in its text an error. Some published sets
        name entities in other words than the text; without `must_occur` they have no span.
      key: as in `resolve`.
      prefix: replaces the dataset in ids.
      domain: of records that state none.
    Raises:
      InputError: the first record that breaks the rules of the module.
    """
    examples: list[Example] = []
    place_of: dict[str, str] = {}
    for number, (place, record) in enumerate(records, start=1):
        values = _Record(place, record, column, key)
        own = values.text("id") if "id" in column else str(number)
        if own is None:
            raise InputError(f'{place}: no "id"; add it, or number the records with {key}.id=""')
        if own in place_of:
            raise InputError(
                f"{place}: id {own!r} is that of {place_of[own]}; correct it, or number the records"
                f' with {key}.id=""'
            )
        place_of[own] = place
        identity = "/".join(part for part in (prefix or dataset, split, own) if part)
        examples.append(_example(values, identity, dataset, split, labelled, must_occur, domain))
    return examples


def _example(
    values: _Record,
    identity: str,
    dataset: str,
    split: str,
    labelled: bool,
    must_occur: bool,
    domain: str,
) -> Example:
    text = values.needed("text", strip=False)
    marked: dict[str, Span | None] = {"head": None, "tail": None}
    if has_marks(text) or (
        has_tag(text) and not values.places("head") and not values.places("tail")
    ):
        try:
            text, marked["head"], marked["tail"] = strip_marks(text)
        except ValueError as error:
            raise InputError(f"{values.place}: {error}") from None
    head, head_span = _entity(values, "head", text, marked["head"], must_occur)
    tail, tail_span = _entity(values, "tail", text, marked["tail"], must_occur)
    prompt = values.text("prompt_0_shot", strip=False)
    return Example(
        id=identity,
        dataset=dataset,
        split=split,
        text=text,
        head=head,
        tail=tail,
        relation=values.needed("relation") if labelled else values.text("relation") or "",
        head_type=values.type("head_type"),
        tail_type=values.type("tail_type"),
        head_span=head_span,
        tail_span=tail_span,
        domain=values.text("domain") or domain,
        prompt_hash=None if prompt is None else hash_prompt(prompt),
    )


def _entity(
    values: _Record, side: str, text: str, marked: Span | None, must_occur: bool
) -> tuple[str, Span | None]:
    """Name and span of the head or tail."""
    name, stated = values.text(side), values.span(side)
    span = marked or stated
    if span:
        if stated and stated != span:
            raise InputError(
                f"{values.place}: {side}_span {list(stated)} differs from the marked {side}"
                f" {list(span)}; remove one of them"
            )
        start, end = span
        if not 0 <= start < end <= len(text):
            raise InputError(
                f"{values.place}: {side}_span [{start}, {end}] is not in the text ({len(text)}"
                " characters); give its half-open range"
            )
        spelled = text[start:end]
        if name is not None and name != spelled:
            hint = (
                "the end is the first character after it"
                if text[start : end + 1] == name
                else f"correct the span or the {side}"
            )
            raise InputError(
                f"{values.place}: {side}_span [{start}, {end}] spells {_short(spelled)}, the {side}"
                f" is {_short(name)}; {hint}"
            )
        return spelled, span
    if not values.places(side):
        raise RecordWithoutColumn(_no_column(values.place, side, list(values.record), values.key))
    if name is None:
        raise InputError(
            f'{values.place}: no "{values.column.get(side, side)}"; add it or remove the record'
        )
    if must_occur and not occurrences(text, name):
        raise InputError(
            f"{values.place}: the {side} {_short(name)} does not occur in the text; correct its"
            " spelling or remove the record"
        )
    return name, only_occurrence(text, name)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


class _Record:
    """The values of one record by our field names; a missing column, null, NaN or blank is None."""

    def __init__(self, place: str, record: Mapping[str, Any], column: Columns, key: str):
        self.place, self.record, self.column, self.key = place, record, column, key

    def places(self, side: str) -> bool:
        """True if there is a column for the name or the span of the head or tail."""
        return any(field in self.column for field in (side, f"{side}_span", f"{side}_start"))

    def raw(self, field: str) -> Any:
        return self.record.get(self.column[field]) if field in self.column else None

    def text(self, field: str, strip: bool = True) -> str | None:
        """A value as text: 1 is "1", true is "true"; "NA", "no" and "null" stay as written."""
        value = self.raw(field)
        if value is None or value != value:  # NaN: other tools write it for missing values
            return None
        if isinstance(value, bool):
            value = str(value).lower()
        if not isinstance(value, str | int | float):
            raise InputError(
                f'{self.place}: "{self.column[field]}" is {_short(str(value))}, not text; give'
                f" {field} one value per record"
            )
        value = str(value)
        if not is_text(value):
            raise InputError(
                f'{self.place}: "{self.column[field]}" holds half a surrogate pair'
                f" ({_short(value)}); correct its escapes"
            )
        return (value.strip() if strip else value) if value.strip() else None

    def needed(self, field: str, strip: bool = True) -> str:
        value = self.text(field, strip)
        if value is None:
            label = field == "relation"
            advice = "write the label, such as none" if label else "add it or remove the record"
            raise InputError(f'{self.place}: no "{self.column[field]}"; {advice}')
        return value

    def type(self, field: str) -> str | None:
        value = self.text(field)
        return None if value == "None" else value  # a missing type in the study's hub copies

    def span(self, side: str) -> Span | None:
        """The stated span, from a list (in CSV: as text, `[3, 8]`) or from two columns."""
        bounds = self.raw(f"{side}_span")
        if bounds is None or bounds == "":
            bounds = [self.text(f"{side}_start"), self.text(f"{side}_end")]
            if bounds == [None, None]:
                return None
        try:
            start, end = json.loads(bounds) if isinstance(bounds, str) else bounds
            return _whole(start), _whole(end)
        except (TypeError, ValueError, OverflowError):
            raise InputError(
                f"{self.place}: {side}_span is {_short(str(bounds))}; give two whole numbers"
                " [start, end)"
            ) from None


def _whole(value: Any) -> int:
    if float(value) != int(float(value)):
        raise ValueError
    return int(float(value))
