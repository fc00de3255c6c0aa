"""Inserts and strips entity marks, `<e1>head</e1> ... <e2>tail</e2>`, and locates entities without
a span.

A span is a half-open character range `(start, end)` of the text without marks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

Span = tuple[int, int]

_TAG = re.compile(r"</?e[12]>")
_TAGS = ("<e1>", "</e1>", "<e2>", "</e2>")


def has_marks(text: str) -> bool:
    """True if all four tags occur."""
    return all(tag in text for tag in _TAGS)


def has_tag(text: str) -> bool:
    """True if any of the four tags occurs."""
    return _TAG.search(text) is not None


def strip_marks(text: str) -> tuple[str, Span, Span]:
    """The text without its tags, the span of e1 and the span of e2.

    Spans exclude white space just inside a tag, which remains in the text. The two may nest or
    cross.

    Raises:
      ValueError: a tag that is missing, occurs twice or closes before it opens; an entity
        without text. The message names the tag; the caller adds the place.
    """
    at: dict[str, int] = {}
    removed = 0
    for tag in _TAG.finditer(text):
        if tag.group() in at:
            raise ValueError(f"{tag.group()} occurs twice; mark one head and one tail")
        at[tag.group()] = tag.start() - removed
        removed += len(tag.group())
    missing = [tag for tag in _TAGS if tag not in at]
    if missing:
        raise ValueError(
            f"no {' and no '.join(missing)}; mark the head as <e1>head</e1> and the tail as"
            " <e2>tail</e2>"
        )
    plain = _TAG.sub("", text)
    return plain, _trimmed(plain, "e1", at), _trimmed(plain, "e2", at)


def _trimmed(plain: str, name: str, at: dict[str, int]) -> Span:
    start, end = at[f"<{name}>"], at[f"</{name}>"]
    if end < start:
        raise ValueError(f"</{name}> stands before <{name}>; swap them")
    inside = plain[start:end]
    if not inside.strip():
        raise ValueError(f"nothing between <{name}> and </{name}>; put the tags around the entity")
    return start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())


def join_tokens(tokens: Sequence[str]) -> tuple[str, list[Span]]:
    """The tokens joined by single spaces, and the span of each."""
    ends = list(itertools.accumulate(len(token) + 1 for token in tokens))
    return " ".join(tokens), [
        (end - 1 - len(token), end - 1) for token, end in zip(tokens, ends, strict=True)
    ]


def squeezed(text: str) -> str:
    """The text without white space, for comparison: two releases may differ in white space only."""
    return "".join(text.split())


def only_occurrence(text: str, entity: str) -> Span | None:
    """The span of an entity that occurs once in the text, spelled exactly so; else None."""
    spans = occurrences(text, entity)
    return spans[0] if len(spans) == 1 and text[slice(*spans[0])] == entity else None


def is_text(value: str) -> bool:
    """True if UTF-8 can encode the value: JSON can escape half a surrogate pair, and a command line
    can contain any bytes.
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def insert_marks(
    text: str,
    head_span: Span | None,
    tail_span: Span | None,
    marks: tuple[str, str, str, str] = _TAGS,
) -> str:
    """Marks the head with `<e1>` and the tail with `<e2>`, or with other `marks`; an entity without
    a span is not marked.

    `strip_marks` is the inverse. Nested entities nest their tags (`<e1>New <e2>York</e2></e1>`;
    of two equal spans e1 is outside); crossing entities cross them (`<e1>a <e2>b</e1> c</e2>`), so
    that each tag is exactly where its entity begins or ends.
    """
    tags = []
    for name, span, before, after in (("e1", head_span, *marks[:2]), ("e2", tail_span, *marks[2:])):
        if span is None:
            continue
        start, end = span
        # At the same place, ends come before begins. Of two begins, the longer entity is outside,
        # hence first; of two ends, the entity that began later is inside, hence first.
        tags.append((start, 1, -end, name, before))
        tags.append((end, 0, -start, "e2" if name == "e1" else "e1", after))
    pieces, done = [], 0
    for place, *_, tag in sorted(tags):
        pieces += [text[done:place], tag]
        done = place
    return "".join([*pieces, text[done:]])


def occurrences(text: str, entity: str) -> list[Span]:
    """The spans of an entity in the text, from left to right.

    They are occurrences as whole words if there are any ("US" inside "USA" does not count if "US"
    also occurs alone), else all occurrences, else those with other white space: published copies
    have the entity "Willowdell , Darke County" with the text "Willowdell, Darke County".
    """
    if not entity:
        return []
    if entity in text:
        spans = [match.span() for match in re.finditer(re.escape(entity), text)]
        return [span for span in spans if not any(_inside_word(text, at) for at in span)] or spans
    parts = [re.escape(part) for part in entity.split()]
    if len(parts) < 2:
        return []
    return [match.span() for match in re.finditer(r"\s*".join(parts), text)]


def _inside_word(text: str, place: int) -> bool:
    return 0 < place < len(text) and text[place - 1].isalnum() and text[place].isalnum()


def locate(
    text: str, head: str, tail: str, head_span: Span | None = None, tail_span: Span | None = None
) -> tuple[Span | None, Span | None]:
    """The spans to mark: the given ones, else the first occurrences, else None.

    If an entity occurs several times, the first pair of occurrences that do not overlap is taken,
    so that a head and a tail with the same words are marked at two places.
    """
    heads = [head_span] if head_span else occurrences(text, head)
    tails = [tail_span] if tail_span else occurrences(text, tail)
    for first, second in itertools.product(heads, tails):
        if first[1] <= second[0] or second[1] <= first[0]:
            return first, second
    return (heads[0] if heads else None), (tails[0] if tails else None)
