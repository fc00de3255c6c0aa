"""A study's record made up for the tests of statistics: examples, and systems that are right with a
given chance.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.evaluation.study_record import (
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
        was asked (all, if not given).
    """
    asked = {name: examples(name, domain, count, labels) for name, domain in datasets.items()}
    for name, rows in asked.items():
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
                one.relation if draw.random() < right else labels[draw.integers(len(labels))]
                for one in asked[dataset]
            ]
            answers = drawn if answer is None else [answer(one) for one in asked[dataset]]
            # our label -> common label, of gold and of answers
            common = fields.get("common_labels", {}).get(dataset, {})
            pairs = [
                (one, given)
                for one, given in zip(asked[dataset], answers, strict=True)
                if given is not None
            ]
            rows = [
                Prediction(one.id, common.get(one.relation, one.relation), common.get(given, given))
                for one, given in pairs
            ]
            files[dataset] = f"predictions/{name}/{dataset}.parquet"
            write_predictions(folder / files[dataset], rows)
        recorded.append(RecordedSystem(name, predictions=files, **fields))
    made = tuple(
        RecordedDataset(name, domain, labels, f"data/{name}.jsonl")
        for name, domain in datasets.items()
    )
    return StudyRecord("made", folder, made, tuple(recorded))
