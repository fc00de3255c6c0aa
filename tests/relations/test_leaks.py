"""Texts that splits share: found as brute force finds them, and gone from training where that is asked for."""

import json
import logging

import pytest
from refusals import refusal

from jaxre.config import Data, Mixture, Source
from jaxre.relations import leaks, mixtures, sources
from jaxre.relations.schema import Example


def example(name, text, split="train"):
    return Example(f"x/{split}/{name}", "x", split, text, text.split()[0], text.split()[-1], "r")


def write(path, texts):
    rows = [
        {"id": str(at), "text": text, "head": text.split()[0], "tail": text.split()[-1], "relation": "r"} for at, text in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(dataset=str(path))


@pytest.fixture
def data(tmp_path):
    train = write(tmp_path / "train.jsonl", ["a b", "c d", "e  f", "g h", "a b"])
    validation, test = write(tmp_path / "validation.jsonl", ["a  b", "x y"]), write(tmp_path / "test.jsonl", ["e f", "a b", "z z"])
    return Data(train=train, validation=validation, test=test, dedup=True)


@pytest.fixture(autouse=True)
def said_anew():
    sources.say.cache_clear()


def test_what_splits_share_is_what_brute_force_finds(shared_data, monkeypatch):
    monkeypatch.setenv("JAXRE_DATA", str(shared_data))
    splits = {split: sources.load(Source(dataset="conll04", split=split, negatives=0.2)) for split in ("train", "validation", "test")}
    found = leaks.shared_texts(splits)
    assert set(found) == {("train", "validation"), ("train", "test"), ("validation", "test")}
    for (first, second), shared in found.items():
        texts = {"".join(one.text.split()) for one in splits[first]}
        assert list(shared.same_text) == [one.id for one in splits[second] if "".join(one.text.split()) in texts]
    assert found["train", "test"].same_text


def test_dedup_leaves_no_text_of_validation_or_test_and_says_how_many(data, caplog):
    kept = leaks.read_train(data).examples
    assert [one.text for one in kept] == ["c d", "g h"]
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "data.dedup: 3 of 5 training examples left out, for their text occurs (2 in validation, 3 in test)"
    ]
    assert leaks.read_train(data).examples == kept


def test_without_dedup_nothing_is_left_out_and_nothing_else_is_read(data, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "load", lambda source, load=sources.load: asked.append(source) or load(source))
    plain = data.model_copy(update={"dedup": False})
    assert len(leaks.read_train(plain).examples) == 5
    assert asked == [data.train]


def test_a_mixture_without_the_held_out_texts_keeps_its_order(data, tmp_path):
    other = write(tmp_path / "other.jsonl", ["p q", "z z", "r s"])
    mixed = data.model_copy(update={"train": Mixture(sources=(data.train, other))})
    whole, kept = mixtures.read(mixed.train, "data.train"), leaks.read_train(mixed)
    held_out = {"ab", "ef", "xy", "zz"}
    assert kept.examples == [one for one in whole.examples if "".join(one.text.split()) not in held_out]
    assert [(count.read, count.used) for count in kept.counts] == [(2, 2), (2, 2)]
    assert all("".join(one.text.split()) not in held_out for pool in kept.by_dataset.values() for one in pool)


def test_dedup_without_held_out_data_changes_nothing(data):
    alone = data.model_copy(update={"validation": None, "test": None})
    assert len(leaks.read_train(alone).examples) == 5


def test_dedup_that_leaves_nothing_is_refused(tmp_path, data):
    message = refusal(lambda: leaks.read_train(data.model_copy(update={"test": data.train})))
    assert message == "data.dedup: all 5 training examples have a text of validation or test; set data.dedup=false"


def test_a_part_of_the_held_out_data_removes_no_more_than_it_holds(data):
    first = data.validation.model_copy(update={"limit": 1})
    held_out = sources.load(first)
    kept, removed = leaks.without_texts([example("1", "a b"), example("2", "x y")], {"validation": held_out})
    assert [one.text.split() for one in kept] != [held_out[0].text.split()]
    assert (len(kept), removed) == (1, {"validation": 1})


def test_the_digest_follows_the_held_out_files_and_settings_only_where_they_matter(tmp_path, data):
    plain = data.model_copy(update={"dedup": False})
    seen = [leaks.digest_of(one) for one in (plain, data)]
    limited = data.model_copy(update={"test": data.test.model_copy(update={"limit": 1})})
    seen.append(leaks.digest_of(limited))
    write(tmp_path / "test.jsonl", ["other text"])
    seen.append(leaks.digest_of(data))
    assert len(set(seen)) == 4
    assert None not in seen
    assert leaks.digest_of(plain) == seen[0]
    hub = data.model_copy(update={"test": Source(dataset="hub:o/n", split="test")})
    assert leaks.digest_of(hub) is None
