"""CoNLL04: each public copy is the ground truth of the other."""

import json
import re
from collections import Counter

import pytest

from jaxre.errors import InputError
from jaxre.relations.conll04 import read_conll04, read_conll04_multihead

READERS = {"conll04": read_conll04, "conll04_multihead": read_conll04_multihead}
SPLITS = ("train", "validation", "test")
ALL = 1e12

SENTENCE = {
    "tokens": ["Booth", "shot", "Lincoln", "in", "New", "York", "York"],
    "entities": [[0, 1, "Peop"], [2, 3, "Peop"], [4, 6, "Loc"], [6, 7, "Loc"]],
    "relations": [[0, 1, 2, 3, "Kill"]],
}
DOCUMENT = """#doc 7
0\tBooth\tB-Peop\t['Kill']\t[2]
1\tshot\tO\t['N']\t[1]
2\tLincoln\tB-Peop\t['N']\t[2]
3\tin\tO\t['N']\t[3]
4\tNew\tB-Loc\t['N']\t[4]
5\tYork\tI-Loc\t['N']\t[5]
6\tYork\tB-Loc\t['N']\t[6]
"""


@pytest.fixture(scope="module")
def everything(shared_data):
    return {
        (name, split): read(shared_data / "conll04", split, ALL)
        for name, read in READERS.items()
        for split in SPLITS
    }


def positives(examples):
    return [example for example in examples if example.relation != "none"]


def unified(tmp_path, sentences):
    path = tmp_path / "train.CoNLL04.json"
    path.write_text(sentences if isinstance(sentences, str) else json.dumps(sentences))
    return path


@pytest.mark.parametrize(
    ("name", "split", "sentences", "relations"),
    [
        ("conll04", "train", 922, 1283),
        ("conll04", "validation", 231, 343),
        ("conll04", "test", 288, 422),
        ("conll04_multihead", "train", 910, 1273),
        ("conll04_multihead", "validation", 243, 353),
        ("conll04_multihead", "test", 288, 422),
    ],
)
def test_counts_are_those_of_the_copy(everything, name, split, sentences, relations):
    examples = everything[name, split]
    assert len({example.id.split("/")[2] for example in examples}) == sentences
    assert len(positives(examples)) == relations
    assert len({example.id for example in examples}) == len(examples)


@pytest.mark.parametrize("name", READERS)
def test_the_label_inventory_of_test_is_the_published_one(everything, name):
    counts = Counter(example.relation for example in positives(everything[name, "test"]))
    assert counts == {
        "OrgBased_In": 105,
        "Live_In": 100,
        "Located_In": 94,
        "Work_For": 76,
        "Kill": 47,
    }


def essence(example):
    """The facts that both copies state, with places in characters other than white space; one copy
    attaches the final full stop to the last word.
    """

    def squeezed(text):
        return "".join(text.split())

    begins = [
        len(squeezed(example.text[: span[0]])) for span in (example.head_span, example.tail_span)
    ]
    names = [squeezed(name).rstrip(".") for name in (example.head, example.tail)]
    return (
        squeezed(example.text),
        *begins,
        *names,
        example.head_type,
        example.tail_type,
        example.relation,
    )


@pytest.mark.parametrize("splits", [("test",), ("train", "validation")])
def test_both_copies_hold_the_same_pairs_types_relations_and_negatives(everything, splits):
    one, other = (
        Counter(essence(e) for split in splits for e in everything[name, split]) for name in READERS
    )
    assert one == other


def test_the_copies_divide_train_and_validation_differently(everything):
    def texts(name, split):
        return {essence(example)[0] for example in everything[name, split]}

    assert texts("conll04", "train") & texts("conll04_multihead", "validation")
    assert texts("conll04", "test") == texts("conll04_multihead", "test")


def test_spans_spell_the_entities(everything):
    for examples in everything.values():
        assert all(
            e.text[slice(*e.head_span)] == e.head and e.text[slice(*e.tail_span)] == e.tail
            for e in examples
        )


@pytest.fixture(params=READERS)
def small(request, tmp_path):
    """The same sentence in either format: (reader, folder)."""
    if request.param == "conll04":
        unified(tmp_path, [SENTENCE])
    else:
        (tmp_path / "train.txt").write_bytes(DOCUMENT.replace("\n", "\r\n").encode())
    return READERS[request.param], tmp_path


