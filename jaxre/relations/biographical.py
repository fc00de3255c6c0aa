"""Biographical (Plum et al. 2022): sentences of Wikipedia about people, labelled by distant
supervision, some of them also by people.

Tab-separated with a header. One column holds the sentence with `<e1>..</e1>` and `<e2>..</e2>`
(recognised by its marks); `relation` is the distant label; `P1` and `P2` name the tag of the
subject and of the object (without them e1 is the subject); `ANNOTATION`, in m2_gold.tsv, is the
human label, which differs on about a fifth of the rows.

Splits: `train`, `test`; the same with `_coref` and `_skip` for the two other ways of building the
set; `gold` with the human labels, `gold_distant` with the distant labels of the same rows. Labels:
birthdate, bplace_name, deathdate, dplace_name, occupation, educatedAt, parent, child, sibling,
Other (negative). The files were not available: the format is tested with rows of our own.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from jaxre.errors import InputError
from jaxre.relations.files import Record, read_text, split_file
from jaxre.relations.marks import has_marks, strip_marks
from jaxre.relations.schema import Example, Reading

NAME = "biographical"
DOMAIN = "literary"
FILES = {
    f"{split}{variant}": f"m2{variant}_{split}.tsv"
    for split in ("train", "test")
    for variant in ("", "_coref", "_skip")
} | dict.fromkeys(("gold", "gold_distant"), "m2_gold.tsv")

UNJUDGED = "rows are left out: no human label"
DISAGREE = "human labels differ from the distant ones"


def read_biographical(folder: Path, split: str | None) -> Reading:
    """Reads the rows of a split, with ids such as `biographical/gold/17` (row from 1).

    Raises:
      InputError: unknown split, missing file, a row that is not as above (names file:line).
    """
    return read_biographical_rows(_rows(split_file(folder, NAME, split, FILES)), split, NAME)


def _rows(path: Path) -> Iterator[Record]:
    table = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t", strict=True)
    line = 1
    try:
        header = next(table)
        for cells in table:
            place, line = f"{path}:{line + 1}", table.line_num
            if cells and len(cells) != len(header):
                raise InputError(
                    f"{place}: {len(cells)} cells under {len(header)} columns; quote a text that"
                    " has a tab, quote or line end"
                )
            if cells:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(
            f"{path}:{line + 1}: not a table between tabs: {error}; double a quote inside a quoted"
            " text"
        ) from None


def read_biographical_rows(rows: Iterable[Record], split: str, prefix: str) -> Reading:
    """Reads rows by column name. Raises InputError as `read_biographical`."""
    examples, account = [], defaultdict(list)
    for number, (place, row) in enumerate(rows, start=1):
        identity = f"{prefix}/{split}/{number}"
        distant, human = ((row.get(key) or "").strip() for key in ("relation", "ANNOTATION"))
        if split == "gold" and not human:
            account[UNJUDGED].append(identity)
            continue
        if split == "gold" and human != distant:
            account[DISAGREE].append(identity)
        label = human if split == "gold" else distant
        if not label:
            raise InputError(
                f'{place}: no "relation"; a row has relation, and a sentence with <e1> and <e2>'
            )
        examples.append(_example(place, row, split, identity, label))
    return Reading(examples, dict(account))


def _example(place: str, row: dict, split: str, identity: str, label: str) -> Example:
    sentences = [value for value in row.values() if isinstance(value, str) and has_marks(value)]
    if len(sentences) != 1:
        raise InputError(
            f"{place}: {len(sentences) or 'no'} columns with <e1>..</e1> and <e2>..</e2>; one must"
            " hold the marked sentence"
        )
    try:
        text, *marked = strip_marks(sentences[0])
    except ValueError as error:
        raise InputError(f"{place}: {error}") from None
    return Example.with_spans(
        text,
        *(marked[number] for number in _order(place, row)),
        id=identity,
        dataset=NAME,
        split=split,
        relation=label,
        domain=DOMAIN,
    )


def _order(place: str, row: dict) -> list[int]:
    """Indices, 0 for e1 and 1 for e2, of the subject and the object."""
    if "P1" not in row and "P2" not in row:
        return [0, 1]
    tags = [str(row.get(key)).strip().strip("<>").lower() for key in ("P1", "P2")]
    if sorted(tags) != ["e1", "e2"]:
        raise InputError(
            f"{place}: P1 is {row.get('P1')!r} and P2 {row.get('P2')!r}; they name the tags of"
            " subject and object, e1 and e2"
        )
    return [int(tag[1]) - 1 for tag in tags]
