"""SemEval-2010 Task 8: the release itself is the ground truth, broken records name their line."""

import re
from collections import Counter

import pytest

from jaxre.errors import InputError
from jaxre.relations.marks import insert_marks
from jaxre.relations.semeval import LABELS, read_semeval

ITEM = '1\t"The <e1>child</e1> sat in the <e2>cradle</e2>."\nOther\nComment:\n\n'
SECOND = (
    '2\t"A <e1>ridge</e1> rises from the <e2>surge</e2>."\nEntity-Origin(e1,e2)\nComment: a'
    " surge\n\n"
)


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "semeval2010_task8"


@pytest.fixture(scope="module")
def splits(folder):
    return {split: read_semeval(folder, split) for split in ("train", "test")}


def written(tmp_path, content, name="TRAIN_FILE.TXT"):
    path = tmp_path / "release" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(("split", "count"), [("train", 8000), ("test", 2717)])
def test_every_item_of_the_release_is_read(splits, split, count):
    assert len(splits[split]) == count
    assert {example.relation for example in splits[split]} <= set(LABELS)


def test_all_nineteen_labels_occur_with_the_published_counts(splits, folder):
    counts = Counter(example.relation for example in splits["train"])
    assert set(counts) == set(LABELS)
    assert len(LABELS) == 19
    undirected = Counter(example.relation.partition("(")[0] for example in splits["train"])
    first_table = next(folder.rglob("TRAIN_DISTRIB.TXT")).read_text().split("<<<")[1]
    published = {
        name: int(count) for name, count in re.findall(r"([A-Z][\w-]+) : +(\d+)", first_table)
    }
    assert undirected | {"TOTAL": 8000} == published
    assert counts["Entity-Destination(e2,e1)"] == 1


def test_test_labels_keep_the_direction_that_the_key_file_lost(splits, folder):
    key = dict(
        line.split("\t")
        for line in next(folder.rglob("TEST_FILE_KEY.TXT")).read_text().splitlines()
    )
    assert {e.id.split("/")[-1]: e.relation.partition("(")[0] for e in splits["test"]} == {
        n: k.partition("(")[0] for n, k in key.items()
    }
    assert (
        sum(example.relation.endswith(("(e1,e2)", "(e2,e1)")) for example in splits["test"])
        == 2717 - 454
    )


@pytest.mark.parametrize(
    ("split", "name"), [("train", "TRAIN_FILE.TXT"), ("test", "TEST_FILE_FULL.TXT")]
)
def test_text_and_spans_give_back_the_sentence_of_the_file(splits, folder, split, name):
    lines = next(folder.rglob(name)).read_text(encoding="ascii").split("\n")
    sentences = dict(line.split("\t", 1) for line in lines[::4] if line)
    rebuilt = {
        e.id.split("/")[-1]: f'"{insert_marks(e.text, e.head_span, e.tail_span)}"'
        for e in splits[split]
    }
    assert rebuilt == sentences
    assert all(
        e.text[slice(*e.head_span)] == e.head and e.text[slice(*e.tail_span)] == e.tail
        for e in splits[split]
    )


def test_a_known_item_reads_as_stated(splits):
    first = splits["train"][0]
    assert (first.id, first.dataset, first.split) == (
        "semeval2010_task8/train/1",
        "semeval2010_task8",
        "train",
    )
    assert (first.head, first.tail, first.relation) == (
        "configuration",
        "elements",
        "Component-Whole(e2,e1)",
    )
    assert (first.head_type, first.domain) == (None, "general")


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_line_ends_and_a_byte_order_mark_change_nothing(tmp_path, newline, end):
    content = "\ufeff" + ((ITEM + SECOND).rstrip("\n") + end).replace("\n", newline)
    written(tmp_path, content)
    examples = read_semeval(tmp_path, "train")
    assert [(e.id, e.relation) for e in examples] == [
        ("semeval2010_task8/train/1", "Other"),
        ("semeval2010_task8/train/2", "Entity-Origin(e1,e2)"),
    ]


def test_quotes_unicode_and_separators_inside_a_sentence_stay(tmp_path):
    written(tmp_path, '7\t"<e1>"Ça va"</e1> \u2028said\tthe <e2>naïve 🙂</e2>"\nOther\nComment:\n')
    (example,) = read_semeval(tmp_path, "train")
    assert (example.text, example.head, example.tail) == (
        '"Ça va" \u2028said\tthe naïve 🙂',
        '"Ça va"',
        "naïve 🙂",
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ITEM.replace("Other", "Othr"), r":2: 'Othr' is not a label .* nearest is Other"),
        (ITEM.replace("Other", "Cause-Effect"), r":2: .*nearest is Cause-Effect\(e1,e2\)"),
        (SECOND + ITEM.replace("</e1>", ""), r":5: no </e1>; mark the head"),
        (ITEM.replace("<e2>cradle</e2>", "cradle"), r":1: no <e2> and no </e2>"),
        (ITEM.replace("the <e2>", "the <e1>x</e1> <e2>"), r":1: <e1> occurs twice"),
        (ITEM.replace("<e1>child</e1>", "</e1>child<e1>"), r":1: </e1> stands before <e1>"),
        (ITEM.replace("child", " "), r":1: nothing between <e1> and </e1>"),
        (ITEM.replace("Comment:", ""), r':3: no comment; .*"Comment:"'),
        (ITEM.rstrip("\n") + "\n" + SECOND, r":4: the item does not end here"),
        (ITEM.replace("\t", " "), r":1: not an item; .*number, tab"),
        (ITEM.replace('."', "."), r":1: not an item"),
        (ITEM + ITEM, r":5: item 1 occurs twice, first at line 1"),
        (
            ITEM.encode() + SECOND.encode("latin-1").replace(b"ridge", b"r\xeedge"),
            r":5: byte 0xee is not UTF-8; save",
        ),
        ("", r"the file is empty"),
    ],
)
def test_a_broken_record_is_refused_with_its_line(tmp_path, content, message):
    path = written(tmp_path, content)
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + message) as error:
        read_semeval(tmp_path, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("split", "message"),
    [("dev", "no split 'dev'; choose one of train, test"), (None, "no split given; choose one of")],
)
def test_an_unknown_split_lists_those_there_are(tmp_path, split, message):
    with pytest.raises(InputError, match=message):
        read_semeval(tmp_path, split)


def test_a_missing_release_says_where_to_put_it(tmp_path):
    with pytest.raises(InputError, match=r"no such folder .*JAXRE_DATA"):
        read_semeval(tmp_path / "nowhere", "train")
    with pytest.raises(InputError, match=r"no TRAIN_FILE\.TXT below it"):
        read_semeval(tmp_path, "train")
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "TRAIN_FILE.TXT").write_text(ITEM)
    with pytest.raises(InputError, match=r"2 files TRAIN_FILE\.TXT"):
        read_semeval(tmp_path, "train")
