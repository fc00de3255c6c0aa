"""A study's record made up for the tests of statistics: examples, and systems that are right with a
given chance.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.evaluation.report.record import (
    RecordedDataset,
    RecordedSystem,
    StudyRecord,
    write_examples,
)
from jaxre.relations.schema import Example

LABELS = ("born in", "works for", "place of birth", "place of death", "none")


def examples(dataset: str, domain: str, count: int, labels=LABELS) -> list[Example]:
    """Every label in turn; the distance of the two entities grows with the index, modulo 30."""
    made = []
    for index in range(count):
        text = "Ann " + "and " * (index % 30) + "Bob met."
        tail = text.index("Bob")
        span = {
            "head_span": (0, 3),
            "tail_span": (tail, tail + 3),
            "head_type": "PER",
            "tail_type": "PER" if index % 2 else "ORG",
        }
        relation = labels[index % len(labels)]
        made.append(
            Example(
                f"{dataset}/test/{index}",
                dataset,
                "test",
                text,
                "Ann",
                "Bob",
                relation,
                domain=domain,
                **span,
            )
        )
    return made


def study(
    folder: Path,
    datasets: dict[str, str],
    systems: dict[str, dict],
    count: int = 200,
    labels=LABELS,
) -> StudyRecord:
    """Writes a study.

    Args:
      datasets: name -> domain.
      systems: name -> fields of RecordedSystem, and further: `right`, the chance of a right answer;
        `answer`, a function of an example instead (None: not answered); `datasets`, those that it
        answered (all by default).
    """
    rows_of = {name: examples(name, domain, count, labels) for name, domain in datasets.items()}
    for name, rows in rows_of.items():
        write_examples(folder / "data" / f"{name}.jsonl", rows)
    recorded = []
    for name, fields in systems.items():
        fields = {"kind": "tuned", "model": "m-1B", "right": 0.8, **fields}
        right, answer, names = (
            fields.pop("right"),
            fields.pop("answer", None),
            fields.pop("datasets", list(datasets)),
        )
        files = {}
        for dataset in names:
            draw = np.random.default_rng(zlib.crc32(f"{name} {dataset}".encode()))
            drawn = [
                row.relation if draw.random() < right else labels[draw.integers(len(labels))]
                for row in rows_of[dataset]
            ]
            answers = drawn if answer is None else [answer(row) for row in rows_of[dataset]]
            # our label -> common label, of gold and of answers
            common = fields.get("common_labels", {}).get(dataset, {})
            pairs = [
                (row, chosen)
                for row, chosen in zip(rows_of[dataset], answers, strict=True)
                if chosen is not None
            ]
            predictions = [
                Prediction(
                    row.id, common.get(row.relation, row.relation), common.get(chosen, chosen)
                )
                for row, chosen in pairs
            ]
            files[dataset] = f"predictions/{name}/{dataset}.parquet"
            write_predictions(folder / files[dataset], predictions)
        recorded.append(RecordedSystem(name, predictions=files, **fields))
    made = tuple(
        RecordedDataset(name, domain, labels, f"data/{name}.jsonl")
        for name, domain in datasets.items()
    )
    return StudyRecord("made", folder, made, tuple(recorded))
