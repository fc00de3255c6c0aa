"""PG-Fiction in the format of its release, with rows of our own: nothing is run, nothing is lost
unsaid, no book is on two sides.
"""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from refusals import refusal

from jaxre.config import Source
from jaxre.relations import sources
from jaxre.relations.draws import split_of
from jaxre.relations.pg_fiction import INCOMPLETE, MALFORMED, read_pg_fiction

SPLITS = ("train", "validation", "test")
BOOK = next(str(book) for book in range(99) if split_of(str(book)) == "train")
RELATION = {
    "entity1": "Ada",
    "entity2": "the inn",
    "entity1Type": "PER",
    "entity2Type": "FAC",
    "relation": "friend of",
}


def rows_of(*relations, book=BOOK, chunk="Ada saw the inn."):
    return [
        {"book_id": book, "chunk_id": str(at), "chunk": chunk, "relations": one}
        for at, one in enumerate(relations)
    ]


def write(folder, rows, kind="parquet"):
    path = folder / f"train-00000.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, fieldnames=list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    return folder


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv"])
def test_a_python_literal_becomes_examples(tmp_path, kind):
    (example,) = read_pg_fiction(
        write(tmp_path, rows_of(str([RELATION]), "[]"), kind), "train"
    ).examples
    assert (example.text, example.head, example.tail, example.relation) == (
        "Ada saw the inn.",
        "Ada",
        "the inn",
        "friend of",
    )
    assert (example.head_type, example.tail_type, example.head_span, example.tail_span) == (
        "PER",
        "FAC",
        (0, 3),
        (8, 15),
    )
    assert (example.id, example.dataset, example.domain) == (
        "pg_fiction/train/1/1",
        "pg_fiction",
        "literary",
    )


def test_what_cannot_be_read_is_left_out_and_counted_and_code_is_not_run(tmp_path):
    touched = tmp_path / "touched"
    code = f"__import__('pathlib').Path({str(touched)!r}).touch()"
    write(tmp_path, rows_of("[{'entity1': 'Ada', ", code, "7", "(" * 500, None, str([RELATION])))
    found = read_pg_fiction(tmp_path, "train")
    assert [example.id for example in found.examples] == ["pg_fiction/train/6/1"]
    assert {reason: len(places) for reason, places in found.account.items()} == {MALFORMED: 5}
    assert found.account[MALFORMED][0].endswith("row 1")
    assert not touched.exists()


def test_a_relation_that_lacks_a_part_is_left_out_and_counted(tmp_path):
    broken = [
        RELATION | {"entity1": ""},
        RELATION | {"relation": None},
        {"entity1": "Ada"},
        "Ada",
        RELATION,
    ]
    found = read_pg_fiction(write(tmp_path, rows_of(str(broken))), "train")
    assert [example.id for example in found.examples] == ["pg_fiction/train/1/5"]
    assert len(found.account[INCOMPLETE]) == 4


def test_no_book_is_on_two_sides_and_none_is_lost(tmp_path):
    rows = [
        row
        for book in range(120)
        for row in rows_of(str([RELATION]), str([RELATION]), book=str(book))
    ]
    write(tmp_path, rows)
    found = {split: read_pg_fiction(tmp_path, split).examples for split in SPLITS}
    books = {
        split: {rows[int(e.id.split("/")[2]) - 1]["book_id"] for e in examples}
        for split, examples in found.items()
    }
    assert sum(map(len, books.values())) == len(set().union(*books.values())) == 120
    assert sum(map(len, found.values())) == 240
    assert [len(books[split]) / 120 for split in SPLITS] == pytest.approx([0.8, 0.1, 0.1], abs=0.08)


def test_the_division_is_the_same_on_every_machine():
    # Stored on purpose: a change of the hash would silently move every book.
    found = "".join(split_of(str(book))[1] for book in range(1, 9))
    assert found == "arrrrera"  # vAlidation, tRain, tEst


def test_free_text_is_mapped_to_canonical_labels_and_the_rest_counted(tmp_path, monkeypatch):
    relations = [
        RELATION | {"relation": name}
        for name in ("Friend of", "companion_of", "wept like", "unclear")
    ]
    (tmp_path / "pg_fiction").mkdir()
    write(tmp_path / "pg_fiction", rows_of(str(relations)))
    monkeypatch.setenv("JAXRE_DATA", str(tmp_path))
    found = sources.read(
        Source(
            dataset="pg_fiction", split="train", label_map="configs/labels/pg_fiction-example.yaml"
        )
    )
    assert [example.relation for example in found.examples] == [
        "companion_of",
        "companion_of",
        "none",
    ]
    assert found.account[sources.UNMAPPED] == ["pg_fiction/train/1/3"]


def test_files_that_are_not_the_set_are_refused(tmp_path):
    assert (
        "no files of .jsonl, .csv, .parquet below it (benchmark pg_fiction); it must hold"
        " exactly one" in refusal(lambda: read_pg_fiction(tmp_path, "train"))
    )
    write(tmp_path, [{"book_id": "1", "text": "a"}])
    assert "row 1: no column chunk_id; a row has book_id" in refusal(
        lambda: read_pg_fiction(tmp_path, "train")
    )
    write(tmp_path, rows_of("[]"), "csv")
    assert "2 files of" in refusal(lambda: read_pg_fiction(tmp_path, "train"))
