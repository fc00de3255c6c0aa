"""TACRED (Zhang et al. 2017, LDC2018T24) from the JSON files of its release; a holder puts them
below `JAXRE_DATA/tacred`.

    {"id": "...", "relation": "org:founded_by", "token": ["Ada", ...], "subj_start": 0, "subj_end":
        1, "subj_type": "PERSON",
     "obj_start": 5, "obj_end": 5, "obj_type": "ORGANIZATION", ...}

Token ranges are inclusive at both ends. The subject is the head. A text is the tokens joined by
single spaces, with brackets spelled as in the release (-LRB-). The negative label is `no_relation`.
Types are those of the Stanford recogniser. TACRED is licensed, so the format is tested with records
of our own.
"""

from __future__ import annotations

from pathlib import Path

from jaxre.errors import InputError
from jaxre.relations.files import Record, json_array, split_file
from jaxre.relations.marks import join_tokens
from jaxre.relations.schema import Example, Reading

NAME = "tacred"
FILES = {"train": "train.json", "validation": "dev.json", "test": "test.json"}


def read_tacred(folder: Path, split: str | None) -> Reading:
    """Reads a split, in file order, with ids such as `tacred/train/61b3a5c8c9`.

    Raises:
      InputError: unknown split, missing file, broken JSON, a record that does not fit its own
        tokens (names the record).
    """
    path = split_file(folder, NAME, split, FILES)
    return Reading([_example(record, split) for record in json_array(path, "record")])


def _example(placed: Record, split: str) -> Example:
    place, record = placed
    try:
        tokens, name, relation = record["token"], record["id"], record["relation"]
        ranges = {
            side: (record[f"{side}_start"], record[f"{side}_end"], record[f"{side}_type"])
            for side in ("subj", "obj")
        }
        valid = (
            isinstance(tokens, list)
            and all(isinstance(value, str) for value in (*tokens, name, relation))
            and all(type(at) is int for first, last, _ in ranges.values() for at in (first, last))
        )
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise InputError(
            f"{place}: not a record of TACRED; it has id, token, relation and, for subj and obj,"
            " _start, _end and _type"
        )
    text, places = join_tokens(tokens)
    spans = {}
    for side, (first, last, _) in ranges.items():
        if not 0 <= first <= last < len(tokens):
            raise InputError(
                f"{place}: {side}_start {first} and {side}_end {last} are not tokens of the"
                f" {len(tokens)}; the end is inclusive"
            )
        spans[side] = places[first][0], places[last][1]
    return Example.with_spans(
        text,
        spans["subj"],
        spans["obj"],
        id=f"{NAME}/{split}/{name}",
        dataset=NAME,
        split=split,
        relation=relation,
        head_type=ranges["subj"][2] or None,
        tail_type=ranges["obj"][2] or None,
    )