def test_negatives_are_the_ordered_pairs_without_a_relation_in_that_direction(small):
    read, folder = small
    examples = read(folder, "train", ALL)
    assert len(examples) == 4 * 3
    assert [(e.head, e.tail) for e in examples if e.relation == "Kill"] == [("Booth", "Lincoln")]
    assert ("Lincoln", "Booth", "none") in {(e.head, e.tail, e.relation) for e in examples}
    same_words = [e for e in examples if {e.head, e.tail} == {"York", "New York"}]
    assert {(e.head_span, e.tail_span) for e in same_words} == {
        ((22, 30), (31, 35)),
        ((31, 35), (22, 30)),
    }
    assert examples[0].id.endswith(("/0/0-1/2-3", "/7/0-1/2-3"))


@pytest.mark.parametrize(
    ("negatives", "count"), [(0, 0), (1, 1), (2.4, 2), (11, 11), (ALL, 11), (float("inf"), 11)]
)
def test_negatives_are_drawn_per_positive_of_the_split(small, negatives, count):
    read, folder = small
    assert sum(example.relation == "none" for example in read(folder, "train", negatives)) == count


def test_the_draw_hangs_on_ids_and_seed_only(shared_data):
    def drawn(negatives, seed=42):
        examples = read_conll04(shared_data / "conll04", "validation", negatives, seed)
        return {example.id for example in examples if example.relation == "none"}

    assert drawn(1) == drawn(1)
    assert len(drawn(1)) == 343
    assert drawn(0.5) < drawn(1) < drawn(3) < drawn(ALL)
    assert drawn(1, seed=43) != drawn(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entities": [[0, 9, "Peop"]]}, r"sentence 0: entity \[0, 9\) is outside the 7 tokens"),
        ({"relations": [[0, 1, 3, 4, "Kill"]]}, r"the tail \[3, 4\] of Kill is not an entity"),
        (
            {"relations": [[0, 1, 2, 3, "Kill"], [0, 1, 2, 3, "Live_In"]]},
            r"two relations \(Kill, Live_In\); keep one",
        ),
        ({"relations": [[0, 1, 2, 3]]}, "sentence 0: not a sentence"),
        ({"tokens": "Booth shot"}, "sentence 0: not a sentence"),
        ({"tokens": [1, 2]}, "sentence 0: not a sentence"),
    ],
)
def test_a_broken_sentence_is_named(tmp_path, change, message):
    unified(tmp_path, [{**SENTENCE, **change}])
    with pytest.raises(InputError, match=message):
        read_conll04(tmp_path, "train")


def test_broken_json_names_the_line(tmp_path):
    path = unified(tmp_path, '[\n{"tokens": }]')
    with pytest.raises(InputError, match=re.escape(f"{path}:2: not valid JSON")):
        read_conll04(tmp_path, "train")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1\tshot\tO\t['N']\t[1]\n", "", ":3: index '2' where 1 was due"),
        ("shot\tO\t['N']\t[1]", "shot O ['N'] [1]", r":3: 2 columns; a token has 5"),
        ("[2]\n1", "[1]\n1", r":1: a relation of document 7 names token 1, which ends no entity"),
        ("['Kill']\t[2]", "['Kill']\t[2, 3]", r":2: relations \['Kill'\] and tails"),
        ("['Kill']", "[Kill]", r":2: relations"),
        ("B-Peop\t['Kill']", "Peop\t['Kill']", r":2: tag 'Peop'"),
        ("#doc 7\n", "", ":1: no #doc line"),
    ],
)
def test_a_broken_token_line_is_named(tmp_path, old, new, message):
    assert old in DOCUMENT
    (tmp_path / "train.txt").write_text(DOCUMENT.replace(old, new))
    with pytest.raises(InputError, match=message):
        read_conll04_multihead(tmp_path, "train")


def test_a_repeated_document_is_refused(tmp_path):
    (tmp_path / "train.txt").write_text(DOCUMENT + DOCUMENT)
    with pytest.raises(InputError, match=":9: sentence 7 occurs twice"):
        read_conll04_multihead(tmp_path, "train")


@pytest.mark.parametrize("read", READERS.values())
def test_an_unknown_split_lists_those_there_are(tmp_path, read):
    with pytest.raises(InputError, match="no split 'dev'; choose one of train, validation, test"):
        read(tmp_path, "dev")
