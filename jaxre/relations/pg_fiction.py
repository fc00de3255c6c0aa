"""Artificial Relationships in Fiction (Christou and Tsoumakas 2025): pieces of novels, annotated by
a language model.

One row per piece, with the columns book_id, chunk_id, chunk, relations and others. `relations` is a
Python literal, read by `ast.literal_eval` and never executed: a list of {entity1, entity2,
entity1Type, entity2Type, relation}. An unreadable row (the published set has one) and an incomplete
relation are left out and counted.

The set is one file (Parquet, CSV or JSON Lines, as published or exported) without splits. It is
divided 80/10/10 by a fixed hash of `book_id`, so that no book is in two splits.

Relations are partly free text. `label_map: configs/labels/NAME.yaml` of a source (see `label_map`)
maps them to canonical labels; unlisted ones are left out and counted. A map of the published
ontology (137 strings to 48 labels) is not shipped, since its names are not in any source that may
be copied here; `configs/labels/pg_fiction-example.yaml` shows the form. The set itself was not
available: the format is tested with rows of our own. Published figures: 95,476 rows, 96 books,
128,331 relations.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from jaxre.errors import InputError
from jaxre.relations.draws import SPLITS, split_of
from jaxre.relations.files import Record, check_folder, check_split
from jaxre.relations.marks import is_text, only_occurrence
from jaxre.relations.schema import Example, Reading
from jaxre.relations.tables import SUFFIXES, read_rows

NAME = "pg_fiction"
DOMAIN = "literary"
COLUMNS = ("book_id", "chunk_id", "chunk", "relations")
_PARTS = ("entity1", "entity2", "relation")

MALFORMED = "rows are left out: relations is no readable list, or there is no text"
INCOMPLETE = "relations are left out: an entity or the relation is missing"


def read_pg_fiction(folder: Path, split: str | None) -> Reading:
    """Reads each relation as an example, in file order, with ids such as `pg_fiction/train/17/2`
    (row, number of the relation, from 1).

    Raises:
      InputError: unknown split, no folder, not exactly one file, columns other than above.
    """
    check_split(NAME, split, SPLITS)
    check_folder(folder, NAME)
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) != 1:
        raise InputError(
            f"{folder}: {len(paths) or 'no'} files of {', '.join(SUFFIXES)} below it (benchmark"
            f" {NAME}); it must hold exactly one"
        )
    return read_pg_fiction_rows(read_rows(paths[0]), split, NAME)


def read_pg_fiction_rows(rows: Iterable[Record], split: str, prefix: str) -> Reading:
    """Reads the rows whose book is in the split. Raises InputError: columns other than above."""
    examples: list[Example] = []
    account: dict[str, list[str]] = defaultdict(list)
    for number, (place, row) in enumerate(rows, start=1):
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise InputError(f"{place}: no column {missing[0]}; a row has {', '.join(COLUMNS)}")
        if split_of(str(row["book_id"])) != split:
            continue
        relations, text = _relations(row["relations"]), row["chunk"]
        if relations is None or not isinstance(text, str) or not (text.strip() and is_text(text)):
            account[MALFORMED].append(place)
            continue
        for which, relation in enumerate(relations, start=1):
            values = [relation.get(part) for part in _PARTS] if isinstance(relation, dict) else []
            if not values or not all(
                isinstance(value, str) and value.strip() and is_text(value) for value in values
            ):
                account[INCOMPLETE].append(f"{place}, relation {which}")
                continue
            head, tail, label = (value.strip() for value in values)
            types = [relation.get(key) for key in ("entity1Type", "entity2Type")]
            head_type, tail_type = (
                name if isinstance(name, str) and name else None for name in types
            )
            examples.append(
                Example(
                    id=f"{prefix}/{split}/{number}/{which}",
                    dataset=NAME,
                    split=split,
                    text=text,
                    head=head,
                    tail=tail,
                    relation=label,
                    head_type=head_type,
                    tail_type=tail_type,
                    head_span=only_occurrence(text, head),
                    tail_span=only_occurrence(text, tail),
                    domain=DOMAIN,
                )
            )
    return Reading(examples, dict(account))


def _relations(value: object) -> list | None:
    """The list written as a Python literal; None if it is no readable list."""
    try:
        relations = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return relations if isinstance(relations, list) else None
