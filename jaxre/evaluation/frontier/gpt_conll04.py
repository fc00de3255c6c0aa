"""GPT-3.5 and GPT-4o on the CoNLL04 test split (LongjuBai/EECS598_LLM_RelationExtraction): triples
per sentence.

One JSON object per file. `correct_cases` and `fail_cases` map the number of a sentence to `{text,
true, pred, response}`; `true` and `pred` are lists of `[head:type, relation, tail:type]` in lower
case. `error_cases` repeats the sentences whose reply could not be parsed. Summary figures in the
files have wrong names and are not read.

Sentences are joined by text. The GPT-4o files have a paraphrase as text, but the numbers are those
of the original documents, so the cached sentences in ascending order are ours. With the whole test
split, the sets of gold triples agree in all 288 places (269 different sets), which is the proof.
With only a part of the split there is no proof, and a paraphrase is not joined.

In a joined sentence, the answer for an ordered pair of our entities is the relation that the model
stated for their names, otherwise `none`. Entity types and the spacing or punctuation of names do
not count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxre.errors import InputError
from jaxre.evaluation.frontier.cache import (
    POSITION,
    SAME_ANSWER,
    Answer,
    Cache,
    how_joined,
    join_cached,
    squash,
)
from jaxre.relations.schema import Example, is_negative

NONE = "none"
STRANGERS = "predicted triples whose entities are not ours"
CASES = ("correct_cases", "fail_cases")
# Names and relation as in the file: "hakawati theatre:org", "orgbased in", "jerusalem:loc".
Triple = tuple[str, str, str]


def recognises(document: object) -> bool:
    """Recognises this format in parsed JSON."""
    return isinstance(document, dict) and all(
        isinstance(document.get(name), dict) for name in CASES
    )


def triple_scores(document: dict, place: str) -> tuple[float, float, float]:
    """Precision, recall and F1 over exact triples (names, types and relation, as sets per
    sentence), pooled over all sentences.
    """
    triples = [(set(case.predicted), set(case.true)) for case in _cases(document, place)]
    hits = sum(len(predicted & true) for predicted, true in triples)
    predictions = sum(len(predicted) for predicted, _ in triples)
    gold = sum(len(true) for _, true in triples)
    return hits / max(predictions, 1), hits / max(gold, 1), 2 * hits / max(predictions + gold, 1)


def read(document: dict, examples: Sequence[Example], place: str) -> Cache:
    """Joins the cached sentences, then every ordered pair of our entities in them.

    Args:
      document: the parsed object.
      examples: pairs of the CoNLL04 test split, related and unrelated, with the ids of
        `jaxre.relations.conll04`.
      place: the file. Its name identifies the model, which the file does not state.

    Raises:
      InputError: a sentence without text or triples in the expected shape.
    """
    cases = _cases(document, place)
    sentences = _sentences(examples)
    our_gold = [_gold_names(pairs) for pairs in sentences]
    joins = join_cached(
        [(squash(pairs[0].text),) for pairs in sentences],
        [(squash(case.text),) for case in cases],
        [frozenset(case.predicted) for case in cases],
        agree=lambda i, j: our_gold[i] == {_names(triple) for triple in cases[j].true},
    )
    spelling = {squash(example.relation): example.relation for example in examples}
    answers: list[Answer] = []
    leftover: dict[str, list[str]] = defaultdict(list)
    uncovered: dict[str, str] = {}
    model = _model(place)
    joined = {j for j, _ in joins.values()}

    for j, case in enumerate(cases):
        if j not in joined:
            leftover["sentences that join none of ours"].append(f"{case.number}: {case.text}")
        elif case.broken:
            leftover["replies that could not be parsed"].append(f"{case.number}: {case.text}")

    for i, pairs in enumerate(sentences):
        if i not in joins:
            uncovered |= dict.fromkeys(
                (pair.id for pair in pairs), "its sentence joins none of the cache"
            )
            continue
        case = cases[joins[i][0]]
        if case.broken:
            uncovered |= dict.fromkeys(
                (pair.id for pair in pairs), "the reply for its sentence could not be parsed"
            )
            continue
        predicted, true = _relations(case.predicted), _relations(case.true)
        related = defaultdict(set)
        for head, relation, tail in our_gold[i]:
            related[head, tail].add(relation)
        for pair in pairs:
            names = squash(pair.head), squash(pair.tail)
            if len(related[names]) > 1 or (related[names] and is_negative(pair.relation)):
                # The reply has names, not mentions: here it refers to the related mention.
                uncovered[pair.id] = "the same two names are related otherwise in this sentence"
            elif len(predicted[names]) > 1:
                uncovered[pair.id] = "the model gave several relations for the pair"
            else:
                label, gold = (
                    next(iter(relations), NONE) for relations in (predicted[names], true[names])
                )
                label, gold = (
                    spelling.get(squash(relation), relation) for relation in (label, gold)
                )
                answers.append(Answer(label, gold, example_id=pair.id, model=model))
        ours = {squash(name) for pair in pairs for name in (pair.head, pair.tail)}
        for head, relation, tail in sorted(set(case.predicted)):
            if not {_name(head), _name(tail)} <= ours:
                leftover[STRANGERS].append(f"{case.number}: {head} | {relation} | {tail}")
    how = how_joined(joins)
    strangers = len(leftover.get(STRANGERS, ()))
    return Cache(
        place=place,
        answers=tuple(answers),
        leftover={reason: tuple(items) for reason, items in leftover.items()},
        uncovered=uncovered,
        notes=(
            (
                f"{model}: joined {how['key 1']:,} sentences by text, {how[POSITION]:,} by their"
                " place among the document numbers (gold triples agree in every place),"
                f" {how[SAME_ANSWER]:,} whose candidates all carry the same reply"
            ),
            (
                "the model found the entities itself: a pair it did not name counts as none, and"
                f" the {strangers:,} triples it predicted on entities that are not ours are not"
                " counted against it"
            ),
        ),
    )


@dataclass(frozen=True)
class _Case:
    """One cached sentence. broken: its reply could not be parsed."""

    number: int
    text: str
    true: list[Triple]
    predicted: list[Triple]
    broken: bool


def _cases(document: dict, place: str) -> list[_Case]:
    """All sentences in ascending order of their number."""
    broken = document.get("error_cases") or {}
    cases = []
    for number, case in (item for name in CASES for item in document[name].items()):
        try:
            cases.append(
                _Case(
                    int(number),
                    _text(case["text"]),
                    _triples(case["true"]),
                    _triples(case["pred"]),
                    number in broken,
                )
            )
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{place}: case {number!r}: expected a document number with {{text, true, pred}},"
                " true and pred being lists of [head:type, relation, tail:type]; correct it or"
                " remove the case"
            ) from None
    return sorted(cases, key=lambda case: case.number)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _triples(rows: object) -> list[Triple]:
    return [
        (_text(head), " ".join(_text(relation).lower().split()), _text(tail))
        for head, relation, tail in rows
    ]


def _name(entity: str) -> str:
    """`hakawati theatre:org` -> `hakawatitheatre`."""
    return squash(entity.rsplit(":", 1)[0])


def _names(triple: Triple) -> Triple:
    return _name(triple[0]), squash(triple[1]), _name(triple[2])


def _relations(triples: list[Triple]) -> dict[tuple[str, str], set[str]]:
    relations = defaultdict(set)
    for head, relation, tail in triples:
        relations[_name(head), _name(tail)].add(relation)
    return relations


def _gold_names(pairs: Sequence[Example]) -> set[Triple]:
    return {
        (squash(pair.head), squash(pair.relation), squash(pair.tail))
        for pair in pairs
        if not is_negative(pair.relation)
    }


def _sentences(examples: Sequence[Example]) -> list[list[Example]]:
    """Pairs by sentence, in ascending order of the sentence's number
    (`dataset/split/NUMBER/head/tail`).
    """
    sentences: dict[tuple[int, str], list[Example]] = defaultdict(list)
    for example in examples:
        parts = example.id.split("/")
        number = int(parts[2]) if len(parts) == 5 and parts[2].isdigit() else -1
        sentences[number, example.text].append(example)
    return [sentences[key] for key in sorted(sentences)]


def _model(place: str) -> str:
    """Infers the model from the file names of the source repository; the files do not state it."""
    if "gpt4o" in place.lower():
        return f"GPT-4o ({Path(place).stem.rpartition('split=0_')[2] or 'prior'})"
    return "GPT-3.5 (chain of thought)" if "_cot" in place.lower() else "GPT-3.5 (few-shot)"
