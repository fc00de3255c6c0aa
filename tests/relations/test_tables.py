"""JSON Lines, CSV and Parquet: the same records give the same examples, and broken ones name their
line.
"""

import csv
import json
import re

import pyarrow
import pyarrow.parquet
import pytest

from jaxre.errors import InputError
from jaxre.relations.tables import read_table

TEXT = "Ada Lovelace was born in London."
OURS = {"text": TEXT, "head": "Ada Lovelace", "tail": "London", "relation": "born_in"}
STUDY = {
    "text": TEXT,
    "entity1": "Ada Lovelace",
    "entity2": "London",
    "entity1Type": "PER",
    "entity2Type": "LOC",
    "relation": "born_in",
    "prompt_0_shot": "Which relation?",
}


def write(folder, kind, records, name="data"):
    path = folder / f"{name}.{kind}"
    if kind == "jsonl":
        path.write_text(
            "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records),
            encoding="utf-8",
        )
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, fieldnames=list(dict.fromkeys(key for record in records for key in record))
            )
            writer.writeheader()
            writer.writerows(records)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


every_kind = pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])


@every_kind
@pytest.mark.parametrize(
    ("record", "columns"),
    [
        (OURS, {}),
        (
            {"sentence": TEXT, "h": "Ada Lovelace", "t": "London", "y": "born_in"},
            {"text": "sentence", "head": "h", "tail": "t", "relation": "y"},
        ),
        (
            {
                "sentence": "<e1>Ada Lovelace</e1> was born in <e2>London</e2>.",
                "relation": "born_in",
            },
            {},
        ),
        (OURS | {"text": "<e1>Ada Lovelace</e1> was born in <e2>London</e2>."}, {}),
        (OURS | {"head_start": 0, "head_end": 12, "tail_start": 25, "tail_end": 31}, {}),
        (
            {
                "text": TEXT,
                "relation": "born_in",
                "head_start": 0,
                "head_end": 12,
                "tail_start": 25,
                "tail_end": 31,
            },
            {},
        ),
        (OURS | {"a": 0, "b": 12}, {"head_start": "a", "head_end": "b"}),
    ],
)
def test_every_kind_and_shape_gives_the_same_example(tmp_path, kind, record, columns):
    (example,) = read_table(write(tmp_path, kind, [record]), columns)
    assert (example.text, example.head, example.tail, example.relation) == (
        TEXT,
        "Ada Lovelace",
        "London",
        "born_in",
    )
    assert (example.head_span, example.tail_span) == ((0, 12), (25, 31))
    assert (example.id, example.dataset, example.split, example.domain) == (
        "data/1",
        "data",
        "",
        "general",
    )


@every_kind
def test_the_columns_of_the_study_need_no_mapping(tmp_path, kind):
    (example,) = read_table(write(tmp_path, kind, [STUDY]))
    assert (example.head, example.tail, example.head_type, example.tail_type) == (
        "Ada Lovelace",
        "London",
        "PER",
        "LOC",
    )


def test_a_type_the_study_writes_as_the_word_none_is_unknown(tmp_path):
    (example,) = read_table(
        write(tmp_path, "csv", [STUDY | {"entity1Type": "None", "entity2Type": ""}])
    )
    assert (example.head_type, example.tail_type) == (None, None)


@every_kind
@pytest.mark.parametrize(
    "label",
    [
        "no",
        "NA",
        "null",
        "None",
        "nan",
        "true",
        "1",
        "1.0",
        "001",
        "/location/contains",
        "a, b",
        'say "so"',
    ],
)
def test_labels_stay_as_they_are_written(tmp_path, kind, label):
    (example,) = read_table(write(tmp_path, kind, [OURS | {"relation": label}]))
    assert example.relation == label


@pytest.mark.parametrize(
    ("kind", "value", "label"),
    [("jsonl", 1, "1"), ("jsonl", 2.50, "2.5"), ("jsonl", False, "false"), ("parquet", 1, "1")],
)
def test_labels_that_are_not_text_become_text(tmp_path, kind, value, label):
    assert read_table(write(tmp_path, kind, [OURS | {"relation": value}]))[0].relation == label


def test_a_number_keeps_its_spelling(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "7 of 1e3", "head": 7, "tail": 1e3, "relation": 1.50}\n')
    (example,) = read_table(path)
    assert (example.head, example.tail, example.relation) == ("7", "1e3", "1.50")


def test_half_a_surrogate_pair_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"text": "Ada \\ud800 saw Rome", "head": "Ada", "tail": "Rome", "relation": "none"}\n'
    )
    with pytest.raises(InputError, match='"text" holds half a surrogate pair'):
        read_table(path)


