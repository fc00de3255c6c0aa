"""`jaxre evaluate`: the scores of a predictions file, as a table and as JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from jaxre.errors import InputError
from jaxre.evaluation.metrics import Scores, score, semeval_official_f1
from jaxre.evaluation.predictions import Prediction, read_predictions
from jaxre.relations import semeval
from jaxre.relations.schema import is_negative


def evaluate_file(path: str | Path) -> Scores:
    """Scores of a predictions file.

    Raises:
      InputError: a file that cannot be read, or without gold labels.
    """
    return evaluate_rows(read_predictions(path), str(path))


def evaluate_rows(rows: Sequence[Prediction], place: str) -> Scores:
    """Scores of prediction rows, with the official one for SemEval's. The schema is that of the
    probabilities, where the rows have them.

    Raises:
      InputError: a row without a gold label.
    """
    unlabelled = [row.example_id for row in rows if not row.relation]
    if unlabelled:
        raise InputError(
            f"{place}: {len(unlabelled)} rows have no gold label (first {unlabelled[0]}); fill the"
            " column relation"
        )
    schema = sorted({label for row in rows for label in row.probabilities or ()}) or None
    gold, predicted = [row.relation for row in rows], [row.generated_relation for row in rows]
    datasets = {row.eval_dataset_name for row in rows}
    return score_dataset(datasets.pop() if len(datasets) == 1 else "", gold, predicted, schema)


def score_dataset(
    dataset: str, gold: Sequence[str], predicted: Sequence[str], schema: Sequence[str] | None
) -> Scores:
    """`score`, with the official one of SemEval-2010 Task 8 for that dataset. Raises InputError: no
    examples, or different lengths.
    """
    official = None
    if dataset == semeval.NAME and any(not is_negative(label) for label in gold):
        official = semeval_official_f1(gold, predicted)
    return dataclasses.replace(score(gold, predicted, schema), semeval_official_f1=official)


def evaluation_table(scores: Scores) -> Group:
    """Headline figures, then one line per class, then the most confused pairs."""
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
    for one in scores.per_class:
        classes.add_row(
            Text(one.label),
            f"{one.precision:.3f}",
            f"{one.recall:.3f}",
            f"{one.f1:.3f}",
            str(one.support),
            str(one.predicted),
        )
    confused = Table(title="most confused", title_justify="left")
    for column in ("gold", "predicted", "count"):
        confused.add_column(column)
    for gold, predicted, count in scores.confused:
        confused.add_row(Text(gold), Text(predicted), str(count))
    return Group(head, classes, *([confused] if scores.confused else []))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON whole or not at all. Raises InputError for a file that cannot be written."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); name another file"
        ) from None
