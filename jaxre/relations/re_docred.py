"""Re-DocRED (Tan et al. 2022): documents of Wikipedia, every ordered pair of entities labelled with
none, one or several relations.

    [{"title": "...", "sents": [["Ada", "came", ...], ...],
      "vertexSet": [[{"name": "Ada", "type": "PER", "sent_id": 0, "pos": [0, 1]}, ...], ...],
      "labels": [{"r": "P19", "h": 0, "t": 3, "evidence": [0]}, ...]}, ...]

An example is a pair of entities with one label; a pair with several labels is as many examples.
Pairs without a label are negatives, `none`, drawn per labelled example (`Source.negatives`): there
are 14 times as many of them as of labelled pairs.

The text is a part of the document. The example marks the nearest mentions of the two entities
(mentions that do not overlap first); its text runs from the first of the two to the last, with
`Source.window` sentences on either side. If it is longer than WORDS tokens, the sentences farthest
from both mentions are replaced by `...`. So an example fits a row of 512 with a generic prompt. The
evidence sentences are ignored: they are unknown for a text that is still to be labelled.

Measured: 500 documents each in validation and test (dev_revised.json, test_revised.json), 17,284
and 17,448 labels on 13,362 and 13,627 pairs. Labels are the English names of 96 Wikidata
properties.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxre.errors import InputError
from jaxre.relations.draws import draw
from jaxre.relations.files import Record, json_array, nearest, nonempty_string, split_file
from jaxre.relations.marks import join_tokens
from jaxre.relations.schema import Example, Reading

NAME = "re_docred"
NEGATIVE = "none"
FILES = {
    "train": "train_revised.json",
    "validation": "dev_revised.json",
    "test": "test_revised.json",
}
WORDS = 250
GAP = "..."

# Wikidata's English labels of the properties that DocRED uses.
RELATIONS = {
    "P6": "head of government",
    "P17": "country",
    "P19": "place of birth",
    "P20": "place of death",
    "P22": "father",
    "P25": "mother",
    "P26": "spouse",
    "P27": "country of citizenship",
    "P30": "continent",
    "P31": "instance of",
    "P35": "head of state",
    "P36": "capital",
    "P37": "official language",
    "P39": "position held",
    "P40": "child",
    "P50": "author",
    "P54": "member of sports team",
    "P57": "director",
    "P58": "screenwriter",
    "P69": "educated at",
    "P86": "composer",
    "P102": "member of political party",
    "P108": "employer",
    "P112": "founded by",
    "P118": "league",
    "P123": "publisher",
    "P127": "owned by",
    "P131": "located in the administrative territorial entity",
    "P136": "genre",
    "P137": "operator",
    "P140": "religion",
    "P150": "contains administrative territorial entity",
    "P155": "follows",
    "P156": "followed by",
    "P159": "headquarters location",
    "P161": "cast member",
    "P162": "producer",
    "P166": "award received",
    "P170": "creator",
    "P171": "parent taxon",
    "P172": "ethnic group",
    "P175": "performer",
    "P176": "manufacturer",
    "P178": "developer",
    "P179": "series",
    "P190": "sister city",
    "P194": "legislative body",
    "P205": "basin country",
    "P206": "located in or next to body of water",
    "P241": "military branch",
    "P264": "record label",
    "P272": "production company",
    "P276": "location",
    "P279": "subclass of",
    "P355": "subsidiary",
    "P361": "part of",
    "P364": "original language of work",
    "P400": "platform",
    "P403": "mouth of the watercourse",
    "P449": "original network",
    "P463": "member of",
    "P488": "chairperson",
    "P495": "country of origin",
    "P527": "has part",
    "P551": "residence",
    "P569": "date of birth",
    "P570": "date of death",
    "P571": "inception",
    "P576": "dissolved, abolished or demolished",
    "P577": "publication date",
    "P580": "start time",
    "P582": "end time",
    "P585": "point in time",
    "P607": "conflict",
    "P674": "characters",
    "P676": "lyrics by",
    "P706": "located on terrain feature",
    "P710": "participant",
    "P737": "influenced by",
    "P740": "location of formation",
    "P749": "parent organization",
    "P800": "notable work",
    "P807": "separated from",
    "P840": "narrative location",
    "P937": "work location",
    "P1001": "applies to jurisdiction",
    "P1056": "product or material produced",
    "P1198": "unemployment rate",
    "P1336": "territory claimed by",
    "P1344": "participant of",
    "P1365": "replaces",
    "P1366": "replaced by",
    "P1376": "capital of",
    "P1412": "languages spoken, written or signed",
    "P1441": "present in work",
    "P3373": "sibling",
}


class Mention(NamedTuple):
    """Half-open range of tokens in a sentence."""

    sentence: int
    first: int
    last: int
    type: str


@dataclass(frozen=True)
class Document:
    number: int  # in the file
    sentences: list[list[str]]
    entities: list[list[Mention]]
    labels: dict[tuple[int, int], list[str]]  # (head, tail) -> properties


class Pair(NamedTuple):
    """The ingredients of an example, which is made only if the pair is drawn: most are not."""

    id: str
    document: Document
    head: int
    tail: int
    relation: str


def read_re_docred(
    folder: Path, split: str | None, negatives: float = 1.0, window: int = 1
) -> Reading:
    """The labelled pairs and drawn negatives, in the order of the documents.

    Args:
      folder, split: where the release was unpacked, and one of `FILES`.
      negatives: number of unlabelled pairs to draw per label of the split, by a hash of their ids;
        all pairs if there are fewer.
      window: sentences on either side of the two mentions.
    Ids are such as `re_docred/test/17/0/3/P19` (document, entities, property or `none`).

    Raises:
      InputError: unknown split, missing file, broken JSON, a document that does not fit its own
        sentences (names the document).
    """
    return read_re_docred_rows(
        json_array(split_file(folder, NAME, split, FILES), "document"),
        split,
        NAME,
        negatives,
        window,
    )


def read_re_docred_rows(
    rows: Iterable[Record], split: str, prefix: str, negatives: float = 1.0, window: int = 1
) -> Reading:
    """Reads documents in the format of the release, which tonytan48/Re-DocRED on the hub has too.
    As `read_re_docred`.
    """
    labelled, unlabelled = [], []
    for number, (place, row) in enumerate(rows):
        document = _document(number, place, row)
        for head, tail in itertools.permutations(range(len(document.entities)), 2):
            identity = f"{prefix}/{split}/{number}/{head}/{tail}"
            labels = document.labels.get((head, tail))
            labelled += [
                Pair(f"{identity}/{label}", document, head, tail, RELATIONS[label])
                for label in labels or ()
            ]
            if not labels:
                unlabelled.append(Pair(f"{identity}/{NEGATIVE}", document, head, tail, NEGATIVE))
    drawn = draw(unlabelled, round(min(negatives * len(labelled), len(unlabelled))), "negatives:42")
    ordered = sorted(
        [*labelled, *drawn], key=lambda pair: (pair.document.number, pair.head, pair.tail)
    )
    return Reading([_example(pair, split, window) for pair in ordered])


def _document(number: int, place: str, row: dict) -> Document:
    try:
        sentences = [[nonempty_string(token) for token in sentence] for sentence in row["sents"]]
        entities = [
            [
                Mention(mention["sent_id"], *mention["pos"], nonempty_string(mention["type"]))
                for mention in entity
            ]
            for entity in row["vertexSet"]
        ]
        labels: dict[tuple[int, int], list[str]] = defaultdict(list)
        for label in row["labels"]:
            labels[label["h"], label["t"]].append(label["r"])
        outside = [
            mention for mention in itertools.chain(*entities) if not _fits(mention, sentences)
        ]
        wrong_pairs = [
            pair
            for pair in labels
            if not all(0 <= entity < len(entities) for entity in pair) or pair[0] == pair[1]
        ]
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{place}: not a document of Re-DocRED; it has sents, vertexSet (type, sent_id, pos)"
            " and labels (r, h, t)"
        ) from None
    if outside:
        raise InputError(
            f"{place}: a mention [{outside[0].first}, {outside[0].last}) is not in its sentence"
            f" {outside[0].sentence}; correct it"
        )
    if not all(entities):
        raise InputError(
            f"{place}: an entity without mentions; remove it, and number the others anew in labels"
        )
    if wrong_pairs:
        head, tail = wrong_pairs[0]
        raise InputError(
            f"{place}: a label of entities {head} and {tail}, which are not two of the"
            f" {len(entities)}; correct it"
        )
    for properties in labels.values():
        for label in properties:
            if label not in RELATIONS:
                raise InputError(
                    f"{place}: {label!r} is not a relation of Re-DocRED; the nearest is"
                    f" {nearest(str(label), RELATIONS)}"
                )
        if len(set(properties)) != len(properties):
            raise InputError(f"{place}: a pair has the label {properties[0]} twice; keep one")
    return Document(number, sentences, entities, dict(labels))


def _fits(mention: Mention, sentences: list[list[str]]) -> bool:
    if not 0 <= mention.sentence < len(sentences):
        return False
    return 0 <= mention.first < mention.last <= len(sentences[mention.sentence])


def _example(pair: Pair, split: str, window: int) -> Example:
    document = pair.document
    mentions = _nearest_mentions(document.entities[pair.head], document.entities[pair.tail])
    chosen = _sentences(document.sentences, {mention.sentence for mention in mentions}, window)
    tokens, starts = [], {}
    for number in chosen:
        if starts and number - 1 not in starts:
            tokens.append(GAP)
        starts[number] = len(tokens)
        tokens += document.sentences[number]
    text, places = join_tokens(tokens)
    spans = [
        (
            places[starts[mention.sentence] + mention.first][0],
            places[starts[mention.sentence] + mention.last - 1][1],
        )
        for mention in mentions
    ]
    return Example.with_spans(
        text,
        *spans,
        id=pair.id,
        dataset=NAME,
        split=split,
        relation=pair.relation,
        head_type=mentions[0].type,
        tail_type=mentions[1].type,
    )


def _nearest_mentions(heads: list[Mention], tails: list[Mention]) -> tuple[Mention, Mention]:
    """The mentions with the fewest sentences, then tokens, between them; the first in the text
    among equals. Overlapping mentions come last.
    """

    def distance(pair: tuple[Mention, Mention]) -> tuple[int, ...]:
        head, tail = pair
        apart = abs(head.sentence - tail.sentence)
        between = max(head.first, tail.first) - min(head.last, tail.last)
        return (
            int(not apart and between < 0),
            apart,
            0 if apart else between,
            head.sentence,
            head.first,
            tail.sentence,
            tail.first,
        )

    return min(itertools.product(heads, tails), key=distance)


def _sentences(sentences: list[list[str]], mentioning: set[int], window: int) -> list[int]:
    """Numbers of the sentences of the text, in order: at most WORDS tokens, unless the sentences
    with the mentions alone are longer.
    """
    first, last = min(mentioning) - window, max(mentioning) + window
    chosen = list(range(max(0, first), min(len(sentences), last + 1)))
    length = sum(len(sentences[number]) for number in chosen)
    farthest_first = sorted(
        set(chosen) - mentioning,
        key=lambda number: (-min(abs(number - other) for other in mentioning), -number),
    )
    for number in farthest_first:
        if length <= WORDS:
            break
        chosen.remove(number)
        length -= len(sentences[number])
    return chosen
