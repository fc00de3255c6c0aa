"""CoNLL04 (Roth and Yih 2004), from either of its two public copies.

`conll04` reads the unified JSON, `conll04_multihead` the original multi-head files. Both hold
the same 1,441 sentences, entities and relations, but:
- They share the test split and divide the other 1,153 sentences differently: train/validation
  is 922/231 in the JSON, 910/243 in the multi-head files. Train on one and validate on the other
  and you validate on training sentences: never mix them.
- The JSON attaches the final full stop to the last word, so that an entity there reads
  "Galveston."; the multi-head files separate it. Nothing else differs (measured).
- 20 distinct test sentences of the JSON are also in its train split (18 identical, 2 with other
  white space), 14 in validation (`sources.overlap` reports them).

A text is the tokens joined by single spaces. Every related pair is one example. The files contain
no negatives (each sentence has a relation), so they are constructed: an ordered pair of two
different entities of a sentence without a relation in that direction is a candidate for the label
`none`.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxre.errors import InputError
from jaxre.relations.draws import draw
from jaxre.relations.files import Record, json_array, nonempty_string, read_lines, split_file
from jaxre.relations.marks import Span, join_tokens
from jaxre.relations.schema import Example

UNIFIED = "conll04"
MULTIHEAD = "conll04_multihead"
NEGATIVE = "none"

UNIFIED_FILES = {
    "train": "train.CoNLL04.json",
    "validation": "valid.CoNLL04.json",
    "test": "test.CoNLL04.json",
}
MULTIHEAD_FILES = {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"}


@dataclass(frozen=True)
class Sentence:
    """Tokens with entities and relations; every range is a half-open range of tokens.

    `id` is the position in the JSON array, or the number of the `#doc` line.
    """

    id: str
    place: str
    tokens: list[str]
    entities: dict[Span, str]  # range -> type, in the order of the file
    relations: dict[tuple[Span, Span], str]  # (head, tail) -> label


def read_conll04(
    folder: Path, split: str | None, negatives: float = 1.0, seed: int = 42
) -> list[Example]:
    """Reads the unified JSON copy; see `_examples` for arguments and order.

    Raises:
      InputError: unknown split, missing file, broken JSON, a sentence that does not fit its own
        tokens or entities (names the sentence).
    """
    path = split_file(folder, UNIFIED, split, UNIFIED_FILES)
    return _examples(_unified_sentences(path), UNIFIED, split, negatives, seed)


def read_conll04_multihead(
    folder: Path, split: str | None, negatives: float = 1.0, seed: int = 42
) -> list[Example]:
    """Reads the original multi-head copy; see `_examples` for arguments and order.

    Raises:
      InputError: unknown split, missing file, a line that does not parse (names file:line).
    """
    path = split_file(folder, MULTIHEAD, split, MULTIHEAD_FILES)
    return _examples(_multihead_sentences(path), MULTIHEAD, split, negatives, seed)


def read_conll04_rows(
    rows: Iterable[Record], split: str, prefix: str, negatives: float = 1.0
) -> list[Example]:
    """Reads rows of the hub's copy (DFKI-SLT/conll04), in which a relation refers to its entities
    by their positions in the list of entities.

    Raises InputError: a row that does not fit its own tokens or entities.
    """
    return _examples(_hub_sentences(rows), UNIFIED, split, negatives, 42, prefix)


def _examples(
    sentences: Iterator[Sentence],
    dataset: str,
    split: str,
    negatives: float,
    seed: int,
    prefix: str | None = None,
) -> list[Example]:
    """Positives and drawn negatives in the order of the sentences, positives of a sentence first.

    Args:
      sentences: of one split.
      dataset, split: of the examples. An id is such as `conll04/test/17/5-7/10-11` (sentence, head
        and tail tokens).
      negatives: number to draw per positive of the split; all candidates if there are fewer.
      seed: of that draw, which depends on the ids only. The draw for 1 contains the draw for 0.5.
      prefix: replaces the dataset in the ids.
    """
    positives, candidates, order = [], [], {}
    for sentence in sentences:
        text, places = join_tokens(sentence.tokens)
        start = f"{prefix or dataset}/{split}/{sentence.id}"
        # Related pairs first, each pair once.
        pairs = dict.fromkeys([*sentence.relations, *itertools.permutations(sentence.entities, 2)])
        for head, tail in pairs:
            example = Example.with_spans(
                text,
                *((places[first][0], places[last - 1][1]) for first, last in (head, tail)),
                id=f"{start}/{head[0]}-{head[1]}/{tail[0]}-{tail[1]}",
                dataset=dataset,
                split=split,
                relation=sentence.relations.get((head, tail), NEGATIVE),
                head_type=sentence.entities[head],
                tail_type=sentence.entities[tail],
            )
            if example.id in order:
                raise InputError(
                    f"{sentence.place}: sentence {sentence.id} occurs twice; remove one of them"
                )
            order[example.id] = len(order)
            (positives if (head, tail) in sentence.relations else candidates).append(example)
    count = round(min(negatives * len(positives), len(candidates)))
    drawn = draw(candidates, count, f"negatives:{seed}")
    return sorted(positives + drawn, key=lambda example: order[example.id])


def _sentence(
    number: str,
    place: str,
    tokens: list[str],
    entities: list[tuple[Span, str]],
    relations: list[tuple[Span, Span, str]],
) -> Sentence:
    """Checks that every range is within the tokens, every relation between two entities, and no
    pair related twice.
    """
    types = dict(entities)
    for first, last in types:
        if not 0 <= first < last <= len(tokens):
            raise InputError(
                f"{place}: entity [{first}, {last}) is outside the {len(tokens)} tokens; correct"
                " the range"
            )
    labels: dict[tuple[Span, Span], str] = {}
    for head, tail, label in relations:
        for side, span in (("head", head), ("tail", tail)):
            if span not in types:
                raise InputError(
                    f"{place}: the {side} {list(span)} of {label} is not an entity of the sentence;"
                    " add or correct it"
                )
        if (head, tail) in labels:
            raise InputError(
                f"{place}: {list(head)} and {list(tail)} have two relations ({labels[head, tail]},"
                f" {label}); keep one"
            )
        labels[head, tail] = label
    return Sentence(number, place, tokens, types, labels)


def _unified_sentences(path: Path) -> Iterator[Sentence]:
    """`{"tokens": [...], "entities": [[first, last, type]], "relations": [[first, last, first,
    last, label]]}`, in one array.
    """
    for number, (place, record) in enumerate(json_array(path, "sentence")):
        try:
            if not isinstance(record["tokens"], list):
                raise TypeError
            tokens = [nonempty_string(token) for token in record["tokens"]]
            entities = [
                ((int(first), int(last)), nonempty_string(kind))
                for first, last, kind in record["entities"]
            ]
            relations = [
                ((int(a), int(b)), (int(c), int(d)), nonempty_string(label))
                for a, b, c, d, label in record["relations"]
            ]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{place}: not a sentence; it has tokens, entities [first, last, type] and"
                " relations [first, last, first, last, label]"
            ) from None
        yield _sentence(str(number), place, tokens, entities, relations)


def _hub_sentences(rows: Iterable[Record]) -> Iterator[Sentence]:
    for number, (place, row) in enumerate(rows):
        try:
            entities = [
                ((int(entity["start"]), int(entity["end"])), nonempty_string(entity["type"]))
                for entity in row["entities"]
            ]
            spans = dict(enumerate(span for span, _ in entities))
            relations = [
                (
                    spans[relation["head"]],
                    spans[relation["tail"]],
                    nonempty_string(relation["type"]),
                )
                for relation in row["relations"]
            ]
            tokens = [nonempty_string(token) for token in row["tokens"]]
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{place}: not a sentence; it has tokens, entities {{start, end, type}} and"
                " relations {head, tail, type}"
            ) from None
        yield _sentence(str(number), place, tokens, entities, relations)


def _multihead_sentences(path: Path) -> Iterator[Sentence]:
    """`#doc N`, then a token per line: index, token, BIO tag, list of relations, list of tails.

    A relation is on the line of the last token of its head and points at the last token of its
    tail; `['N']` pointing at the token itself means none. An `I-` tag that continues nothing begins
    an entity (two tokens of train; the rule of the CoNLL scorer, and so in the JSON copy).
    """
    lines = read_lines(path)
    starts = [at for at, line in enumerate(lines) if line.startswith("#doc")]
    if not starts or starts[0] != 0:
        raise InputError(f"{path}:1: no #doc line; is this the multi-head format?")
    for start, end in itertools.pairwise([*starts, len(lines)]):
        number = lines[start].removeprefix("#doc").strip()
        tokens, tags, arrows = [], [], []
        for at in range(start + 1, end):
            if not lines[at].strip():
                continue
            token, tag, labels, tails = _token(f"{path}:{at + 1}", lines[at], len(tokens))
            arrows += [
                (len(tokens), tail, label)
                for label, tail in zip(labels, tails, strict=True)
                if label != "N"
            ]
            tokens.append(token)
            tags.append(tag)
        entities = _entities(tags)
        at_last = {span[1] - 1: span for span, _ in entities}
        place = f"{path}:{start + 1}"
        for token in itertools.chain.from_iterable(arrow[:2] for arrow in arrows):
            if token not in at_last:
                raise InputError(
                    f"{place}: a relation of document {number} names token {token}, which ends no"
                    " entity; correct it"
                )
        yield _sentence(
            number,
            place,
            tokens,
            entities,
            [(at_last[head], at_last[tail], label) for head, tail, label in arrows],
        )


def _token(place: str, line: str, index: int) -> tuple[str, str, list[str], list[int]]:
    """Token, tag, relations and tail indices of one line."""
    cells = line.split("\t")
    if len(cells) != 5:
        raise InputError(
            f"{place}: {len(cells)} columns; a token has 5, separated by tabs: index, token, tag,"
            " relations, tails"
        )
    if cells[0] != str(index):
        raise InputError(
            f"{place}: index {cells[0]!r} where {index} was due; a line is missing or repeated"
        )
    if cells[2] != "O" and not (cells[2][:2] in ("B-", "I-") and cells[2][2:]):
        raise InputError(f"{place}: tag {cells[2]!r}; write O, B-TYPE or I-TYPE")
    try:
        labels, tails = ast.literal_eval(cells[3]), ast.literal_eval(cells[4])
        fits = (
            len(labels) == len(tails)
            and all(isinstance(x, str) for x in labels)
            and all(type(x) is int for x in tails)
        )
    except (ValueError, SyntaxError, TypeError):
        fits = False
    if not fits or not cells[1]:
        raise InputError(
            f"{place}: relations {cells[3]} and tails {cells[4]} must be lists of one length, such"
            " as ['Kill'] and [15]; correct the record"
        )
    return cells[1], cells[2], labels, tails


def _entities(tags: list[str]) -> list[tuple[Span, str]]:
    """Token ranges and types of a sequence of BIO tags."""
    entities: list[tuple[Span, str]] = []
    for at, tag in enumerate(tags):
        if tag == "O":
            continue
        kind = tag[2:]
        if tag[0] == "I" and entities and entities[-1][0][1] == at and entities[-1][1] == kind:
            entities[-1] = ((entities[-1][0][0], at + 1), kind)
        else:
            entities.append(((at, at + 1), kind))
    return entities