@every_kind
def test_spans_may_be_lists_and_may_be_absent(tmp_path, kind):
    span = [7, 10] if kind != "csv" else "[7, 10]"
    record = {"text": "war on war", "head": "war", "tail": "war", "relation": "none"}
    records = [
        record | {"head_span": span, "tail_span": None},
        record | {"head_span": None, "tail_span": span},
    ]
    first, second = read_table(write(tmp_path, kind, records))
    assert (first.head_span, first.tail_span) == ((7, 10), None)
    assert (second.head_span, second.tail_span) == (None, (7, 10))


def test_an_entity_that_occurs_several_times_has_no_span(tmp_path):
    (example,) = read_table(write(tmp_path, "jsonl", [OURS | {"text": TEXT + " London!"}]))
    assert (example.head_span, example.tail_span) == ((0, 12), None)


def test_entities_at_both_ends_identical_and_nested_keep_their_spans(tmp_path):
    records = [
        {"text": "<e1>war</e1> on <e2>war</e2>", "relation": "no"},
        {"text": "<e1>New <e2>York</e2></e1>", "relation": "no"},
    ]
    ends, nested = read_table(write(tmp_path, "jsonl", records))
    assert (ends.text, ends.head_span, ends.tail_span) == ("war on war", (0, 3), (7, 10))
    assert (nested.text, nested.head, nested.tail, nested.tail_span) == (
        "New York",
        "New York",
        "York",
        (4, 8),
    )


@every_kind
def test_ids_come_from_the_id_column_or_number_the_records(tmp_path, kind):
    records = [OURS | {"id": "b"}, OURS | {"id": "a"}]
    assert [e.id for e in read_table(write(tmp_path, kind, records))] == ["data/b", "data/a"]
    assert [e.id for e in read_table(write(tmp_path, kind, records), {"id": ""})] == [
        "data/1",
        "data/2",
    ]
    assert (
        read_table(write(tmp_path, kind, records), dataset="mine", split="test")[0].id
        == "mine/test/b"
    )


@pytest.mark.parametrize(
    "text",
    [
        'He said "Ada", then left',
        "tab\there",
        "semi;colon",
        "Zoë 🙂 Ada",
        "a\u2028b",
        "line\nend",
        "\ufeffbom",
        " led ",
    ],
)
@every_kind
def test_quotes_unicode_and_separators_survive(tmp_path, kind, text):
    (example,) = read_table(
        write(
            tmp_path,
            kind,
            [{"text": "London " + text, "head": "London", "tail": text, "relation": "none"}],
        )
    )
    assert example.text == "London " + text
    assert example.tail == text.strip()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path, kind, mark):
    path = write(tmp_path, kind, [OURS, OURS | {"relation": "none"}])
    plain = read_table(path)
    content = path.read_text(encoding="utf-8").replace("\r\n", "\n").replace("\n", "\r\n")
    path.write_bytes((mark + content + "\r\n").encode())
    assert read_table(path) == plain


def test_records_without_a_relation_are_read_for_prediction_only(tmp_path):
    record = {key: value for key, value in OURS.items() if key != "relation"}
    path = write(tmp_path, "jsonl", [record])
    assert read_table(path, labelled=False)[0].relation == ""
    with pytest.raises(InputError, match='no column for "relation"'):
        read_table(path)


def test_a_long_document_fits_into_a_csv_cell(tmp_path):
    text = "Ada saw London. " + "word " * 100_000
    assert (
        read_table(write(tmp_path, "csv", [OURS | {"text": text, "head": "Ada"}]))[0].text == text
    )


@every_kind
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": ""}, 'no "tail"; add it or remove the record'),
        ({"tail": "   "}, 'no "tail"'),
        ({"text": ""}, 'no "text"; add it'),
        ({"relation": ""}, 'no "relation"; write the label, such as none'),
        ({"head": "Babbage"}, "the head 'Babbage' does not occur in the text; correct"),
        (
            {"head_start": 0, "head_end": 40},
            r"head_span \[0, 40\] is not in the text \(32 characters\)",
        ),
        ({"head_start": 5, "head_end": 5}, r"head_span \[5, 5\] is not in the text"),
        ({"head_start": -12, "head_end": 12}, r"head_span \[-12, 12\] is not in the text"),
        (
            {"head_start": 1, "head_end": 12},
            r"head_span \[1, 12\] spells 'da Lovelace', the head is 'Ada Lovelace'; correct",
        ),
        (
            {"head_start": 0, "head_end": 11},
            r".* spells 'Ada Lovelac', .*; the end is the first character after it",
        ),
        ({"head_start": 0, "head_end": None}, "head_span is .*; give two whole numbers"),
        ({"head_start": "x", "head_end": "y"}, r"head_span is .*; give two whole numbers"),
        (
            {"text": "<e1>Ada</e1> Lovelace, <e2>London</e2>"},
            r"head_span \[0, 3\] spells 'Ada', the head is 'Ada Lovelace'",
        ),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_used_is_named(tmp_path, kind, change, message):
    bad = OURS | change
    good = OURS | {key: "" if kind == "csv" else None for key in change if key not in OURS}
    place = {"jsonl": ":2: ", "csv": ":3: ", "parquet": ": row 2: "}[kind]
    path = write(tmp_path, kind, [good, bad])
    with pytest.raises(InputError, match=re.escape(str(path) + place) + message) as error:
        read_table(path)
    assert "\n" not in str(error.value)


