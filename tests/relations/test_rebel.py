"""REBEL: every triple is an example, shifted boundaries are corrected, one file is divided by
document.
"""

import json
from collections import Counter

import pytest
from refusals import refusal

from jaxre.relations.rebel import LOST, MOVED, read_rebel

SPLITS = ("train", "validation", "test")


def document(docid, text, *triples):
    sides = [
        {
            "subject": {"surfaceform": head, "boundaries": head_at},
            "predicate": {"surfaceform": relation, "boundaries": None},
            "object": {"surfaceform": tail, "boundaries": tail_at},
        }
        for head, head_at, relation, tail, tail_at in triples
    ]
    return {
        "docid": docid,
        "title": "t",
        "uri": "Q1",
        "text": text,
        "entities": [],
        "triples": sides,
    }


def write(folder, *documents, name="sample.jsonl"):
    (folder / name).write_text(
        "".join(json.dumps(one) + "\n" for one in documents), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def sample(shared_data):
    return {split: read_rebel(shared_data / "rebel", split) for split in SPLITS}


def test_every_triple_of_the_sample_is_in_one_split_and_no_document_in_two(shared_data, sample):
    documents = [
        json.loads(line)
        for line in (
            (shared_data / "rebel" / "sample.jsonl").read_text(encoding="utf-8").splitlines()
        )
    ]
    expected = Counter(
        (
            one["docid"],
            triple["subject"]["surfaceform"],
            triple["predicate"]["surfaceform"],
            triple["object"]["surfaceform"],
        )
        for one in documents
        for triple in one["triples"]
    )
    examples = [example for reading in sample.values() for example in reading.examples]
    assert Counter((e.id.split("/")[2], e.head, e.relation, e.tail) for e in examples) == expected
    assert len(examples) == 2868
    assert len({e.relation for e in examples}) == 186
    found = [{e.id.split("/")[2] for e in reading.examples} for reading in sample.values()]
    assert sum(map(len, found)) == len(set().union(*found)) == 920  # 80 of 1,000 have no triple
    assert [len(one) / 920 for one in found] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


def test_the_commonest_relations_of_the_sample_are_those_of_its_description(sample):
    counts = Counter(e.relation for reading in sample.values() for e in reading.examples)
    assert counts.most_common(5) == [
        ("country", 329),
        ("located in the administrative territorial entity", 300),
        ("date of birth", 217),
        ("contains administrative territorial entity", 180),
        ("instance of", 165),
    ]


def test_spans_of_the_sample_spell_the_entities_and_shifted_ones_are_counted(sample):
    for reading in sample.values():
        assert all(
            e.text[slice(*e.head_span)] == e.head and e.text[slice(*e.tail_span)] == e.tail
            for e in reading.examples
        )
    assert sum(len(reading.account.get(MOVED, ())) for reading in sample.values()) == 636
    assert not any(LOST in reading.account for reading in sample.values())


@pytest.mark.parametrize(
    ("stated", "span"),
    [
        ([0, 3], (0, 3)),
        ([2, 5], (0, 3)),
        ([9, 12], (8, 11)),
        ([6, 9], (8, 11)),
        ([500, 503], (8, 11)),
        (None, (0, 3)),
    ],
)
def test_the_nearest_place_with_the_entity_is_taken(tmp_path, stated, span):
    folder = write(
        tmp_path,
        document("1", "Ada met Ada in Deal.", ("Ada", stated, "visited", "Deal", [15, 19])),
        name="en_train.jsonl",
    )
    reading = read_rebel(folder, "train")
    assert reading.examples[0].head_span == span
    assert reading.account == (
        {} if stated is None or tuple(stated) == span else {MOVED: ["rebel/train/1/1"]}
    )


def test_a_triple_whose_entity_is_not_in_the_text_is_left_out_and_counted(tmp_path):
    folder = write(
        tmp_path,
        document(
            "1",
            "Ada in Deal.",
            ("Bob", [0, 3], "r", "Deal", [7, 11]),
            ("Ada", [0, 3], "r", "Deal", [7, 11]),
        ),
        name="en_test.jsonl",
    )
    reading = read_rebel(folder, "test")
    assert [example.id for example in reading.examples] == ["rebel/test/1/2"]
    assert reading.account == {LOST: ["rebel/test/1/1"]}


def test_the_files_of_the_full_release_are_its_splits(tmp_path):
    triple = ("Ada", [0, 3], "r", "Deal", [7, 11])
    for split, name in zip(
        SPLITS, ("en_train.jsonl", "en_val.jsonl", "en_test.jsonl"), strict=True
    ):
        write(tmp_path, document(split, "Ada in Deal.", triple), name=name)
    assert [read_rebel(tmp_path, split).examples[0].id for split in SPLITS] == [
        f"rebel/{split}/{split}/1" for split in SPLITS
    ]


def test_the_sample_stands_in_for_no_file_of_the_full_release(tmp_path):
    """Its documents are of that release, hence of its training file too."""
    triple = ("Ada", [0, 3], "r", "Deal", [7, 11])
    write(tmp_path, *(document(str(n), "Ada in Deal.", triple) for n in range(50)))
    assert read_rebel(tmp_path, "validation").examples
    write(tmp_path, document("1", "Ada in Deal.", triple), name="en_train.jsonl")
    assert "no en_val.jsonl below it" in refusal(lambda: read_rebel(tmp_path, "validation"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "en_train.jsonl:1: not valid JSON"),
        ("[1]", "en_train.jsonl:1: not a JSON object"),
        (
            '{"docid": "1", "text": "a \\ud800", "triples": []}',
            "en_train.jsonl:1: holds half a surrogate pair",
        ),
        ('{"text": "a", "triples": []}', "en_train.jsonl:1: no docid"),
        (
            '{"docid": "1", "text": "a", "triples": [{"subject": 1}]}',
            "en_train.jsonl:1: not a document of REBEL",
        ),
        (
            '{"docid": "1", "text": null, "triples": [{}]}',
            "en_train.jsonl:1: not a document of REBEL",
        ),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, message):
    (tmp_path / "en_train.jsonl").write_text(line + "\n")
    assert message in refusal(lambda: read_rebel(tmp_path, "train"))
