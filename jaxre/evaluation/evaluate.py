"""`jaxre evaluate`: scores of a predictions file, as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxre.errors import InputError
from jaxre.evaluation.metrics.scores import Scores, score, semeval_official_f1
from jaxre.evaluation.predictions import Prediction, read_predictions
from jaxre.evaluation.writing import replacing
from jaxre.relations import semeval
from jaxre.relations.schema import is_negative


def evaluate_file(path: str | Path) -> Scores:
    """Scores a predictions file.

    Raises:
      InputError: the file cannot be read or lacks gold labels.
    """
    return evaluate_rows(read_predictions(path), str(path))


def evaluate_rows(rows: Sequence[Prediction], place: str) -> Scores:
    """Scores prediction rows, with the official score for SemEval-2010 Task 8. The schema is the
    set of labels that have probabilities or bounds, if any.

    Raises:
      InputError: a row without a gold label.
    """
    if unlabelled := [row.example_id for row in rows if not row.relation]:
        raise InputError(
            f"{place}: {len(unlabelled)} rows have no gold label (first {unlabelled[0]}); fill the"
            " column relation"
        )
    schema = {label for row in rows for label in (*(row.probabilities or ()), *(row.bounds or ()))}
    gold, predicted = [row.relation for row in rows], [row.generated_relation for row in rows]
    datasets = {row.eval_dataset_name for row in rows}
    dataset = datasets.pop() if len(datasets) == 1 else ""
    return score_dataset(dataset, gold, predicted, sorted(schema) or None)


def score_dataset(
    dataset: str, gold: Sequence[str], predicted: Sequence[str], schema: Sequence[str] | None
) -> Scores:
    """`score`, with the official score if the dataset is SemEval-2010 Task 8. Raises InputError: no
    examples, or different lengths.
    """
    official = None
    if dataset == semeval.NAME and any(not is_negative(label) for label in gold):
        official = semeval_official_f1(gold, predicted)
    return dataclasses.replace(score(gold, predicted, schema), semeval_official_f1=official)


def evaluation_table(scores: Scores) -> Group:
    """Builds the terminal tables: headline figures, one line per class, most confused pairs."""
    head = Table(show_header=False, title=f"{scores.examples:,} examples", title_justify="left")
    if scores.collapsed:
        head.add_row("COLLAPSED", "one label is predicted for every example", style="bold red")
    if scores.semeval_official_f1 is not None:
        head.add_row("official SemEval macro-F1", f"{scores.semeval_official_f1:.4f}")
    for name, value in (
        ("F1 (positive-class micro)", scores.f1),
        ("precision", scores.precision),
        ("recall", scores.recall),
        ("macro-F1 (positive labels)", scores.macro_f1),
        ("accuracy (all labels)", scores.accuracy),
        ("schema-valid", scores.schema_valid),
        ("malformed", scores.malformed),
    ):
        head.add_row(name, "not known (no probabilities)" if value is None else f"{value:.4f}")
    classes = Table(title="per class", title_justify="left")
    for column in ("label", "precision", "recall", "F1", "gold", "predicted"):
        classes.add_column(column, justify="left" if column == "label" else "right")
    for row in scores.per_class:
        shares = (f"{share:.3f}" for share in (row.precision, row.recall, row.f1))
        classes.add_row(Text(row.label), *shares, str(row.support), str(row.predicted))
    confused = Table(title="most confused", title_justify="left")
    for column in ("gold", "predicted", "count"):
        confused.add_column(column)
    for gold, predicted, count in scores.confused:
        confused.add_row(Text(gold), Text(predicted), str(count))
    return Group(head, classes, *([confused] if scores.confused else []))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON atomically. Raises InputError for a file that cannot be written."""
    with replacing(Path(path)) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
