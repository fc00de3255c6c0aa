"""Predictions tables preserve every cell in both formats; unreadable files are refused."""

import csv

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxre.errors import InputError
from jaxre.evaluation.predictions import COLUMNS, Prediction, read_predictions, write_predictions
from jaxre.relations.schema import hash_prompt

TRICKY = [
    "no",
    "NA",
    "null",
    "nan",
    "None",
    "true",
    "1e-4",
    "",
    'say "x", then y',
    "a,b",
    "línea\nzwei",
    "关系",
    "=1+1",
    "  spaces ",
]


def rows_of(labels):
    return [
        Prediction(
            example_id=f"facts/test/{i}",
            relation=label,
            generated_relation=label[::-1],
            eval_dataset_name="facts",
            model_id="m",
            tuned_dataset_name="facts",
            prompt=f"Text: {label}\r\nAnswer:",
            prompt_hash=hash_prompt(label),
            score=-0.1 * i if i % 2 else None,
            probabilities={label: 1 / 3, 'other,"one"': 2 / 3} if i % 2 else None,
            input_tokens=i if i % 3 else None,
        )
        for i, label in enumerate(labels)
    ]


@pytest.mark.parametrize("name", ["test", "test.csv", "test.parquet"])
def test_both_files_give_back_the_rows(tmp_path, name):
    rows = rows_of(TRICKY)
    assert write_predictions(tmp_path / name, rows) == (
        tmp_path / "test.parquet",
        tmp_path / "test.csv",
    )
    assert read_predictions(tmp_path / "test.parquet") == rows
    assert read_predictions(tmp_path / "test.csv") == rows
    assert read_predictions(tmp_path / "test") == rows
    assert read_predictions(tmp_path) == rows


@settings(deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=8
    ),
    st.floats(allow_nan=False),
)
def test_any_text_and_any_score_survive(tmp_path_factory, texts, score):
    folder = tmp_path_factory.mktemp("p")
    rows = [
        Prediction(f"x/{i}", text, text, prompt=text, score=score, probabilities={text: 0.1 + 0.2})
        for i, text in enumerate(texts)
    ]
    for path in write_predictions(folder / "p", rows):
        assert read_predictions(path) == rows


def test_the_columns_are_those_of_the_study_first(tmp_path):
    _, path = write_predictions(tmp_path, rows_of(["a"]))
    assert path == tmp_path / "predictions.csv"
    with path.open(newline="") as file:
        header, _ = csv.reader(file)
    assert tuple(header) == COLUMNS == tuple(pq.read_schema(tmp_path / "predictions.parquet").names)
    assert header[:8] == [
        "eval_dataset_name", "relation", "gen_type", "model_id",
        "tuned_dataset_name", "model_shot", "prompt_shot",
        "generated_relation",
    ]  # fmt: skip


def test_fifty_thousand_rows(tmp_path):
    """3 s on one shared core; quadratic code would not finish."""
    rows = [Prediction(f"x/test/{i}", "a", "b", prompt="words " * 20) for i in range(50_000)]
    for path in write_predictions(tmp_path / "p", rows):
        assert len(read_predictions(path)) == 50_000


def test_a_failed_write_keeps_the_old_files(tmp_path):
    good = rows_of(["a", "b"])
    write_predictions(tmp_path / "p", good)
    with pytest.raises(AttributeError):
        write_predictions(
            tmp_path / "p", [*rows_of(["c"]), Prediction("x", "a", "b", probabilities=[1.0])]
        )
    assert read_predictions(tmp_path / "p") == good
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.csv", "p.parquet"]


def test_prompt_hash_is_the_studys():
    assert hash_prompt("") == "d41d8cd98f00"  # md5 of nothing
    assert len(hash_prompt("Text: é")) == 12


def write_csv(path, header, *rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_bad_files_are_named_with_the_fix(tmp_path):
    header = ["example_id", "relation", "generated_relation"]
    cases = {
        "twice": (
            write_csv(tmp_path / "twice.csv", header, ["a", "x", "x"], ["a", "x", "y"]),
            "'a' occurs twice; keep one",
        ),
        "column": (
            write_csv(tmp_path / "column.csv", header[:2], ["a", "x"]),
            "no column 'generated_relation'",
        ),
        "cache": (
            write_csv(tmp_path / "cache.csv", [*header[1:], "prompt_hash"], ["x", "x", "h"]),
            "give it as CACHE",
        ),
        "cells": (
            write_csv(tmp_path / "cells.csv", header, ["a", "x", "y", "z"]),
            "more or fewer cells",
        ),
        "short": (
            write_csv(tmp_path / "short.csv", header, ["a", "x"]),
            "short.csv:2: more or fewer cells",
        ),
        "empty": (write_csv(tmp_path / "empty.csv", header), "has no rows"),
        "id": (
            write_csv(tmp_path / "id.csv", header, ["", "x", "y"]),
            "id.csv:2: empty example_id",
        ),
        "score": (
            write_csv(tmp_path / "score.csv", [*header, "score"], ["a", "x", "y", "good"]),
            "score cannot be read from 'good'",
        ),
        "list": (
            write_csv(tmp_path / "list.csv", [*header, "probabilities"], ["a", "x", "y", "[1]"]),
            "probabilities cannot be read",
        ),
        "missing": (tmp_path / "nowhere.csv", "no such file"),
        "suffix": (tmp_path / "nowhere.xlsx", "no such file"),
    }
    for path, message in cases.values():
        with pytest.raises(InputError) as error:
            read_predictions(path)
        assert (
            message in str(error.value)
            and path.name in str(error.value)
            and "\n" not in str(error.value)
        )
    (tmp_path / "bytes.csv").write_bytes(b"example_id\n\xff")
    (tmp_path / "fake.parquet").write_text("no parquet")
    for name in ("bytes.csv", "fake.parquet"):
        with pytest.raises(InputError, match=name):
            read_predictions(tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="0 predictions files"):
        read_predictions(tmp_path / "folder")
    with pytest.raises(InputError, match="no predictions"):
        write_predictions(tmp_path / "none", [])
    with pytest.raises(InputError, match="occurs twice"):
        write_predictions(tmp_path / "none", rows_of(["a"]) * 2)
    assert not list(tmp_path.glob("none*"))


def test_null_cells_and_a_byte_order_mark_are_read(tmp_path):
    pq.write_table(
        pa.table(
            {
                "example_id": ["a"],
                "relation": [None],
                "generated_relation": ["x"],
                "prompt_shot": [0],
            }
        ),
        tmp_path / "p.parquet",
    )
    assert read_predictions(tmp_path / "p.parquet") == [Prediction("a", "", "x", prompt_shot="0")]
    (tmp_path / "b.csv").write_text(
        "example_id,relation,generated_relation\na,no,null\n", encoding="utf-8-sig"
    )
    assert read_predictions(tmp_path / "b.csv") == [Prediction("a", "no", "null")]
