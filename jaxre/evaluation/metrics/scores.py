"""Scores of predicted against gold labels as the study defines them (protocol: Scoring), and the
official score of SemEval-2010 Task 8.

    scores = score(gold, predicted, schema=labels)
    scores.f1                                   # positive-class micro-F1, the primary figure

Both sides are normalised by `normalise_label`. Labels that mean "no relation" (NEGATIVES) are not a
class in precision, recall and F1: a positive prediction on a negative gold label is a false
positive, a negative prediction on a positive gold label a false negative. A ratio with a zero
denominator is 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxre.errors import InputError
from jaxre.evaluation.metrics.rows import Row
from jaxre.relations.schema import NEGATIVES, normalise_label

# Longer predictions are run-on text, not labels (study's scoring rules).
MALFORMED_CHARACTERS = 60


@dataclass(frozen=True)
class ClassScore:
    """Scores of one label. support: count as gold label; predicted: count as prediction."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    predicted: int


@dataclass(frozen=True)
class Scores(Row):
    """Scores of one set of predictions. Shares lie in [0, 1]."""

    examples: int
    precision: float  # precision, recall, f1: positive-class micro
    recall: float
    f1: float
    macro_f1: float  # over positive gold labels
    accuracy: float  # over all labels
    schema_valid: float | None  # predictions that are labels of the schema; None without a schema
    malformed: float  # predictions longer than MALFORMED_CHARACTERS
    per_class: tuple[ClassScore, ...]  # gold labels and labels of the schema, as first spelled
    confused: tuple[tuple[str, str, int], ...]  # (gold, predicted, count), most frequent first
    collapsed: bool  # one label is predicted for every example, though the gold labels differ
    semeval_official_f1: float | None = None  # for SemEval-2010 Task 8 only


@dataclass(frozen=True)
class Labels:
    """Gold and predicted labels as codes into `names` (normalised). spelled: the first spelling of
    each name.
    """

    names: tuple[str, ...]
    spelled: tuple[str, ...]
    gold: np.ndarray  # N, int64
    predicted: np.ndarray  # N, int64
    positive: np.ndarray  # one bool per name

    @classmethod
    def of(cls, gold: Sequence[str], predicted: Sequence[str]) -> Labels:
        """Encodes N labels each. Raises InputError if N is 0 or the lengths differ."""
        if len(gold) != len(predicted):
            raise InputError(
                f"{len(gold)} gold labels but {len(predicted)} predictions; score one prediction"
                " per example"
            )
        if not len(gold):
            raise InputError("no predictions to score; is the split empty?")
        # Normalises each spelling once: there are few spellings, and 20,000 examples.
        name_code: dict[str, int] = {}
        spelled: dict[str, str] = {}
        code: dict[str, int] = {}
        for label in dict.fromkeys((*gold, *predicted)):
            name = normalise_label(label)
            spelled.setdefault(name, label or "none")
            code[label] = name_code.setdefault(name, len(name_code))
        return cls(
            names=tuple(spelled),
            spelled=tuple(spelled.values()),
            gold=np.fromiter((code[label] for label in gold), np.int64, len(gold)),
            predicted=np.fromiter((code[label] for label in predicted), np.int64, len(predicted)),
            positive=np.array([name not in NEGATIVES for name in spelled]),
        )

    @property
    def right(self) -> np.ndarray:
        """N bools: the predicted label is the gold label."""
        return self.gold == self.predicted


def score(
    gold: Sequence[str], predicted: Sequence[str], schema: Iterable[str] | None = None
) -> Scores:
    """Computes all scores of N predictions.

    Args:
      gold, predicted: N labels each, in any spelling; `normalise_label` is applied.
      schema: the allowed labels, for `schema_valid` and for classes without gold examples.

    Raises:
      InputError: no examples, or lists of different length.
    """
    labels = Labels.of(gold, predicted)
    count = len(labels.names)
    hits = np.bincount(labels.gold[labels.right], minlength=count)
    support = np.bincount(labels.gold, minlength=count)
    predictions = np.bincount(labels.predicted, minlength=count)

    positive = labels.positive
    precision, recall, f1 = (
        float(value)
        for value in _prf(
            hits[positive].sum(), predictions[positive].sum(), support[positive].sum()
        )
    )
    class_precision, class_recall, class_f1 = _prf(hits, predictions, support)
    positive_gold = positive & (support > 0)

    schema_names = None if schema is None else {normalise_label(label): label for label in schema}
    per_class = [
        ClassScore(
            spelling,
            float(class_precision[i]),
            float(class_recall[i]),
            float(class_f1[i]),
            int(support[i]),
            int(predictions[i]),
        )
        for i, (name, spelling) in enumerate(zip(labels.names, labels.spelled, strict=True))
        if support[i] or name in (schema_names or ())
    ]
    per_class += [
        ClassScore(label, 0.0, 0.0, 0.0, 0, 0)
        for name, label in (schema_names or {}).items()
        if name not in labels.names
    ]
    return Scores(
        examples=len(gold),
        precision=precision,
        recall=recall,
        f1=f1,
        macro_f1=float(class_f1[positive_gold].mean()) if positive_gold.any() else 0.0,
        accuracy=float(labels.right.mean()),
        schema_valid=(
            None
            if schema_names is None
            else _share([name in schema_names for name in labels.names], labels.predicted)
        ),
        malformed=_share(
            [len(name) > MALFORMED_CHARACTERS for name in labels.names], labels.predicted
        ),
        per_class=tuple(sorted(per_class, key=lambda row: row.label)),
        confused=_confused(labels),
        collapsed=int((predictions > 0).sum()) == 1 < int((support > 0).sum()),
    )


