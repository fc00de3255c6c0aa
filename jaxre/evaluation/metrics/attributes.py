"""Slices of an example: by entity types, length of its text and distance of its entities."""

from __future__ import annotations

from collections.abc import Sequence

from jaxre.relations.marks import locate
from jaxre.relations.schema import Example

ENTITY_TYPES, LENGTH, DISTANCE = "entity types", "sentence length", "entity distance"

# Upper ends of the bins, in words; a further bin has everything beyond the last end.
LENGTHS = (10, 20, 40, 80, 160)
DISTANCES = (0, 4, 9, 19, 39)


def attributes_of(example: Example) -> dict[str, str]:
    """Level -> name of the slice.

    Words are separated by white space. The distance is the number of words between the two
    entities, at the positions that `marks.locate` finds; entities that overlap or are not found
    have slices of their own.
    """
    return {
        ENTITY_TYPES: f"{example.head_type or 'unknown'} -> {example.tail_type or 'unknown'}",
        LENGTH: _bin(len(example.text.split()), LENGTHS),
        DISTANCE: _distance(example),
    }


def _distance(example: Example) -> str:
    head, tail = locate(
        example.text, example.head, example.tail, example.head_span, example.tail_span
    )
    if head is None or tail is None:
        return "not found in the text"
    (_, left_end), (right_start, _) = sorted((head, tail))
    if right_start < left_end:
        return "entities overlap"
    return _bin(len(example.text[left_end:right_start].split()), DISTANCES)


def _bin(words: int, ends: Sequence[int]) -> str:
    """Name of the bin of a number of words, such as `11-20 words`."""
    starts = [0, *(end + 1 for end in ends)]
    for start, end in zip(starts, ends, strict=False):
        if words <= end:
            return f"{start}-{end} words" if start < end else f"{end} words"
    return f"{starts[-1]} words or more"
