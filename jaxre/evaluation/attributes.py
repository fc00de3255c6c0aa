"""Which slice of its dataset an example falls into: by entity types, by length of its text, by
distance of its entities.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxre.relations.marks import locate
from jaxre.relations.schema import Example

ENTITY_TYPES, LENGTH, DISTANCE = "entity types", "sentence length", "entity distance"

# Upper ends of the bins, in words; what is beyond the last is a bin too.
LENGTHS = (10, 20, 40, 80, 160)
DISTANCES = (0, 4, 9, 19, 39)


def attributes_of(example: Example) -> dict[str, str]:
    """Level -> name of the slice.

    Words are what white space separates. The distance is the number of words between the two
    entities, at the places that `marks.locate` finds; entities that overlap, and those that are not
    found, are slices of their own.
    """
    return {
        ENTITY_TYPES: f"{example.head_type or 'unknown'} -> {example.tail_type or 'unknown'}",
        LENGTH: _bin(len(example.text.split()), LENGTHS),
        DISTANCE: _distance(example),
    }


def _distance(example: Example) -> str:
    spans = locate(example.text, example.head, example.tail, example.head_span, example.tail_span)
    if spans[0] is None or spans[1] is None:
        return "not found in the text"
    first, second = sorted((spans[0], spans[1]))
    if second[0] < first[1]:
        return "entities overlap"
    return _bin(len(example.text[first[1] : second[0]].split()), DISTANCES)


def _bin(words: int, ends: Sequence[int]) -> str:
    """Such as `11-20 words`, from 0 or from one more than the last end."""
    starts = [0, *(end + 1 for end in ends)]
    for start, end in zip(starts, ends, strict=False):
        if words <= end:
            return f"{start}-{end} words" if start < end else f"{end} words"
    return f"{starts[-1]} words or more"
