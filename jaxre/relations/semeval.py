"""SemEval-2010 Task 8 (Hendrickx et al. 2010) in its original format.

Four lines per item; the label carries the direction, e1 is always the head and e2 the tail:

    1<TAB>"The system ... an arrayed <e1>configuration</e1> of antenna <e2>elements</e2>."
    Component-Whole(e2,e1)
    Comment: Not a collection: there is structure here, organisation.
    <empty line>

Measured on the release: ASCII, train 8,000 and test 2,717 items, 19 labels. The test gold is read
from TEST_FILE_FULL.TXT: TEST_FILE_KEY.TXT of some releases has lost the directions. 16 test
sentences also occur in train, with another pair marked (`sources.overlap` reports them).
"""

from __future__ import annotations

import re
from pathlib import Path

from jaxre.errors import InputError
from jaxre.relations.files import nearest, read_lines, split_file
from jaxre.relations.marks import strip_marks
from jaxre.relations.schema import Example

NAME = "semeval2010_task8"
FILES = {"train": "TRAIN_FILE.TXT", "test": "TEST_FILE_FULL.TXT"}

_RELATIONS = (
    "Cause-Effect",
    "Component-Whole",
    "Content-Container",
    "Entity-Destination",
    "Entity-Origin",
    "Instrument-Agency",
    "Member-Collection",
    "Message-Topic",
    "Product-Producer",
)
# All 19: Entity-Destination(e2,e1) occurs once in train and once in test, and counts.
LABELS = (
    *sorted(f"{relation}({order})" for relation in _RELATIONS for order in ("e1,e2", "e2,e1")),
    "Other",
)

_ITEM = re.compile(r'(\d+)\t"(.*)"\s*')


def read_semeval(folder: Path, split: str | None) -> list[Example]:
    """Reads `train` or `test`, in file order, with ids such as `semeval2010_task8/train/1`.

    Args:
      folder: of the unpacked release; its files may be at any depth.
      split: train or test (the benchmark has no validation split; use `part`).
    Raises:
      InputError: unknown split, missing file; a record that is not as above, broken tags, an
        unknown label, an id that occurs twice (each names file:line).
    """
    path = split_file(folder, NAME, split, FILES)
    lines = read_lines(path)
    examples: list[Example] = []
    line_of: dict[str, int] = {}
    at = 0
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        number, example = _item(path, at, lines[at : at + 4], split)
        if number in line_of:
            raise InputError(
                f"{path}:{at + 1}: item {number} occurs twice, first at line {line_of[number]};"
                " remove one of them"
            )
        line_of[number] = at + 1
        examples.append(example)
        at += 4
    return examples


def _item(path: Path, at: int, record: list[str], split: str) -> tuple[str, Example]:
    """The number and the example of the four lines that start at line index `at`."""
    sentence, label, comment, end = [*record, "", "", ""][:4]
    item = _ITEM.fullmatch(sentence)
    if not item:
        raise InputError(
            f'{path}:{at + 1}: not an item; it should read: number, tab, "sentence" in quotes'
        )
    label = label.strip()
    if label not in LABELS:
        raise InputError(
            f"{path}:{at + 2}: {label!r} is not a label of SemEval-2010 Task 8; the nearest is"
            f" {nearest(label, LABELS)}"
        )
    if not comment.startswith("Comment:"):
        raise InputError(
            f'{path}:{at + 3}: no comment; the third line of an item starts with "Comment:" (and'
            " may end there)"
        )
    if end.strip():
        raise InputError(
            f"{path}:{at + 4}: the item does not end here; put an empty line between two items"
        )
    number, marked = item.groups()
    try:
        text, head_span, tail_span = strip_marks(marked)
    except ValueError as error:
        raise InputError(f"{path}:{at + 1}: {error}") from None
    return number, Example.with_spans(
        text,
        head_span,
        tail_span,
        id=f"{NAME}/{split}/{number}",
        dataset=NAME,
        split=split,
        relation=label,
    )