def test_a_record_that_lacks_the_key_is_named(tmp_path):
    path = write(
        tmp_path, "jsonl", [OURS, {key: OURS[key] for key in ("text", "head", "relation")}]
    )
    with pytest.raises(InputError, match=re.escape(f'{path}:2: no "tail"')):
        read_table(path)


@every_kind
def test_a_missing_column_names_those_there_are_and_the_nearest(tmp_path, kind):
    record = {"text": TEXT, "head": "Ada Lovelace", "tial": "London", "relation": "born_in"}
    with pytest.raises(
        InputError,
        match=(
            r'no column for "tail"; the nearest of text, head, tial, relation is tial; map it with'
            r" columns\.tail=NAME"
        ),
    ):
        read_table(write(tmp_path, kind, [record]))
    with pytest.raises(
        InputError, match=r"columns\.tail=tall: no such column; the nearest of .* is tial"
    ):
        read_table(write(tmp_path, kind, [record]), {"tail": "tall"})
    with pytest.raises(InputError, match=r"columns\.teil: no such field; the nearest is tail"):
        read_table(write(tmp_path, kind, [record]), {"teil": "tial"})
    with pytest.raises(InputError, match=r'no column for "text"'):
        read_table(write(tmp_path, kind, [{"words": TEXT, "relation": "no"}]))


@every_kind
def test_a_repeated_id_names_both_places(tmp_path, kind):
    places = {"jsonl": (":3", ":1"), "csv": (":4", ":2"), "parquet": (": row 3", ": row 1")}[kind]
    path = write(tmp_path, kind, [OURS | {"id": name} for name in ("a", "b", "a")])
    with pytest.raises(
        InputError,
        match=re.escape(f"{path}{places[0]}: id 'a' is that of {path}{places[1]}; correct it"),
    ):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", ": the file is empty"),
        ("a.csv", b"\n\n", ": the file is empty"),
        ("a.csv", b"text,head,tail,relation\n", ": the file has no records"),
        (
            "a.jsonl",
            b'{"text": 1}\n{"text": ',
            r":2: not valid JSON \(character 10: .*\); write one object per line",
        ),
        ("a.jsonl", b'["text"]\n', ":1: not a JSON object"),
        (
            "a.jsonl",
            b'{"text": ' + b"[" * 100_000,
            ":1: nested too deep; write one flat object per line",
        ),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}',
            ":2: byte 0xe9 is not UTF-8; save the file as UTF-8",
        ),
        ("a.csv", b"text,text\n1,2\n", ":1: the header names a column twice"),
        ("a.csv", b'text,head\n"a\nb",c\nx,y,z\n', ":4: 3 cells under 2 columns; quote"),
        ("a.csv", b'text,head\n"a"b,c\n', ":2: not valid CSV"),
        ("a.csv", b'text,head\nx,y\n"a,b\n', ":3: not valid CSV"),
        ("a.parquet", b"PAR1 not really", ": not a readable Parquet file"),
        ("a.parquet", b"", ": not a readable Parquet file"),
        (
            "a.tsv",
            b"text\thead\n",
            r": unknown kind of file; convert it to one of \.jsonl, \.csv, \.parquet",
        ),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_its_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path)) + message) as error:
        read_table(path)
    assert "\n" not in str(error.value)


@every_kind
def test_a_missing_file_is_named(tmp_path, kind):
    with pytest.raises(InputError, match="no such file"):
        read_table(tmp_path / f"nowhere.{kind}")


def test_a_value_that_is_not_text_is_refused(tmp_path):
    path = write(tmp_path, "jsonl", [OURS | {"tail": ["London"]}])
    with pytest.raises(InputError, match=r':1: "tail" is .*, not text'):
        read_table(path)


def test_marks_that_do_not_pair_are_named(tmp_path):
    path = write(tmp_path, "jsonl", [{"text": "<e1>Ada</e1> of <e2>London", "relation": "no"}])
    with pytest.raises(InputError, match=":1: no </e2>; mark the head"):
        read_table(path)


def test_a_span_beside_marks_must_agree(tmp_path):
    marked = {"text": "<e1>Ada</e1> of <e2>London</e2>", "relation": "no"}
    assert read_table(write(tmp_path, "jsonl", [marked | {"head_span": [0, 3]}]))[0].head == "Ada"
    with pytest.raises(
        InputError, match=r"head_span \[4, 7\] differs from the marked head \[0, 3\]"
    ):
        read_table(write(tmp_path, "jsonl", [marked | {"head_span": [4, 7]}]))
