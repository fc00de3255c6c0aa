"""TACRED in the format of its release, with records of our own."""

import json

import pytest
from refusals import refusal

from jaxre.relations.schema import is_negative
from jaxre.relations.tacred import read_tacred

RECORD = {
    "id": "61b3",
    "docid": "D1",
    "relation": "org:founded_by",
    "token": ["Ada", "King", "-LRB-", "1815", "-RRB-", "founded", "Engines", "."],
    "subj_start": 6,
    "subj_end": 6,
    "subj_type": "ORGANIZATION",
    "obj_start": 0,
    "obj_end": 1,
    "obj_type": "PERSON",
    "stanford_ner": ["PERSON", "PERSON", "O", "DATE", "O", "O", "ORGANIZATION", "O"],
}


def write(folder, *records):
    path = folder / "data" / "json" / "dev.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(list(records)))
    return folder


def test_ends_are_inclusive_and_the_subject_is_the_head(tmp_path):
    (example,) = read_tacred(write(tmp_path, RECORD), "validation").examples
    assert example.id == "tacred/validation/61b3"
    assert example.text == "Ada King -LRB- 1815 -RRB- founded Engines ."
    assert (example.head, example.head_type, example.tail, example.tail_type) == (
        "Engines",
        "ORGANIZATION",
        "Ada King",
        "PERSON",
    )
    assert (example.text[slice(*example.head_span)], example.text[slice(*example.tail_span)]) == (
        "Engines",
        "Ada King",
    )
    assert example.relation == "org:founded_by"


def test_no_relation_is_negative(tmp_path):
    (example,) = read_tacred(
        write(tmp_path, RECORD | {"relation": "no_relation"}), "validation"
    ).examples
    assert is_negative(example.relation)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"subj_end": 8},
            "record 0: subj_start 6 and subj_end 8 are not tokens of the 8; the end is inclusive",
        ),
        ({"obj_start": 2}, "record 0: obj_start 2 and obj_end 1"),
        ({"obj_start": -1}, "record 0: obj_start -1"),
        ({"token": "Ada"}, "record 0: not a record of TACRED"),
        ({"token": ["Ada", None]}, "record 0: not a record of TACRED"),
        ({"relation": None}, "record 0: not a record of TACRED"),
        ({"subj_start": "6"}, "record 0: not a record of TACRED"),
        ({"subj_start": True}, "record 0: not a record of TACRED"),
    ],
)
def test_a_broken_record_is_named(tmp_path, change, message):
    assert message in refusal(lambda: read_tacred(write(tmp_path, RECORD | change), "validation"))


def test_a_missing_field_is_named(tmp_path):
    record = {key: value for key, value in RECORD.items() if key != "obj_type"}
    assert "not a record of TACRED; it has id, token, relation" in refusal(
        lambda: read_tacred(write(tmp_path, record), "validation")
    )
