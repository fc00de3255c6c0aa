"""REBEL (Huguet Cabot and Navigli 2021): Wikipedia abstracts aligned with Wikidata, one JSON object
per line.

    {"docid": "7", "text": "...", "triples": [{"subject": {"surfaceform": "Ada", "boundaries": [0,
        3]},
     "predicate": {"surfaceform": "place of birth"}, "object": {...}}], ...}

The full release has a file per split (en_train.jsonl, en_val.jsonl, en_test.jsonl). The authors'
sample is one file; it is divided 80/10/10 by a fixed hash of `docid`, so that no document is in two
splits.

Measured on the sample: 1,000 documents, 80 of them without a triple, 2,868 triples, 186 predicates
(26 of them not in the authors' relations_count.tsv). Boundaries count characters, but 636 of 5,736
are two or four to the right of their entity; each is moved to the nearest occurrence of the surface
form. REBEL states no unrelated pairs, and pairs that it does not align may still be related, so no
negatives are constructed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from jaxre.errors import InputError
from jaxre.relations.draws import SPLITS, split_of
from jaxre.relations.files import Record, check_split, json_lines, split_file
from jaxre.relations.marks import Span
from jaxre.relations.schema import Example, Reading

NAME = "rebel"
FILES = {"train": "en_train.jsonl", "validation": "en_val.jsonl", "test": "en_test.jsonl"}
SAMPLE = "sample.jsonl"

MOVED = "boundaries do not enclose their entity and are moved to its nearest occurrence"
LOST = "triples are left out: an entity is not in the text"


def read_rebel(folder: Path, split: str | None) -> Reading:
    """Reads each triple as an example, in file order, with ids such as `rebel/train/30113940/2`
    (document, number of the triple from 1).

    Raises:
      InputError: unknown split, missing file, a line that is not as above (names file:line).
    """
    check_split(NAME, split, SPLITS)
    if (
        folder.is_dir()
        and any(folder.rglob(SAMPLE))
        and not any(any(folder.rglob(name)) for name in FILES.values())
    ):
        path = split_file(folder, NAME, split, dict.fromkeys(SPLITS, SAMPLE))
        return read_rebel_rows(
            (row for row in json_lines(path) if split_of(_docid(*row)) == split), split, NAME
        )
    return read_rebel_rows(json_lines(split_file(folder, NAME, split, FILES)), split, NAME)


def _docid(place: str, row: dict) -> str:
    if not isinstance(row.get("docid"), str | int):
        raise InputError(f"{place}: no docid; a document has docid, text and triples")
    return str(row["docid"])


def read_rebel_rows(rows: Iterable[Record], split: str, prefix: str) -> Reading:
    """Reads documents in the format of the release. Raises InputError as `read_rebel`."""
    examples: list[Example] = []
    account: dict[str, list[str]] = defaultdict(list)
    for place, row in rows:
        document = f"{prefix}/{split}/{_docid(place, row)}"
        try:
            text = row["text"]
            triples = [
                (
                    triple["predicate"]["surfaceform"],
                    *(
                        (triple[side]["surfaceform"], triple[side]["boundaries"])
                        for side in ("subject", "object")
                    ),
                )
                for triple in row["triples"]
            ]
            for number, (relation, *sides) in enumerate(triples, start=1):
                identity = f"{document}/{number}"
                spans = [_span(text, *side) for side in sides]
                if None in spans:
                    account[LOST].append(identity)
                    continue
                for span, (_, stated) in zip(spans, sides, strict=True):
                    if stated and span != tuple(stated):
                        account[MOVED].append(identity)
                if not relation.strip():
                    raise ValueError
                examples.append(
                    Example.with_spans(
                        text, *spans, id=identity, dataset=NAME, split=split, relation=relation
                    )
                )
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{place}: not a document of REBEL; it has docid, text and triples of subject,"
                " predicate and object, each with surfaceform and boundaries"
            ) from None
    return Reading(examples, dict(account))


def _span(text: str, name: str, stated: list[int] | None) -> Span | None:
    """The occurrence of the name nearest to the stated boundaries, or the first without them."""
    start = stated[0] if stated else 0
    if not name:
        return None
    before, after = text.rfind(name, 0, start + len(name)), text.find(name, start)
    at = min((at for at in (before, after) if at >= 0), key=lambda at: abs(at - start), default=-1)
    return None if at < 0 else (at, at + len(name))
