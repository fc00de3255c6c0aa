"""Baselines: the most frequent label, and TF-IDF with logistic regression in two variants.

    prediction = tfidf_marked(train, test)
    prediction.labels, prediction.probabilities          # N labels, [N, C]

Measured on SemEval-2010 Task 8 (8,000 / 2,717), positive-class micro-F1 with direction, and
without: plain sentence 0.653 and 0.689, entity-marked 0.770 and 0.783; 7 s each on one core.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from jaxre.errors import InputError
from jaxre.relations.marks import locate
from jaxre.relations.schema import Example

# Inverse regularisation: best of 1, 3, 10, 30 on a held-out tenth of SemEval's training split
# (0.738) and on the validation split of facts (0.726); 10 is worse by less than 0.01.
_C = 30.0
_WORD = re.compile(r"\w+|[^\w\s]")
_CONTEXT = 2  # words before and after the two entities
_SUFFIX = 3  # letters
_PHRASE = 6  # words between the entities, at most, for the text between to be a feature


@dataclass(frozen=True)
class BaselinePrediction:
    """`labels[i]` is the most probable of `classes` for test example i; `probabilities` is [N, C],
    float64.
    """

    labels: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: np.ndarray


def majority(train: Sequence[Example], test: Sequence[Example]) -> BaselinePrediction:
    """Predicts the most frequent label of `train` (of several, the first), with the label shares as
    probabilities.
    """
    _check(train, test)
    counts = Counter(example.relation for example in train)
    classes = tuple(sorted(counts))
    shares = np.array([counts[label] for label in classes]) / len(train)
    return BaselinePrediction(
        (counts.most_common(1)[0][0],) * len(test), classes, np.tile(shares, (len(test), 1))
    )


def tfidf_sentence(train: Sequence[Example], test: Sequence[Example]) -> BaselinePrediction:
    """Logistic regression on words and word pairs of the sentence; the entities are not marked."""
    return _fit(train, test, _sentence_features)


def tfidf_marked(train: Sequence[Example], test: Sequence[Example]) -> BaselinePrediction:
    """Logistic regression on words with their role: head, tail, between them, just before and
    after, anywhere.
    """
    return _fit(train, test, _marked_features)


def _fit(
    train: Sequence[Example], test: Sequence[Example], features: Callable[[Example], Iterator[str]]
) -> BaselinePrediction:
    _check(train, test)
    # Logistic regression needs two classes.
    if len({example.relation for example in train}) == 1:
        return majority(train, test)
    # Features that occur once double the time and change F1 on SemEval by 0.003; only training sets
    # of a few hundred examples need them.
    vectoriser = TfidfVectorizer(
        analyzer=features, sublinear_tf=True, min_df=2 if len(train) >= 1000 else 1
    )
    inputs: csr_matrix = vectoriser.fit_transform(train)
    labels = [example.relation for example in train]
    model = LogisticRegression(C=_C, max_iter=300).fit(inputs, labels)
    probabilities = model.predict_proba(vectoriser.transform(test))  # N C
    classes = tuple(str(label) for label in model.classes_)
    return BaselinePrediction(
        tuple(classes[best] for best in probabilities.argmax(axis=1)), classes, probabilities
    )


def _check(train: Sequence[Example], test: Sequence[Example]) -> None:
    if not train or not test:
        raise InputError(
            f"a baseline needs examples: {len(train)} to train on, {len(test)} to predict; give"
            " splits that have some"
        )


def _sentence_features(example: Example) -> Iterator[str]:
    words = _words(example.text)
    yield from words
    yield from _pairs(words)


def _marked_features(example: Example) -> Iterator[str]:
    """Words with prefixes for their position, and the order of the entities, because labels have
    directions.
    """
    head, tail = locate(
        example.text, example.head, example.tail, example.head_span, example.tail_span
    )
    yield from (f"any {word}" for word in _words(example.text))
    for role, entity in (("head", example.head), ("tail", example.tail)):
        words = _words(entity)
        yield from (f"{role} {word}" for word in words)
        if words:
            yield f"{role} ends {words[-1][-_SUFFIX:]}"
    for role, kind in (("head", example.head_type), ("tail", example.tail_type)):
        if kind:
            yield f"{role} type {kind}"
    if head is None or tail is None:
        return
    (_, left_end), (right_start, _) = sorted((head, tail))
    left_start, right_end = min(head[0], tail[0]), max(head[1], tail[1])
    between = _words(example.text[left_end:right_start])
    yield "head first" if head < tail else "tail first"
    yield f"distance {min(len(between), 10)}"
    yield from (f"between {word}" for word in (*between, *_pairs(between)))
    if len(between) <= _PHRASE:
        yield f"all between {' '.join(between)}"
    yield from (f"before {word}" for word in _words(example.text[:left_start])[-_CONTEXT:])
    yield from (f"after {word}" for word in _words(example.text[right_end:])[:_CONTEXT])


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _pairs(words: Sequence[str]) -> Iterator[str]:
    return (f"{first} {second}" for first, second in itertools.pairwise(words))