def _prf(hits, predictions, support):
    """Precision, recall and F1 from counts (numbers or arrays); 0 where undefined."""
    return (
        hits / np.maximum(predictions, 1),
        hits / np.maximum(support, 1),
        2 * hits / np.maximum(predictions + support, 1),
    )


def _share(of_name: list[bool], codes: np.ndarray) -> float:
    return float(np.array(of_name)[codes].mean())


def _confused(labels: Labels) -> tuple[tuple[str, str, int], ...]:
    """The ten most frequent pairs of gold label and other prediction, with their counts."""
    # Counts pairs, not a matrix: free decoding can produce as many labels as examples.
    wrong = ~labels.right
    pairs, counts = np.unique(
        np.stack([labels.gold[wrong], labels.predicted[wrong]], axis=1), axis=0, return_counts=True
    )
    rows = [
        (labels.spelled[g], labels.spelled[p], int(count))
        for (g, p), count in zip(pairs.tolist(), counts, strict=True)
    ]
    return tuple(sorted(rows, key=lambda row: (-row[2], row[0], row[1]))[:10])


@dataclass(frozen=True)
class Confusion:
    """counts[i, j]: number of examples with gold labels[i] and prediction columns[j]. columns:
    labels, then one column for predictions outside of them, if there are any.
    """

    labels: tuple[str, ...]
    columns: tuple[str, ...]
    counts: np.ndarray


def confusion_matrix(
    gold: Sequence[str], predicted: Sequence[str], labels: Sequence[str] | None = None
) -> Confusion:
    """Counts how often each gold label was predicted as each label.

    Args:
      gold, predicted: N labels each.
      labels: rows and columns, in this order; None is the sorted gold labels. Gold labels must be
        among them.

    Raises:
      InputError: no examples, different lengths, or a gold label outside of `labels`.
    """
    coded = Labels.of(gold, predicted)
    if labels is None:
        labels = sorted({coded.spelled[code] for code in set(coded.gold.tolist())})
    row_of = {normalise_label(label): row for row, label in enumerate(labels)}
    outside = len(labels)
    rows = np.array([row_of.get(name, outside) for name in coded.names])
    if (rows[coded.gold] == outside).any():
        stray = coded.spelled[coded.gold[rows[coded.gold] == outside][0]]
        raise InputError(
            f"gold label {stray!r} is not among the labels of the confusion matrix"
            f" ({', '.join(labels)}); add it"
        )
    counts = np.bincount(
        rows[coded.gold] * (outside + 1) + rows[coded.predicted], minlength=(outside + 1) ** 2
    )
    counts = counts.reshape(outside + 1, outside + 1)[:outside]
    if not counts[:, outside].any():
        return Confusion(tuple(labels), tuple(labels), counts[:, :outside])
    return Confusion(tuple(labels), (*labels, "(outside)"), counts)


def undirected(relation: str) -> str:
    """A SemEval-2010 Task 8 label without its direction: `Cause-Effect(e2,e1)` ->
    `Cause-Effect`.
    """
    return re.sub(r"\(e[12],\s*e[12]\)$", "", relation.strip())


def semeval_official_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Official score of SemEval-2010 Task 8: (9+1)-way macro-F1 with direction taken into account.

    Each relation covers both directions: a hit needs relation and direction; precision divides by
    all predictions of the relation in either direction, recall by all its gold examples. The mean
    is over the relations that occur as gold labels, without Other (the task's scorer, v1.2,
    `semeval2010_task8_scorer`, evaluation iii). A prediction outside of the schema counts as Other,
    like a skipped example in the scorer; a relation without direction counts as the wrong
    direction.

    Args:
      gold, predicted: N labels such as `Cause-Effect(e2,e1)` or `Other`.

    Raises:
      InputError: no examples, different lengths, or no gold relation.
    """
    relations = Labels.of(
        *([undirected(normalise_label(label)) for label in side] for side in (gold, predicted))
    )
    count = len(relations.names)
    hits = np.bincount(relations.gold[Labels.of(gold, predicted).right], minlength=count)
    support = np.bincount(relations.gold, minlength=count)
    _, _, f1 = _prf(hits, np.bincount(relations.predicted, minlength=count), support)
    counted = relations.positive & (support > 0)
    if not counted.any():
        raise InputError(
            "no gold relation besides Other; the official SemEval score is not defined"
        )
    return float(f1[counted].mean())
