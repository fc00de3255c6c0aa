"""Sentences of the New York Times with Freebase relations: three sets with different labels, which
must not be mixed.

- `nyt11`: the set of the hierarchical framework (Takanobu et al. 2019), train and test, one JSON
  object per line:

      {"sentext": "...", "relations": [{"rtext": "/people/person/place_lived", "em1": "...", "em2":
          "...", "tags": [0, 4, 1, ...]}]}

  `tags` say for each word whether it begins (4) or continues (1) the head, begins (5) or continues
  (2) the tail. There is no validation file: the authors take a twentieth of train (`part: [0,
  0.95]` and `part: [0.95, 1]`).
- `nyt24`: the exact-match version with 24 relations (Zeng et al. 2018 and after):

      {"sentText": "...", "relationMentions": [{"em1Text": "...", "em2Text": "...", "label":
          "/location/location/contains"}]}

  Measured on validation: 5,000 sentences, 7,985 triples, 22 labels. 1,172 triples put a second
  label on a labelled pair.
- `nyt11_hoffmann`: human judgements of proposed relations (Hoffmann et al. 2011, `sentential.txt`),
  the only part of the three that people judged. It is a separate dataset (split `test`), since its
  labels are not those of `nyt11`. Nine tab-separated columns: two ids, number of the mention,
  proposed relation, judgement, sentence with `[Name]1` and `[Name]2`, two names, sentence. `y`
  makes an example of that relation; `n` an example of `none`, once per pair and sentence, and only
  if no other judgement of that pair is `y` or open (`indirect` or empty). Measured: y 254, n 567,
  indirect 60, empty 125.

Each label of a pair is an example of its own, and further ones are counted. The licence of the text
allows research, not publication.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from jaxre.errors import InputError
from jaxre.relations.files import json_lines, read_lines, split_file
from jaxre.relations.marks import Span, join_tokens, only_occurrence
from jaxre.relations.schema import Example, Reading

NYT11 = "nyt11"
NYT24 = "nyt24"
HOFFMANN = "nyt11_hoffmann"
NEGATIVE = "none"
NYT11_FILES = {"train": "train.json", "test": "test.json"}
NYT24_FILES = {
    split: f"nyt24_exact/{name}.json"
    for split, name in (("train", "train"), ("validation", "valid"), ("test", "test"))
}
HOFFMANN_FILES = {"test": "sentential.txt"}

OPEN = "judgements are left out: indirect or empty"
SETTLED = "judgements n are left out: another judgement of that pair in that sentence is y or open"
REPEATED = "judgements are left out: they repeat one of the same pair and sentence"


def read_nyt11(folder: Path, split: str | None) -> Reading:
    """Reads each triple as an example, with ids such as `nyt11/test/17/2` (line of the file, number
    of the triple, both from 1).

    Raises:
      InputError: unknown split, missing file, a line that is not as above (names file:line).
    """
    path = split_file(folder, NYT11, split, NYT11_FILES)
    keys = ("sentext", "relations", "em1", "em2", "rtext")
    return Reading(list(_triples(path, NYT11, split, keys)))


def read_nyt24(folder: Path, split: str | None) -> Reading:
    """Reads each triple as an example, with ids such as `nyt24/validation/17/2` (line of the file,
    number of the triple, both from 1).

    Raises:
      InputError: unknown split, missing file, a line that is not as above (names file:line).
    """
    path = split_file(folder, NYT24, split, NYT24_FILES)
    keys = ("sentText", "relationMentions", "em1Text", "em2Text", "label")
    return Reading(list(_triples(path, NYT24, split, keys)))


def _triples(
    path: Path, dataset: str, split: str, keys: tuple[str, str, str, str, str]
) -> Iterator[Example]:
    text_key, triples_key, head_key, tail_key, label_key = keys
    for place, record in json_lines(path):
        line = place.rpartition(":")[2]
        try:
            text = record[text_key].strip()
            for number, triple in enumerate(record[triples_key], start=1):
                names = [triple[key].strip() for key in (head_key, tail_key)]
                label = triple[label_key].strip()
                if not all((text, label, *names)):
                    raise ValueError
                spans = _tagged(text, triple.get("tags") or [], names)
                yield _example(
                    f"{dataset}/{split}/{line}/{number}", dataset, split, text, names, label, spans
                )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(
                f"{place}: not a sentence of {dataset}; it has {text_key} and {triples_key} "
                f"(each with {head_key}, {tail_key} and {label_key})"
            ) from None


def _tagged(text: str, tags: list[int], names: list[str]) -> list[Span | None]:
    """Spans of head and tail from the tags; None where the tags mark another text, or nothing."""
    words, places = join_tokens(text.split())
    if words != text or len(tags) != len(places):
        return [None, None]
    spans: list[Span | None] = []
    for name, begins, continues in ((names[0], 4, 1), (names[1], 5, 2)):
        starts = [at for at, tag in enumerate(tags) if tag == begins]
        span = None
        if len(starts) == 1:
            end = starts[0] + 1
            while end < len(tags) and tags[end] == continues:
                end += 1
            span = places[starts[0]][0], places[end - 1][1]
        spans.append(span if span and text[slice(*span)] == name else None)
    return spans


def _example(
    identity: str,
    dataset: str,
    split: str,
    text: str,
    names: list[str],
    relation: str,
    spans: list[Span | None],
) -> Example:
    head_span, tail_span = (
        span or only_occurrence(text, name) for span, name in zip(spans, names, strict=True)
    )
    return Example(
        id=identity,
        dataset=dataset,
        split=split,
        text=text,
        head=names[0],
        tail=names[1],
        relation=relation,
        head_span=head_span,
        tail_span=tail_span,
    )


def read_hoffmann(folder: Path, split: str | None) -> Reading:
    """Reads the judged mentions, with ids such as `nyt11_hoffmann/test/17` (line of the file).

    Raises:
      InputError: unknown split, missing file, a line without nine columns, an unknown judgement
        (each names file:line).
    """
    path = split_file(folder, HOFFMANN, split, HOFFMANN_FILES)
    rows = [(number, line.split("\t")) for number, line in enumerate(read_lines(path), start=1)]
    judged = defaultdict(set)
    for number, cells in rows:
        if len(cells) != 9:
            raise InputError(
                f"{path}:{number}: {len(cells)} columns; a judgement has 9, separated by tabs"
            )
        if cells[4] not in ("y", "n", "indirect", ""):
            raise InputError(
                f"{path}:{number}: {cells[4]!r} is not a judgement; write y, n or indirect, or"
                " leave it empty"
            )
        judged[_pair(cells)].add(cells[4])
    examples, account, seen = [], defaultdict(list), set()
    for number, cells in rows:
        identity, judgement = f"{HOFFMANN}/{split}/{number}", cells[4]
        label = cells[3] if judgement == "y" else NEGATIVE
        if judgement not in ("y", "n"):
            account[OPEN].append(identity)
        elif judgement == "n" and judged[_pair(cells)] != {"n"}:
            account[SETTLED].append(identity)
        elif (*_pair(cells), label) in seen:
            account[REPEATED].append(identity)
        else:
            seen.add((*_pair(cells), label))
            examples.append(_judged(identity, split, cells, label))
    return Reading(examples, dict(account))


def _pair(cells: list[str]) -> tuple[str, str, str]:
    """Ids of the pair and the sentence."""
    return cells[0], cells[1], cells[8]


def _judged(identity: str, split: str, cells: list[str], label: str) -> Example:
    """The example of a judgement, without the quotes that the release puts around nearly all
    sentences.
    """
    names, sentence = cells[6:8], cells[8]
    quotes = int(len(sentence) > 1 and sentence[0] == sentence[-1] == '"')
    plain, marked = _unmarked(cells[5])
    text = sentence[quotes:-1] if quotes else sentence
    spans = []
    for name, span in zip(names, marked, strict=True):
        span = span and (span[0] - quotes, span[1] - quotes)
        spans.append(span if span and plain == sentence and text[slice(*span)] == name else None)
    return _example(identity, HOFFMANN, split, text, names, label, spans)


def _unmarked(marked: str) -> tuple[str, list[Span | None]]:
    """The sentence without `[` and `]1` or `]2`, and the first span of each; marks may nest."""
    plain, opened = [], []
    spans: list[Span | None] = [None, None]
    at = 0
    while at < len(marked):
        if marked[at] == "[":
            opened.append(len(plain))
        elif opened and marked[at : at + 2] in ("]1", "]2"):
            which, start = int(marked[at + 1]) - 1, opened.pop()
            spans[which] = spans[which] or (start, len(plain))
            at += 1
        else:
            plain.append(marked[at])
        at += 1
    return "".join(plain), spans
