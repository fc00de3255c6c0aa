"""A study's record is read back; other files are refused."""

from __future__ import annotations

import json

import pytest

from jaxre.errors import InputError
from jaxre.evaluation.predictions import Prediction, write_predictions
from jaxre.evaluation.report.record import (
    RecordedDataset,
    RecordedSystem,
    StudyRecord,
    read_record,
    write_examples,
    write_record,
)
from jaxre.relations.schema import Example


def example() -> Example:
    return Example(
        "toy/test/1",
        "toy",
        "test",
        "Ann knows Bob\u2028 well.",
        "Ann",
        "Bob",
        "knows",
        head_span=(0, 3),
        tail_span=(10, 13),
    )


def record(folder) -> StudyRecord:
    write_examples(folder / "data" / "toy.jsonl", [example()])
    write_predictions(
        folder / "predictions" / "a" / "toy", [Prediction("toy/test/1", "knows", "none")]
    )
    system = RecordedSystem(
        "a", "tuned", "base", {"toy": "predictions/a/toy.parquet"}, sizes={"base": 3}
    )
    return StudyRecord(
        "s",
        folder,
        (RecordedDataset("toy", "general", ("knows", "none"), "data/toy.jsonl"),),
        (system,),
    )


def test_a_written_record_is_read_back(tmp_path):
    written = record(tmp_path)
    write_record(written)
    read = read_record(tmp_path)
    assert read == written
    assert read.examples == {"toy": {"toy/test/1": example()}}
    assert [row.generated_relation for row in read.rows(read.systems[0], "toy")] == ["none"]
    assert read.rows(read.systems[0], "other") == []


@pytest.mark.parametrize(
    "spoil", [lambda tree: tree.pop("systems"), lambda tree: tree["systems"][0].update(kind="else")]
)
def test_files_that_are_not_a_record_are_refused(tmp_path, spoil):
    path = write_record(record(tmp_path))
    tree = json.loads(path.read_text())
    spoil(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match="not the record"):
        read_record(tmp_path)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no study\.json"):
        read_record(tmp_path)
