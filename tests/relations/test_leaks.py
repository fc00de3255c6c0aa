"""Texts that splits share: found as brute force finds them, and gone from training where that is
asked for.
"""

import json
import logging

import pytest
from refusals import refusal

from jaxre.config import Data, Source
from jaxre.relations import leaks, sources
from jaxre.relations.schema import Example


def example(name, text, split="train"):
    return Example(f"x/{split}/{name}", "x", split, text, text.split()[0], text.split()[-1], "r")


def write(path, texts):
    rows = [
        {
            "id": str(at),
            "text": text,
            "head": text.split()[0],
            "tail": text.split()[-1],
            "relation": "r",
        }
        for at, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(dataset=str(path))


@pytest.fixture
def data(tmp_path):
    train = write(tmp_path / "train.jsonl", ["a b", "c d", "e  f", "g h", "a b"])
    validation, test = (
        write(tmp_path / "validation.jsonl", ["a  b", "x y"]),
        write(tmp_path / "test.jsonl", ["e f", "a b", "z z"]),
    )
    return Data(train=train, validation=validation, test=test, dedup=True)


@pytest.fixture(autouse=True)
def said_anew():
    sources.say.cache_clear()


def test_what_splits_share_is_what_brute_force_finds(shared_data, monkeypatch):
    monkeypatch.setenv("JAXRE_DATA", str(shared_data))
    splits = {
        split: sources.load(Source(dataset="conll04", split=split, negatives=0.2))
        for split in ("train", "validation", "test")
    }
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        shared = sources.overlap(splits[first], splits[second]).same_text
        texts = {"".join(one.text.split()) for one in splits[first]}
        assert list(shared) == [
            one.id for one in splits[second] if "".join(one.text.split()) in texts
        ]
        assert shared or first == "validation"


def test_dedup_leaves_no_text_of_validation_or_test_and_says_how_many(data, caplog):
    (kept,) = leaks.load_train(data, [data.train])
    assert [one.text for one in kept] == ["c d", "g h"]
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "data.dedup: 3 of 5 training examples left out, for their text occurs (2 in validation, 3"
        " in test)"
    ]
    assert leaks.load_train(data, [data.train]) == [kept]


def test_each_source_of_a_mixture_keeps_its_own(tmp_path, data):
    more = write(tmp_path / "more.jsonl", ["z  z", "k l"])
    assert [[one.text for one in kept] for kept in leaks.load_train(data, [data.train, more])] == [
        ["c d", "g h"],
        ["k l"],
    ]


def test_without_dedup_nothing_is_left_out_and_nothing_else_is_read(data, monkeypatch):
    asked, load = [], sources.load
    monkeypatch.setattr(sources, "load", lambda source: asked.append(source) or load(source))
    plain = data.model_copy(update={"dedup": False})
    assert [len(kept) for kept in leaks.load_train(plain, [data.train])] == [5]
    assert asked == [data.train]
    assert leaks.held_out_of(plain) == []


def test_dedup_without_held_out_data_changes_nothing(data):
    alone = data.model_copy(update={"validation": None, "test": None})
    assert [len(kept) for kept in leaks.load_train(alone, [data.train])] == [5]


def test_dedup_that_leaves_nothing_is_refused(tmp_path, data):
    message = refusal(
        lambda: leaks.load_train(data.model_copy(update={"test": data.train}), [data.train])
    )
    assert (
        message == "data.dedup: all 5 training examples have a text of validation or test; set"
        " data.dedup=false"
    )


def test_a_part_of_the_held_out_data_removes_no_more_than_it_holds(data):
    first = data.validation.model_copy(update={"limit": 1})
    held_out = sources.load(first)
    kept, removed = leaks.without_texts(
        [example("1", "a b"), example("2", "x y")], {"validation": held_out}
    )
    assert [one.text.split() for one in kept] != [held_out[0].text.split()]
    assert (len(kept), removed) == (1, {"validation": 1})
