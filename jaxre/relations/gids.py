"""GIDS (Jat et al. 2018): one sentence with a pair per line, six tab-separated columns.

    HEAD_ID  TAIL_ID  Ada_Lovelace  London  /people/person/place_of_birth
        Ada_Lovelace came from London. ###END###

The words of an entity are joined by `_`, in the sentence too; we write both with spaces (the same
number of characters, so spans are those of the file). Other `_`, as in addresses, remain. Negative
label: `NA`.

Measured: validation 1,864 and test 5,663, 5 labels. The published training file (11,297) is not in
the public repository; `train_first_release` reads the 1,218 rows of the first release whose pairs
and sentences are not in validation or test. In 452 of these the tail does not occur in the sentence
(`sources.unlocated`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from jaxre.errors import InputError
from jaxre.relations.files import Record, nearest, read_lines, split_file
from jaxre.relations.marks import Span, only_occurrence
from jaxre.relations.schema import Example, Reading

NAME = "gids"
FILES = {
    "train": "train.tsv",
    "validation": "dev.tsv",
    "test": "test.tsv",
    "train_first_release": "train.first_release_subset.tsv",
}
_DEGREE = "/people/person/education./education/education/degree"
LABELS = (
    "/people/deceased_person/place_of_death",
    _DEGREE,
    "/people/person/education./education/education/institution",
    "/people/person/place_of_birth",
    "NA",
)
# The release's relation2id.txt has `degrees` for the `degree` of its rows.
_SPELLED = {_DEGREE + "s": _DEGREE}
_END = re.compile(r"\s*###END###\s*$")
# the hub's names, in the order of the file
_COLUMNS = (
    "subj_id",
    "obj_id",
    "subj_text",
    "obj_text",
    "relation",
    "sentence",
)


def read_gids(folder: Path, split: str | None) -> Reading:
    """Reads a split, with ids such as `gids/test/17` (line of the file).

    Raises:
      InputError: unknown split, missing file, a line that is not as above, an unknown label (each
        names file:line).
    """
    path = split_file(folder, NAME, split, FILES)
    return read_gids_rows(_rows(path), split, NAME)


def _rows(path: Path) -> Iterable[Record]:
    for number, line in enumerate(read_lines(path), start=1):
        cells = line.split("\t")
        if len(cells) != len(_COLUMNS):
            raise InputError(
                f"{path}:{number}: {len(cells)} columns; a row has 6, separated by tabs: two ids,"
                " two names, label, sentence"
            )
        yield f"{path}:{number}", dict(zip(_COLUMNS, cells, strict=True))


def read_gids_rows(rows: Iterable[Record], split: str, prefix: str) -> Reading:
    """Reads rows with the columns of the hub's copy (DFKI-SLT/gids). Raises InputError as
    `read_gids`.
    """
    return Reading(
        [
            _example(place, row, split, f"{prefix}/{split}/{number}")
            for number, (place, row) in enumerate(rows, start=1)
        ]
    )


def _example(place: str, row: dict, split: str, identity: str) -> Example:
    try:
        names, label = (row["subj_text"], row["obj_text"]), row["relation"]
        sentence = _END.sub("", row["sentence"])
    except (KeyError, TypeError):
        raise InputError(f"{place}: not a row of GIDS; it has {', '.join(_COLUMNS)}") from None
    label = _SPELLED.get(label, label)
    if label not in LABELS:
        raise InputError(
            f"{place}: {label!r} is not a label of GIDS; the nearest is"
            f" {nearest(str(label), LABELS)}"
        )
    if not (sentence.strip() and all(name.strip("_ ") for name in names)):
        raise InputError(f"{place}: an empty sentence or name; correct the row")
    text = sentence
    for name in names:
        text = text.replace(name, name.replace("_", " "))
    head, tail = (name.replace("_", " ") for name in names)
    head_span, tail_span = (_span(sentence, text, name) for name in names)
    return Example(
        id=identity,
        dataset=NAME,
        split=split,
        text=text,
        head=head,
        tail=tail,
        relation=label,
        head_span=head_span,
        tail_span=tail_span,
    )


def _span(sentence: str, text: str, name: str) -> Span | None:
    """The only occurrence of the name as a whole word (`Boston` is not `Boston_College`), else the
    only occurrence anywhere, else None.
    """
    alone = [match.span() for match in re.finditer(rf"(?<!\S){re.escape(name)}(?!\S)", sentence)]
    return alone[0] if len(alone) == 1 else only_occurrence(text, name.replace("_", " "))
